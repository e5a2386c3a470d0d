"""The gate's own judgement, without a compiler for GPUs: what it reads, and what it refuses."""

import json

import pytest

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


def test_figure_above_its_limit_is_named() -> None:
    found = {"launches_per_layer": 8.0, "spill_bytes": 4.0, "temporary_bytes": 100.0}
    assert limits.exceeded("decode-1", found, {"launches_per_layer": 8, "spill_bytes": 0, "temporary_bytes": 100}) == [
        "decode-1: spill_bytes is 4, the limit is 0"
    ]
    assert limits.exceeded("decode-1", {"spill_bytes": 0.0}, {}) == [
        "decode-1: spill_bytes is 0, and has no limit: run with --update"
    ]


@pytest.mark.parametrize("name", limits.NAMES)
def test_every_program_has_its_limits(name: str) -> None:
    assert set(limits.read()[name]) == {"launches_per_layer", "launches_outside", "spill_bytes", "temporary_bytes"}


def test_written_limits_are_read_back(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_FILE", tmp_path / "limits.json")
    assert limits.read() == {}
    limits.write({"decode-1": {"spill_bytes": 0}})
    assert limits.read() == {"decode-1": {"spill_bytes": 0}}
    assert json.loads((tmp_path / "limits.json").read_text())
