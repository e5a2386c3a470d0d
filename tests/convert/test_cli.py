import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from convert.cli import (
    add_export_arguments,
    add_inspect_arguments,
    add_verify_arguments,
    main,
    run_export,
    run_guarded,
    run_inspect,
    run_verify,
)


def parse(add_arguments, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def test_convert_then_verify_and_inspect(pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main([str(pristine / "original"), out]) == 0
    assert "79 parameters, original layout, bytes as published" in capsys.readouterr().out
    assert run_guarded(run_verify, parse(add_verify_arguments, out, str(pristine / "hf"))) == 0
    assert "79 parameters, 568,768 bytes equal" in capsys.readouterr().out
    assert run_guarded(run_inspect, parse(add_inspect_arguments, out, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["num_bytes"] == 568_768


def test_export_prints_what_it_wrote(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert run_guarded(run_export, parse(add_export_arguments, str(converted), out, "--layout", "original")) == 0
    assert "63 tensors, 568,768 bytes in 1 file, original layout, mxfp4" in capsys.readouterr().out
    again = parse(add_export_arguments, str(converted), out, "--overwrite", "--max-shard-size", "1MB", "--json")
    assert run_guarded(run_export, again) == 0
    exported = json.loads(capsys.readouterr().out)
    assert (exported["form"], exported["num_tensors"], exported["num_bytes"]) == ("hf", 79, 568_768)


@pytest.mark.parametrize("size", ["5", "0GB", "-1GB", "5 GiB", "five"])
def test_shard_size_without_meaning_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(add_export_arguments, "checkpoint", "out", f"--max-shard-size={size}")
    assert f"'{size}' is no size such as 5GB" in capsys.readouterr().err


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("gptoss-jax: no such folder: ")
    assert message.count("\n") == 1


def test_what_the_system_refuses_is_one_line(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (published / "config.json").unlink()
    (published / "config.json").mkdir()
    assert main([str(published), str(published / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("gptoss-jax: Is a directory: ")
    assert message.count("\n") == 1


@pytest.mark.parametrize("bug", [FileNotFoundError("no such thing"), OSError(5, "Input/output error")])
def test_system_error_about_no_file_is_a_traceback(bug: OSError) -> None:
    def fail(options: argparse.Namespace) -> int:
        raise bug

    with pytest.raises(OSError, match=str(bug.args[-1])):
        run_guarded(fail, argparse.Namespace())


def test_device_without_room_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def ask_for_too_much(options: argparse.Namespace) -> int:
        return int(jnp.zeros(1 << 46, jnp.int8).sum())

    assert run_guarded(ask_for_too_much, argparse.Namespace()) == 2
    message = capsys.readouterr().err
    assert message.startswith("gptoss-jax: RESOURCE_EXHAUSTED: Out of memory")
    assert "--mesh" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    "bug",
    [
        "INTERNAL: an unknown error",
        "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 240000, available: 232448",
        "RESOURCE_EXHAUSTED: Allocation (size=268435456) would exceed memory (size=134217728) :: [space=vmem, scoped]",
    ],
)
def test_other_complaint_of_xla_is_a_traceback(bug: str) -> None:
    def fail(options: argparse.Namespace) -> int:
        raise jax.errors.JaxRuntimeError(bug)

    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(bug)):
        run_guarded(fail, argparse.Namespace())


def test_usage_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["source", "destination", "--bogus"])
    message = capsys.readouterr().err
    assert message == ("gptoss-jax: unrecognized arguments: --bogus: python -m convert: see python -m convert --help\n")


def test_interruption_is_no_traceback(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("convert.converter._write_arrays", stop)
    assert main([str(pristine / "hf"), str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "gptoss-jax: interrupted\n"


def test_help_imports_neither_jax_nor_orbax() -> None:
    script = (
        "import sys, convert.cli\n"
        "try:\n    convert.cli.main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "assert not {'jax', 'orbax', 'tensorstore', 'numpy'} & set(sys.modules)\n"
    )
    help_text = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert "--resume" in help_text
