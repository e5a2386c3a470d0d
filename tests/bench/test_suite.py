"""Rows: what they say of the tiny model, and what happens to those that cannot be."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from gptoss_jax.bench import split, stand_ins, steps, suite, timing
from gptoss_jax.bench.plan import Plan
from gptoss_jax.bench.report import Row
from gptoss_jax.bench.roofline import Ceilings, decode_work
from gptoss_jax.bench.weights import random_model
from gptoss_jax.errors import BenchError, DoesNotFit
from gptoss_jax.model.transformer import Transformer, abstract, fill, leaves
from gptoss_jax.plan.collectives import step_collectives
from gptoss_jax.sharding import make_mesh
from tests.tiny import TINY

RATES = Ceilings(read_bytes_per_s=1e9, dense_flops_per_s=1e9)
NOTHING = Plan(batches=(), contexts=(), prompts=())
SMALL = dataclasses.replace(TINY, num_layers=2, layer_kinds=TINY.layer_kinds[:2])


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(SMALL)


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_PATIENCE_SECONDS", 0.0)


def rows(model: Transformer, **plan) -> list[Row | DoesNotFit]:
    return list(suite.measure(model, "small", RATES, dataclasses.replace(NOTHING, **plan)))


def test_decode_rows(model: Transformer) -> None:
    first, second = rows(model, batches=(1, 3), contexts=(70,), steps=4)
    assert isinstance(first, Row)
    assert isinstance(second, Row)
    assert (first.model, first.phase, first.batch, first.context) == ("small", "decode", 1, 70)
    assert first.ms > 0
    assert second.tokens_per_s == pytest.approx(3e3 / second.ms)
    work = decode_work(SMALL, batch=3, context=71.5)
    assert second.floor_ms == RATES.floor_ms(work)
    assert second.roofline_fraction == pytest.approx(second.floor_ms / second.ms)
    assert (second.bytes, second.flops) == (work.bytes, work.flops)
    assert first.distinct_tokens == 1
    assert first.peak_bytes is None, "a CPU keeps no count"
    assert first.launches is None, "a CPU launches nothing"


def test_prefill_row_goes_through_generate(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = []

    def generate(model, given, *arguments, **options):
        prompts.append((len(given[0]), options["max_new_tokens"]))

    monkeypatch.setattr(steps, "generate", generate)
    (row,) = rows(model, prompts=(40,))
    assert isinstance(row, Row)
    assert (row.phase, row.batch, row.context) == ("prefill", 1, 40)
    assert set(prompts) == {(40, 1)}


def test_prompt_is_really_read(model: Transformer) -> None:
    (row,) = rows(model, prompts=(20,))
    assert isinstance(row, Row)
    assert row.tokens_per_s == pytest.approx(20e3 / row.ms)


def test_kernel_rows(model: Transformer) -> None:
    found = rows(model, kernel_tokens=(3,), batches=(2,), contexts=(9,), steps=2)
    assert [row.kernel for row in found if isinstance(row, Row)] == [
        "experts",
        "full_attention",
        "sliding_attention",
        None,
    ]
    assert {row.phase for row in found[:3] if isinstance(row, Row)} == {"kernel"}


def test_rows_without_sums_over_devices_say_their_share() -> None:
    split_model = random_model(dataclasses.replace(SMALL, vocab_size=132), mesh=make_mesh(expert=2))
    found = rows(split_model, batches=(2,), contexts=(9,), prompts=(20,), steps=2, collectives=True)
    assert [row.left_out for row in found if isinstance(row, Row)] == [
        *(None, "collectives"),
        *(None, "generate", "collectives"),
    ]
    decoding, prefilling = split.shares([row for row in found if isinstance(row, Row)])
    assert decoding.startswith("sums over devices, decode, batch 2, context 9: ")
    assert prefilling.startswith("sums over devices, prefill, batch 1, context 20: ")


def test_batches_that_do_not_divide_over_the_mesh_are_left_out() -> None:
    split_model = random_model(dataclasses.replace(SMALL, vocab_size=132), mesh=make_mesh(data=2, expert=2))
    found = rows(split_model, batches=(1, 2), contexts=(9,), prompts=(20,), steps=2, collectives=True)
    assert [str(row) for row in found if isinstance(row, DoesNotFit)] == [
        "1 rows do not divide: data = 2: leave this batch out"
    ]
    assert [(row.phase, row.batch, row.left_out) for row in found if isinstance(row, Row)] == [
        *(("decode", 2, left_out) for left_out in (None, "collectives")),
        *(("prefill", 1, left_out) for left_out in (None, "generate", "collectives")),
    ]


def test_each_device_alone_goes_on_with_its_own_part() -> None:
    split_model = random_model(dataclasses.replace(SMALL, vocab_size=132), mesh=make_mesh(expert=2))
    with stand_ins.alone(split_model) as variant:
        alone = _sums(variant)
    assert (_sums(split_model), alone) == (2 * SMALL.num_layers + 1, 0)


def _sums(model: Transformer) -> int:
    program = split.lowered_decode(model, batch=2, context=9, steps=2).compile().as_text() or ""
    return sum(each.count for each in step_collectives(program, SMALL.num_layers) if each.kind == "all-reduce")


def test_context_at_the_end_of_the_models_leaves_room_for_the_steps() -> None:
    short = random_model(dataclasses.replace(SMALL, max_context=64))
    (row,) = rows(short, batches=(1,), contexts=(64,), steps=8)
    assert isinstance(row, Row)
    assert row.context == 64


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"contexts": (131073,)}, "131073 is out of range: --context: choose 1 to 131072"),
        ({"prompts": (4, 131073)}, "131073 is out of range: --prefill: "),
        ({"steps": 257}, "257 is out of range: --steps: choose 1 to 256"),
        ({"steps": 0}, "0 is out of range: --steps: "),
    ],
)
def test_impossible_plan_is_refused(model: Transformer, plan: dict, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        rows(model, **plan)


def test_row_that_does_not_fit_is_left_out(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_free_bytes", lambda: 10_000)
    left_out, row = rows(model, batches=(2,), contexts=(500,), prompts=(5,))
    assert isinstance(left_out, DoesNotFit)
    assert "10000" not in str(left_out)
    assert str(left_out).endswith("0.0 GB are free: batch 2 at a context of 564: leave this row out")
    assert isinstance(row, Row), "the others are measured"


def test_cache_on_a_mesh_needs_a_devices_share(monkeypatch: pytest.MonkeyPatch) -> None:
    split_model = random_model(dataclasses.replace(SMALL, vocab_size=132), mesh=make_mesh(expert=2))
    whole = steps.random_cache(split_model, batch=2, room=504, seed=0).nbytes
    monkeypatch.setattr(steps, "_free_bytes", lambda: whole * 0.6)
    (row,) = rows(split_model, batches=(2,), contexts=(500,), steps=4)
    assert isinstance(row, Row)
    monkeypatch.setattr(steps, "_free_bytes", lambda: whole * 0.4)
    (left_out,) = rows(split_model, batches=(2,), contexts=(500,), steps=4)
    assert isinstance(left_out, DoesNotFit)


def test_device_that_runs_out_of_memory_costs_the_row(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore")

    monkeypatch.setattr(suite, "prefill_row", fail)
    (left_out,) = rows(model, prompts=(5,))
    assert str(left_out).startswith(
        "out of memory (RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.)"
    )


def test_decoding_that_gives_no_numbers_is_an_error() -> None:
    arrays = {
        path: jax.device_put(np.full(leaf.shape, 0 if leaf.dtype == np.uint8 else np.nan, leaf.dtype), leaf.sharding)
        for path, leaf in leaves(abstract(SMALL)).items()
    }
    with pytest.raises(BenchError, match="0% of them with a log-probability"):
        rows(fill(abstract(SMALL), arrays), batches=(1,), contexts=(8,), steps=2)


def test_times_leave_out_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = itertools.accumulate([0.0, 9.0, 5.0, 1.0, 2.0, 3.0])
    clock = iter([0.0, *(tick for pair in itertools.pairwise(ends) for tick in pair), 20.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(timing, "_PATIENCE_SECONDS", -1.0)
    times = timing.measure(lambda _: None)
    assert (times.median, times.first) == (2000, 9000)
    assert times.spread == pytest.approx(1600)
    assert (times / 2).median == 1000
