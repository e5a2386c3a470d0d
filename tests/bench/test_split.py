"""--split: each stage can be left out, takes its own work with it and no other's, and the table adds up."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from flax import nnx

from gptoss_jax.bench import split, timing
from gptoss_jax.bench.report import Row
from gptoss_jax.bench.roofline import STAGES, Ceilings, Part, Stage, Work, decode_work, prefill_work, stages
from gptoss_jax.bench.stand_ins import without
from gptoss_jax.bench.steps import lowered_decode
from gptoss_jax.bench.timing import Times
from gptoss_jax.bench.weights import random_model
from gptoss_jax.config import gpt_oss_20b
from gptoss_jax.model.transformer import Transformer
from pallas_kernels import attention, experts, projections
from tests.tiny import TINY

RATES = Ceilings(read_bytes_per_s=1e9, dense_flops_per_s=1e9)
SMALL = dataclasses.replace(TINY, num_layers=1, layer_kinds=TINY.layer_kinds[:1])
READ: dict[Stage, str] = {  # a parameter that it alone reads, as the compiled program shows it
    "qkv": "bf16[6,8,96]",
    "attention": "f32[6]{0}",
    "output": "bf16[96,6,8]",
    "router": "f32[10]{0}",
    "experts": "u8[10,128,3,16]",
    "unembedding": "bf16[130,96]",  # the embedding's type too
}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(SMALL)


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(timing, "_PATIENCE_SECONDS", 0.0)
    return


def test_nothing_stays_replaced(model: Transformer) -> None:
    tables = (attention.BACKENDS, experts.BACKENDS, *projections.BACKENDS.values())
    before = [dict(table) for table in tables]
    leaves = jax.tree.leaves(model)
    with without(model, STAGES) as variant:
        assert not any(table == old for table, old in zip(tables, before, strict=True))
        assert all(one is two for one, two in zip(jax.tree.leaves(variant), leaves, strict=True))
        assert nnx.graphdef(variant) != nnx.graphdef(model)
    assert [dict(table) for table in tables] == before
    assert not hasattr(model, "left_out")
    with pytest.raises(ZeroDivisionError), without(model, STAGES):
        _ = 1 / 0
    assert [dict(table) for table in tables] == before


def test_router_left_out_spreads_tokens_over_distinct_experts() -> None:
    with without(random_model(SMALL), ["router"]):
        route = projections.BACKENDS["route"]["cpu"]
        x = jax.numpy.ones((512, 96))
        normed, ids, shares = route(x, x[0], x[:10], x[:10, 0], eps=1e-5, experts_per_token=5)
    assert normed is x
    assert all(len(set(row)) == 5 for row in np.asarray(ids).tolist())
    assert np.bincount(np.asarray(ids).ravel(), minlength=10).min() > 200
    assert shares.sum(axis=1) == pytest.approx(1)


def test_stages_make_up_the_whole_work() -> None:
    config = gpt_oss_20b()
    for work in (
        lambda without: decode_work(config, batch=8, context=1024, without=without),
        lambda without: prefill_work(config, num_tokens=2048, without=without),
    ):
        parts = [work(()) - work((stage,)) for stage in STAGES]
        total = sum(parts, start=work(STAGES))
        assert all(part.bytes > 0 and part.flops >= 0 for part in parts)
        assert (total.bytes, total.flops) == (pytest.approx(work(()).bytes), pytest.approx(work(()).flops))
    assert decode_work(config, batch=3, context=9, without=STAGES) == Work(3 * 2 * 2880, 0)


def rows(phase, times: dict[str | None, float], launches: dict[str | None, int | None]) -> list[Row]:
    work = Work(4e6, 0)
    return [
        Row.of(
            "small", phase, work if part is None else work - Work(1e5, 0), RATES, Times(ms, 0.0, 0.0),
            batch=1, context=8, num_tokens=1, left_out=part, launches=launches.get(part),
        )
        for part, ms in times.items()
    ]  # fmt: skip


def test_table_adds_up() -> None:
    times = {None: 1.0, **dict.fromkeys(STAGES, 0.9), "experts": 0.7, "everything": 0.15}
    launches = {None: 50, **dict.fromkeys(STAGES, 45), "everything": 12}
    head, *lines = split.table(rows("decode", times, launches), RATES)
    names = ["whole", "generate", *STAGES, "sum", "rest", "differs"]
    assert head.split()[-len(names) :] == names
    assert [line.split()[-len(names) - 1 :] for line in lines] == [
        ["us", "1000", "-", "100", "100", "100", "100", "300", "100", "800", "150", "50"],
        ["floor", "4000", "-", "100", "100", "100", "100", "100", "100", "600", "3900", "-"],
        ["launches", "50", "-", "5", "5", "5", "5", "5", "5", "30", "12", "8"],
    ]
    assert lines[0].split()[:3] == ["decode", "1", "8"]


def test_table_of_a_prefill_has_what_generate_adds() -> None:
    times = {None: 3.0, "generate": 2.0, **dict.fromkeys(STAGES, 1.9), "everything": 1.4}
    _, line, _ = split.table(rows("prefill", times, {}), RATES)
    assert line.split()[:4] == ["prefill", "1", "8", "us"]
    assert [int(cell) for cell in line.split()[4:]] == [3000, 1000, *[100] * 6, 1600, 1400, 0]


def test_row_without_its_variants_is_in_no_table() -> None:
    assert len(split.table(rows("decode", {None: 1.0}, {}), RATES)) == 1


def reads(model: Transformer) -> dict[str, int]:
    """How often the loops of the compiled program take each stage's parameter out of what they carry."""
    text = lowered_decode(model, batch=2, context=20, steps=4).compile().as_text() or ""
    taken = [line for line in text.splitlines() if " get-tuple-element(" in line]
    return {stage: sum(f" = {matrix}" in line for line in taken) for stage, matrix in READ.items()}


