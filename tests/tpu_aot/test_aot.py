"""The table's own rules, and what its programs send between devices; `make aot` compiles them."""

import re

import pytest

from tests.tpu_aot import table
from tests.tpu_aot.__main__ import NAMES
from tests.tpu_aot.programs import AXES, MODELS, OTHER_AXES, collectives

LABELS = [*NAMES, *(f"{name}-2" for name in NAMES)]
HLO = """
  %psum.1 = bf16[8,1,2880]{2,0,1:T(8,128)(2,1)S(1)} all-reduce(%fusion.5), channel_id=1, to_apply=%region_1.2
  %all-reduce.2 = (f32[8,2880]{1,0}, f32[]) all-reduce-start(%fusion.6, %fusion.7), channel_id=2
  %done.2 = (f32[8,2880]{1,0}, f32[]) all-reduce-done(%all-reduce.2)
  %psum.3 = bf16[8,1,2880]{2,0,1:T(8,128)(2,1)S(1)} all-reduce(%fusion.8), channel_id=1, to_apply=%region_1.2
"""


def num_layers(label: str) -> int:
    return 2 if label.endswith("-2") else MODELS[label.split("-")[0]]().num_layers


@pytest.mark.parametrize("label", LABELS)
def test_every_program_runs_our_kernels_in_every_layer_and_fits(label):
    row, layers = table.read()[label], num_layers(label)
    product = "experts_down_and_sum" if "decode" in label else "experts_down"
    assert row["kernels"] == {"attention": layers, "experts_gate_up": layers, product: layers}
    memory = row["argument_bytes"] + row["temporary_bytes"]
    assert memory < table.MEMORY_GIB[row["topology"].split(":")[0]] * 2**30


@pytest.mark.parametrize("label", LABELS)
def test_a_layer_has_a_sum_over_its_heads_and_one_over_its_experts(label):
    found, layers = dict(table.read()[label]["collectives"]), num_layers(label)
    splits = next((axes for name, axes in OTHER_AXES.items() if name in label), AXES[label.split("-")[0]])
    sums = sum(count for name, count in found.items() if name.startswith("all-reduce") and "2880]" in name)
    assert sums == 2 * layers + 1, "one is the embedding's"
    rest = {name: count for name, count in found.items() if "2880]" not in name}
    gathered = {name for name in rest if re.fullmatch(r"all-gather s32\[(\d+,)+5\]", name)}
    assert len(gathered) == ("decode" in label), "what each device found in its part of the vocabulary"
    assert "data" in splits or rest.keys() == gathered, "the loop asks whether a row goes on, all get the tokens"


def test_collectives_are_read_from_the_programs_text():
    assert collectives(HLO) == {"all-reduce bf16[8,1,2880]": 2, "all-reduce-start f32[8,2880]+f32[]": 1}


def test_what_is_above_the_table_is_named():
    known = {"argument_bytes": 10, "temporary_bytes": 2000, "kernels": {"attention": 2}, "collectives": {}}
    assert table.exceeded("step", known, {"step": known}) == []
    assert table.exceeded("step", known | {"temporary_bytes": 3000}, {"step": known}) == [
        "step: temporary_bytes is 3,000, the table has 2,000"
    ]
    assert table.exceeded("step", known | {"kernels": {}}, {"step": known}) == [
        "step: kernels are {}, the table has {'attention': 2}"
    ]
    assert table.exceeded("step", known | {"collectives": {"all-gather f32[8]": 1}}, {"step": known}) == [
        "step: collectives are {'all-gather f32[8]': 1}, the table has {}"
    ]
    assert table.exceeded("other", known, {"step": known}) == ["other: is not in the table: run with --update"]
