"""`gptoss-jax bench`: what it prints and writes, and one line for a bad input."""

import json
import math
import sys
from pathlib import Path

import jax
import pytest

from gptoss_jax.bench import memory, report, timing
from gptoss_jax.cli import main
from tests.bench import keys

QUICK = ["bench", "--model", "tiny", "--layers", "1", "--batch", "1,2", "--context", "32", "--prefill", "16"]


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_PATIENCE_SECONDS", 0.0)


@pytest.mark.slow
def test_table_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, plot = tmp_path / "result.json", tmp_path / "roofline.svg"
    assert main([*QUICK, "--steps", "4", "--json", str(result), "--plot", str(plot)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cpu, driver ")
    assert lines[1].startswith("ceilings: reads ")
    assert [line.split()[:4] for line in lines[3:6]] == [
        ["tiny/1", "decode", "1", "32"],
        ["tiny/1", "decode", "2", "32"],
        ["tiny/1", "prefill", "1", "16"],
    ]
    written = json.loads(result.read_text())
    assert set(written) >= keys.REPORT
    assert set(written["ceilings"]) == keys.CEILINGS
    assert len(written["rows"]) == 3
    assert all(set(row) >= keys.ROW for row in written["rows"])
    assert written["versions"]["jax"] == jax.__version__
    assert plot.read_text().count("<svg") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model tiny --layers 3", "3 layers: --layers: choose 1 to 2"),
        ("--model tiny --context 200000", "200000 is out of range: --context: choose 1 to 131072"),
        ("--model tiny --prefill 200000", "200000 is out of range: --prefill: "),
        ("--model tiny --steps 300", "300 is out of range: --steps: choose 1 to 256"),
        ("--json nowhere/result.json", "no such folder: nowhere/result.json: make it first"),
        ("--json .", "a folder: .: name a file in it"),
        ("--plot .", "a folder: .: name a file in it"),
        ("--plot roofline.bmp", "no format of a plot: roofline.bmp: name the file .png, .svg, .pdf"),
        ("--plot roofline", "no format of a plot: roofline: "),
        ("--model tiny --batch 0 --prefill 0", "nothing to measure: --batch, --context and --prefill: give --batch "),
        ("--model tiny --context 0 --prefill 0", "nothing to measure: "),
        ("ckpt --model 20b", "a checkpoint and --model: --model: give one of the two"),
        ("nowhere", "no such directory: nowhere: "),
        ("--split --collectives", "--split and --collectives: --collectives: give one of the two"),
        ("--model tiny --collectives", "no sums over devices: --collectives: split the model: "),
        ("--train lora --plot x.svg", "--plot with --train: --plot: leave out --plot"),
        ("--train lora --batch 4", "--batch with --train: "),
        ("--train full --steps 0", "--steps with --train: "),
        ("--train qat --kernels", "--kernels with --train: "),
        ("--train lora --targets heads", "targets = ('heads',): settings: use some of attention, router, experts"),
        ("--model tiny --rank 4", "--rank without --train: --rank: leave out --rank"),
        ("--model tiny --sequence 16", "--sequence without --train: "),
        ("--memory-limit-gb 16", "no NVIDIA GPU to hold to a limit: --memory-limit-gb: leave it out"),
    ],
)
def test_bad_input_is_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "nvidia_smi", lambda query: None)
    assert main(["bench", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"gptoss-jax: {message}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batch 1,x", "argument --batch: '1,x' is no list of whole numbers: "),
        ("--prefill 4,0", "argument --prefill: 0 is less than 1: "),
        ("--train lora --sequence 0", "argument --sequence: 0 is less than 1: "),
        ("--model 7b", "argument --model: invalid choice: '7b'"),
    ],
)
def test_usage_error_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *arguments.split()])
    assert capsys.readouterr().err.startswith(f"gptoss-jax: {message}")


def test_missing_matplotlib_is_told_before_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*QUICK, "--plot", "x.png"]) == 2
    assert "matplotlib is not installed: --plot: pip install gptoss-jax[plot]" in capsys.readouterr().err


def test_memory_limit_is_a_share_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "nvidia_smi", {"memory.total": "143771", "memory.used": "4"}.__getitem__)
    before = jax.config.jax_pjrt_client_create_options
    try:
        known = memory.hold(16 * 10**9)
        options = jax.config.jax_pjrt_client_create_options
    finally:
        jax.config.update("jax_pjrt_client_create_options", before)
    assert options["memory_fraction"] * 143771 * 2**20 == pytest.approx(16e9 - memory.OUTSIDE_BYTES)
    monkeypatch.setattr(memory, "nvidia_smi", lambda query: "14000")
    assert memory.held(known)["process_bytes"] == 13996 * 2**20


@pytest.mark.parametrize("limit", [0.5, 151.0, -1.0, math.nan, math.inf, -math.inf, 1e308])
def test_memory_limit_out_of_range_is_refused(limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "nvidia_smi", {"memory.total": "143771", "memory.used": "4"}.__getitem__)
    with pytest.raises(memory.BenchError, match=r"choose more than 0\.8 and at most 150\.8"):
        memory.hold(limit * 1e9)


@pytest.mark.parametrize("limit", ["nan", "inf", "-1"])
def test_memory_limit_that_is_no_size_is_one_line(
    limit: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "nvidia_smi", {"memory.total": "143771", "memory.used": "4"}.__getitem__)
    assert main([*QUICK, f"--memory-limit-gb={limit}"]) == 2
    assert capsys.readouterr().err.startswith(f"gptoss-jax: {limit} GB: --memory-limit-gb: choose more than 0.8 ")


def test_card_is_unknown_without_the_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report.nvidia_smi("driver_version") is None
    tool = tmp_path / "nvidia-smi"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    tool.write_text("#!/bin/sh\necho 580.159\n")
    tool.chmod(0o755)
    assert report.nvidia_smi("driver_version") == "580.159"


@pytest.mark.parametrize(
    ("visible", "asked"),
    [(None, "--id=0"), ("3", "--id=3"), ("2,0", "--id=2"), (" GPU-1a2b , 1", "--id=GPU-1a2b"), ("", None)],
)
def test_card_is_the_first_one_this_process_sees(
    visible: str | None, asked: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "$3"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert report.nvidia_smi("driver_version") == asked


def test_commit_of_a_copy_without_history(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("GPTOSS_JAX_COMMIT", "0123abc")
    assert report.surroundings("bench")["commit"] == "0123abc"
