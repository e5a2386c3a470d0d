"""The benchmark of conversion, on a checkpoint that takes no time: what it writes, and that it goes on."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from convert import bench_convert
from convert.bench_convert import measure
from convert.source import open_source
from gptoss_jax.errors import ConversionError, ShardingError

STEPS = ("cp", "convert", "verify", "restore expert=2")


@pytest.fixture(scope="module")
def figures(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    # A process starts with the peak of the one that it was forked from, and that of the tests is large.
    command = (
        sys.executable,
        "-m",
        "convert.bench_convert",
        pristine / "hf",
        folder / "scratch",
        folder / "result.json",
    )
    subprocess.run([*command, "--repeats", "1", "--mesh", "expert=2"], check=True)
    return json.loads((folder / "result.json").read_text())


def test_each_step_has_its_time_and_bytes(figures: dict[str, Any], pristine: Path) -> None:
    num_bytes = open_source(pristine / "hf").num_bytes
    for step in STEPS:
        (turn,) = figures[step]
        assert turn["seconds"] > 0, step
        assert turn["mb_per_second"] > 0, step
        assert turn["bytes"] >= num_bytes, step  # cp copies the headers too
    ratio = figures["cp"][0]["seconds"] / figures["convert"][0]["seconds"]
    assert figures["rate_of_cp"] == pytest.approx(ratio, abs=1e-3)


def test_processes_have_memory_of_their_own(figures: dict[str, Any]) -> None:
    for step in STEPS[1:]:
        assert 100 < figures[step][0]["peak_rss_mib"] < 2000, step
    (restored,) = figures["restore expert=2"]
    assert restored["rss_before_mib"] <= restored["rss_restored_mib"] <= restored["peak_rss_mib"]


def test_restore_gives_each_device_its_share(figures: dict[str, Any]) -> None:
    (restored,) = figures["restore expert=2"]
    first, second = restored["bytes_of_each_device"]
    assert first == second
    assert restored["bytes"] / 2 < first < restored["bytes"]  # norms and biases are on both
    assert restored["ready_seconds"] >= restored["seconds"]


def test_what_was_cut_short_goes_on(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = instant(monkeypatch, cut_short=["cp", "convert", "cp", "convert"])
    arguments = (pristine / "hf", tmp_path / "scratch", tmp_path / "result.json")
    with pytest.raises(KeyboardInterrupt):
        measure(*arguments)
    assert not (tmp_path / "scratch" / "converted").exists()
    taken.clear()
    measure(*arguments)
    assert taken == ["convert", "verify"]
    again = ": in result.json already"
    steps = [line if line.endswith(again) else line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert steps == [
        "cp",
        "convert",
        "cp",
        *(f"{step}{again}" for step in ("cp", "convert", "cp")),
        "convert",
        "verify",
    ]
    assert json.loads((tmp_path / "result.json").read_text())["rate_of_cp_flushed"] == 2.0


def test_another_conversion_is_verified_again(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = instant(monkeypatch)
    arguments = (pristine / "hf", tmp_path / "scratch", tmp_path / "result.json")
    measure(*arguments, repeats=1, mesh="expert=2", conditions="idle")
    measure(*arguments, repeats=2, conditions="busy")
    assert taken == ["cp", "convert", "verify", "restore", "cp", "convert", "verify"]
    figures = json.loads((tmp_path / "result.json").read_text())
    assert "restore expert=2" not in figures, "it was of a conversion that is no more"
    assert [turn["conditions"] for turn in figures["convert"]] == ["idle", "busy"]
    assert figures["command"].endswith("RESULT --repeats 2")


def instant(monkeypatch: pytest.MonkeyPatch, cut_short: list[str] | None = None) -> list[str]:
    """Steps that take no time, and the names of those taken; the last of `cut_short` is interrupted."""
    taken: list[str] = []

    def take(step: str, *folders: Any) -> dict[str, Any]:
        taken.append(step)
        if step == "convert":
            shutil.rmtree(folders[1], ignore_errors=True)
        if taken == cut_short:
            raise KeyboardInterrupt
        if step == "convert":
            folders[1].mkdir()
        return {"seconds": 2.0, "flushed_seconds": 4.0}

    for name, step in (("copy", "cp"), ("convert", "convert"), ("verify", "verify"), ("restore", "restore")):
        monkeypatch.setattr(bench_convert, f"_{name}", functools.partial(take, step))
    return taken


def test_figures_of_another_checkpoint_are_refused(pristine: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    result.write_text('{"checkpoint": {"layers": 36}, "hardware": {}, "versions": {}}')
    with pytest.raises(
        ConversionError, match=r"figures of another checkpoint and hardware and versions: .*result\.json"
    ):
        measure(pristine / "hf", tmp_path / "scratch", result)


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_what_is_no_result_is_refused(pristine: Path, tmp_path: Path, text: str) -> None:
    result = tmp_path / "result.json"
    result.write_text(text)
    with pytest.raises(ConversionError, match=r"no figures of a conversion: .*result\.json"):
        measure(pristine / "hf", tmp_path / "scratch", result)


def test_a_conversion_that_is_gone_is_named(figures: dict[str, Any], pristine: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    result.write_text(json.dumps(figures))
    with pytest.raises(ConversionError, match=r"the conversion that was timed is gone: .*converted"):
        measure(pristine / "hf", tmp_path / "scratch", result, repeats=1)


def test_bad_arguments_are_named_before_any_work(pristine: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="0 turns: --repeats"):
        measure(pristine / "hf", tmp_path / "scratch", tmp_path / "result.json", repeats=0)
    with pytest.raises(ShardingError):
        measure(pristine / "hf", tmp_path / "scratch", tmp_path / "result.json", mesh="experts")
    with pytest.raises(ConversionError, match=r"no such folder: .*nowhere"):
        measure(pristine / "hf", tmp_path / "scratch", tmp_path / "nowhere" / "result.json")
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("place", ["copy", "converted", "converted.partial/inside"])
def test_source_where_copies_go_is_refused(published: Path, tmp_path: Path, place: str) -> None:
    source = tmp_path / "scratch" / place
    source.parent.mkdir(parents=True)
    published.rename(source)
    with pytest.raises(ConversionError, match=r"the source would be replaced: .*name another scratch folder"):
        measure(source, tmp_path / "scratch", tmp_path / "result.json")
    assert open_source(source).num_bytes > 0


def test_copy_that_fails_is_named(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "cp").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "cp").chmod(0o755)
    with pytest.raises(ConversionError, match="it ended with 3: cp: "):
        measure(pristine / "hf", tmp_path / "scratch", tmp_path / "result.json")


def test_restore_onto_no_mesh_is_one_line(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "convert.bench_restore", tmp_path, "--mesh", "experts")
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "cannot read 'experts'" in ended.stderr