@pytest.fixture(scope="module")
def reads_of_whole(model: Transformer) -> dict[str, int]:
    return reads(model)


@pytest.mark.slow
@pytest.mark.parametrize("part", [*STAGES, "everything"])
def test_compiler_drops_no_other_stage(model: Transformer, reads_of_whole: dict[str, int], part: Part) -> None:
    assert min(reads_of_whole.values()) > 0
    with without(model, stages(part)) as variant:
        found = reads(variant)
    assert [stage for stage in STAGES if found[stage] < reads_of_whole[stage]] == list(stages(part))
    assert sum(found[stage] for stage in stages(part)) == ("unembedding" in stages(part)), "but for the embedding"


@pytest.mark.slow
@pytest.mark.usefixtures("once")
def test_rows_of_every_stage(model: Transformer) -> None:
    decoding = split.decode_rows(model, "small", RATES, batch=3, context=20, steps=2, parts=split.PARTS)
    assert [row.left_out for row in decoding] == [None, *STAGES, "everything"]
    assert all(row.ms > 0 for row in decoding)
    assert all(row.distinct_tokens and row.distinct_tokens > 1 for row in decoding)
    assert len(split.table(decoding, RATES)) == 1 + 2
    split.compile_ahead(model, [], [40], steps=2, parts=["experts"])
    prefilling = split.prefill_rows(model, "small", RATES, num_tokens=40, parts=["experts"])
    assert [row.left_out for row in prefilling] == [None, "generate", "experts"]
    assert max(row.compile_s or 0 for row in prefilling[1:]) < 0.5, "they were compiled ahead"


@pytest.mark.slow
@pytest.mark.usefixtures("once")
def test_chunks_of_one_length_share_a_program(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered: list[int] = []
    lower = split.prefill.lower
    monkeypatch.setattr("gptoss_jax.bench.steps.prefill_chunk", lambda *_: 32)
    monkeypatch.setattr(split.prefill, "lower", lambda *passed: lowered.append(passed[2].shape[1]) or lower(*passed))
    split.prefill_rows(model, "small", RATES, num_tokens=72, parts=[])
    assert sorted(lowered) == [16, 32], "of 32, 32 and 16 with padding"
