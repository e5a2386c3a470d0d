"""The floors: against figures worked out elsewhere, and against counting one by one."""

import dataclasses

import pytest

from gptoss_jax.bench.roofline import (
    Ceilings,
    Work,
    attention_work,
    decode_work,
    experts_touched,
    experts_work,
    prefill_work,
)
from gptoss_jax.config import gpt_oss_20b, gpt_oss_120b
from tests.tiny import TINY

H200 = Ceilings(read_bytes_per_s=4.3e12, dense_flops_per_s=770e12)


@pytest.mark.parametrize(
    ("config", "batch", "milliseconds"),
    [
        (gpt_oss_20b(), 1, 0.86),
        (gpt_oss_20b(), 8, 2.1),
        (gpt_oss_20b(), 32, 2.9),
        (gpt_oss_120b(), 1, 1.16),
        (gpt_oss_120b(), 8, 3.9),
        (gpt_oss_120b(), 32, 9.7),
    ],
)
def test_decode_floor_of_the_published_models(config, batch: int, milliseconds: float) -> None:
    assert H200.floor_ms(decode_work(config, batch=batch, context=0)) == pytest.approx(milliseconds, rel=0.02)


@pytest.mark.parametrize(
    ("config", "num_tokens", "milliseconds"),
    [(gpt_oss_20b(), 2048, 17), (gpt_oss_20b(), 8192, 73), (gpt_oss_120b(), 2048, 25), (gpt_oss_120b(), 8192, 110)],
)
def test_prefill_floor_of_the_published_models(config, num_tokens: int, milliseconds: float) -> None:
    assert H200.floor_ms(prefill_work(config, num_tokens=num_tokens)) == pytest.approx(milliseconds, rel=0.02)


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
@pytest.mark.parametrize(("held", "num_new"), [(0, 1), (0, 5), (3, 1), (3, 9), (6, 2), (0, 30), (20, 4)])
def test_attention_counts_every_visible_key(kind, held: int, num_new: int) -> None:
    window = TINY.sliding_window if kind == "sliding_attention" else 1000
    seen = [set(range(max(0, query - window + 1), query + 1)) for query in range(held, held + num_new)]
    work = attention_work(TINY, kind, num_rows=3, held=held, num_new=num_new)
    assert work.flops == 3 * sum(map(len, seen)) * 4 * TINY.num_heads * TINY.head_dim
    assert work.bytes == 3 * len(set.union(*seen)) * 2 * 2 * TINY.num_kv_heads * TINY.head_dim


def test_all_experts_of_a_layer_are_all_its_bytes() -> None:
    work = experts_work(TINY, "down", num_tokens=7, num_touched=TINY.num_experts)
    values = TINY.num_experts * TINY.hidden_size * TINY.intermediate_size
    assert work.bytes == values / 2 + values / 32 + TINY.num_experts * TINY.hidden_size * 2
    assert work.flops == 2 * 7 * TINY.experts_per_token * TINY.hidden_size * TINY.intermediate_size


def test_touched_experts() -> None:
    assert experts_touched(TINY, 1) == TINY.experts_per_token
    assert experts_touched(TINY, 1000) == pytest.approx(TINY.num_experts)


def test_floor_is_the_slower_of_the_two() -> None:
    rates = Ceilings(read_bytes_per_s=100, dense_flops_per_s=1000)
    assert rates.floor_ms(Work(bytes=50, flops=100)) == 500
    assert rates.floor_ms(Work(bytes=50, flops=2000)) == 2000


def test_another_layer_is_more_work() -> None:
    deeper = dataclasses.replace(TINY, num_layers=5, layer_kinds=(*TINY.layer_kinds, "full_attention"))
    shallow_work, deep_work = (decode_work(config, batch=2, context=9) for config in (TINY, deeper))
    assert deep_work.bytes > shallow_work.bytes
    assert deep_work.flops > shallow_work.flops
