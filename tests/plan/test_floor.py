"""Floors on a mesh: every stage's work is divided over the axes that share it, and over no others."""

import pytest

from gptoss_jax.bench.roofline import STAGES, Work, decode_work, prefill_work
from gptoss_jax.config import gpt_oss_120b
from gptoss_jax.plan.floor import decode_floor, prefill_floor
from gptoss_jax.sharding import make_mesh

CONFIG = gpt_oss_120b()
SHARED = {"attention": 1, "qkv": 1, "output": 1, "router": 0, "experts": 2, "unembedding": 2}


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
def test_stages_are_divided_over_the_axes_that_share_them(axes: dict[str, int]) -> None:
    mesh = make_mesh(**axes)
    whole = decode_work(CONFIG, batch=8, context=1000)
    expected = decode_work(CONFIG, batch=8, context=1000, without=STAGES)
    for stage in STAGES:
        alone = whole - decode_work(CONFIG, batch=8, context=1000, without=(stage,))
        expected += alone / (1, mesh.shape["tensor"], mesh.size)[SHARED[stage]]
    _same(decode_floor(CONFIG, mesh, batch=8, context=1000), expected)
