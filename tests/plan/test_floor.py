"""Floors on a mesh: every stage's work is divided over the axes that share it, and over no others."""

import dataclasses

import pytest

from gptoss_jax.bench.roofline import STAGES, Work, decode_work, prefill_work
from gptoss_jax.config import gpt_oss_120b
from gptoss_jax.plan.floor import decode_floor, prefill_floor
from gptoss_jax.sharding import make_mesh

CONFIG = gpt_oss_120b()
HEADS, EVERY = ("qkv", "attention", "output"), ("experts", "unembedding")


def _same(found: Work, expected: Work) -> None:
    assert found.bytes == pytest.approx(expected.bytes)
    assert found.flops == pytest.approx(expected.flops)


def test_one_device_does_all_of_it() -> None:
    _same(decode_floor(CONFIG, make_mesh(), batch=4, context=100), decode_work(CONFIG, batch=4, context=100))
    _same(prefill_floor(CONFIG, make_mesh(), batch=4, num_tokens=64), prefill_work(CONFIG, num_tokens=64, num_rows=4))


def test_rows_are_divided_over_data_but_weights_are_not() -> None:
    half = decode_floor(CONFIG, make_mesh(data=2), batch=8, context=100)
    _same(half, decode_work(CONFIG, batch=4, context=100))


@pytest.mark.parametrize("axes", [{"expert": 4}, {"tensor": 4}, {"expert": 2, "tensor": 4}])
@pytest.mark.parametrize("num_kv_heads", [8, 4])
def test_stages_are_divided_over_the_axes_that_share_them(axes: dict[str, int], num_kv_heads: int) -> None:
    config, mesh = dataclasses.replace(CONFIG, num_kv_heads=num_kv_heads), make_mesh(**axes)
    whole = decode_work(config, batch=8, context=1000)
    expected = decode_work(config, batch=8, context=1000, without=STAGES)
    for stage in STAGES:
        alone = whole - decode_work(config, batch=8, context=1000, without=(stage,))
        enough = num_kv_heads % mesh.size == 0  # heads for every device
        over_heads = mesh.size if enough else mesh.shape["tensor"]
        expected += alone / (over_heads if stage in HEADS else mesh.size if stage in EVERY else 1)
    _same(decode_floor(config, mesh, batch=8, context=1000), expected)
