"""The gate's own judgement, without a compiler for GPUs: what it reads, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu_gate import __main__ as gate
from tests.gpu_gate import limits
from tests.gpu_gate.ptxas import Kernel, kernels

OUTPUT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'experts_down_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for experts_down_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 138 registers, used 2 barriers
ptxas info    : Compile time = 12.552 ms
ptxas info    : Compiling entry function 'attention_mosaic_gpu_kernel' for 'sm_90a'
    8 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers
ptxas info    : Compiling entry function 'experts_down_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers
"""


def test_kernels_are_read_from_what_ptxas_says() -> None:
    assert kernels(OUTPUT) == [Kernel("attention", 255, 56), Kernel("experts_down", 138, 4)]
    assert kernels("no kernels") == []


def test_kernel_of_which_ptxas_says_nothing_known_is_no_kernel_without_spills() -> None:
    with pytest.raises(ValueError, match="what ptxas says of attention_mosaic_gpu_kernel cannot be read"):
        kernels(OUTPUT.replace("24 bytes spill stores", "24 B spilled"))
    with pytest.raises(ValueError, match="cannot be read"):
        kernels(OUTPUT.replace("Used 255 registers", "registers: 255"))


def test_figure_above_its_limit_is_named() -> None:
    found = {"launches_per_layer": 8.0, "spill_bytes": 4.0, "temporary_bytes": 100.0}
    assert limits.exceeded("decode-1", found, {"launches_per_layer": 8, "spill_bytes": 0, "temporary_bytes": 100}) == [
        "decode-1: spill_bytes is 4, the limit is 0"
    ]
    assert limits.exceeded("decode-1", {"spill_bytes": 0.0}, {}) == [
        "decode-1: spill_bytes is 0, and has no limit: run with --update"
    ]


def test_kernel_that_is_not_found_is_named() -> None:
    allowed = {"launches_per_layer": 8, limits.SPILLS + "attention": 0}
    assert limits.exceeded("decode-1", {"launches_per_layer": 8.0}, allowed) == [
        "decode-1: spill_bytes attention was not found: a kernel that is gone or has another name? "
        "If so, run with --update"
    ]


@pytest.mark.parametrize("update", [[], ["--update"]])
def test_output_without_kernels_fails(
    update: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_silently(command: list[str], **options) -> subprocess.CompletedProcess[str]:
        Path(command[-1]).write_text(json.dumps({"launches_per_layer": 1, "list": []}))
        return subprocess.CompletedProcess(command, 0, stdout="ptxas info    : 0 bytes gmem\n")

    monkeypatch.setattr(gate.subprocess, "run", compile_silently)
    monkeypatch.setattr(limits, "_FILE", tmp_path / "limits.json")
    monkeypatch.setattr(sys, "argv", ["gpu_gate", "decode-1", *update])
    with pytest.raises(SystemExit, match="gpu-gate: decode-1: ptxas named no kernel, so no spill was checked"):
        gate.main()
    assert not (tmp_path / "limits.json").exists()


@pytest.mark.parametrize(
    ("more", "two"),
    [
        ("decode-8-eight", "decode-8-two"),
        ("decode-8-two-by-four", "decode-8-two"),
        ("prefill-2048-four", "prefill-2048-two"),
    ],
)
def test_layer_on_more_gpus_launches_and_sends_what_it_does_on_two(more: str, two: str) -> None:
    table = limits.read()
    for key in ("launches_per_layer", "collectives_per_layer"):
        assert table[more][key] == table[two][key]
    assert set(table[more]) == set(table[two]), "the same kernels"


@pytest.mark.parametrize("name", limits.NAMES)
def test_every_program_has_its_limits(name: str) -> None:
    figures = set(limits.read()[name])
    kernels = {key for key in figures if key.startswith(limits.SPILLS)}
    counted = {f"{what}_{where}" for what in ("launches", "collectives") for where in ("per_layer", "outside")}
    assert figures - kernels == {*counted, "temporary_bytes"}
    few_rows = name == "decode-1" or name.startswith(("decode-8", "draw-8"))
    parts = "attention", "experts" if few_rows else "grouped"
    if name.startswith("train"):
        parts = "attention_gradients", "grouped_down", "grouped_transposed"
    if name.startswith("full"):  # XLA multiplies the masters
        parts = ("attention_gradients",)
    assert all(any(part in kernel for kernel in kernels) for part in parts), "the most expensive kernels are checked"


def test_written_limits_are_read_back(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_FILE", tmp_path / "limits.json")
    assert limits.read() == {}
    limits.write({"decode-1": {"spill_bytes": 0}})
    assert limits.read() == {"decode-1": {"spill_bytes": 0}}
    assert json.loads((tmp_path / "limits.json").read_text())
