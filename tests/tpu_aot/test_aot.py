"""Two programs compiled for TPUs, where libtpu is installed, and the table's own rules; `make aot` compiles all."""

import importlib.util
import subprocess
import sys

import pytest

from tests.tpu_aot import table
from tests.tpu_aot.__main__ import NAMES

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no compiler for TPUs: install the extra `tpu` (or `make aot`)"
)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["20b-v5e-decode", "120b-v6e-prefill"])
def test_two_layers_compile_with_our_kernels_and_no_more_memory_than_the_table_says(name):
    # In a process of its own: libtpu stays in memory, and shapes stand where annotations ask for arrays.
    command = [sys.executable, "-m", "tests.tpu_aot", name, "--layers", "2"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_program_is_in_the_table_with_two_layers(name):
    figures = table.read()[f"{name}-2"]
    product = "experts_down_and_sum" if name.endswith("decode") else "experts_down"
    assert figures["kernels"] == {"attention": 2, "experts_gate_up": 2, product: 2}


def test_what_is_above_the_table_is_named():
    known = {"argument_bytes": 10, "temporary_bytes": 2000, "kernels": {"attention": 2}}
    assert table.exceeded("step", known, {"step": known}) == []
    assert table.exceeded("step", known | {"temporary_bytes": 3000}, {"step": known}) == [
        "step: temporary_bytes is 3,000, the table has 2,000"
    ]
    assert table.exceeded("step", known | {"kernels": {}}, {"step": known}) == [
        "step: kernels are {}, the table has {'attention': 2}"
    ]
    assert table.exceeded("other", known, {"step": known}) == ["other: is not in the table: run with --update"]
