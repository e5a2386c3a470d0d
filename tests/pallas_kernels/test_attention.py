"""One suite for every backend of attention over pages, against a direct computation in NumPy float64.

Hopper's kernels run in Pallas's interpreter here, which does not know inline PTX. Of decode it runs which pages each
warpgroup takes, with one block for all pages of a row (splits=1) and plain JAX for loads, products and merges; of
prefill all but the products, which are plain JAX too. tests/gpu runs what is left out.

The TPU kernel runs as it is in Pallas's TPU interpreter, two pages a step, memory that nothing wrote being NaN.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import attention, hopper, hopper_decode, hopper_prefill, tpu
from pallas_kernels.dispatch import Unsupported

H, SLOTS = 64, 64


@dataclasses.dataclass(frozen=True)
class Backend:
    run: Callable
    dtype: type
    tolerance: float
    """Of the norm of the error, relative to the answer's."""


def on_tpu(queries, keys, values, *rest):
    wider = ((0, 0),) * 3 + ((0, tpu.pool_width(H) - H),)
    pools = (jnp.pad(pool, wider) for pool in (keys, values))
    interpret = pltpu.InterpretParams(uninitialized_memory="nan")
    return tpu.attention(queries, *pools, *rest, step_pages=2, interpret=interpret)


BACKENDS = {
    "reference": Backend(jax.jit(functools.partial(attention, impl="reference")), jnp.float32, 1e-6),
    "hopper": Backend(jax.jit(functools.partial(hopper.attention, interpret=True)), jnp.bfloat16, 3e-3),
    "tpu": Backend(jax.jit(on_tpu), jnp.bfloat16, 3e-3),
}
every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())


def build(seed: int, first, last, *, pages: int | None = None, N: int = 8, K: int = 1, sink: float = 1.0):
    """Rows whose pages are scattered over a pool that holds NaN wherever no query may look."""
    random = np.random.default_rng(seed)
    first, last = np.asarray(first), np.asarray(last)
    batch, pages = first.shape[0], pages or int(last.max()) // SLOTS + 1
    pool = batch * pages + 3
    table = random.permutation(pool)[: batch * pages].reshape(batch, pages)
    seen = np.zeros((pool, SLOTS), bool)
    for row in range(batch):
        for low, high in zip(first[row], last[row], strict=True):
            slot = np.arange(low, high + 1)
            seen[table[row, slot // SLOTS], slot % SLOTS] = True
    keys, values = random.normal(size=(2, pool, K, SLOTS, H))
    for array in (keys, values):
        array[~np.broadcast_to(seen[:, None], array.shape[:3])] = np.nan
    queries, sinks = random.normal(size=(*first.shape, N, H)) * 2, random.normal(size=N) * sink
    return queries, keys, values, table, first, last, sinks


def random_ranges(seed: int, batch: int, num_queries: int, pages: int):
    random = np.random.default_rng(seed)
    last = random.integers(0, pages * SLOTS, (batch, num_queries))
    return np.maximum(last - random.integers(0, pages * SLOTS, last.shape), 0), last


def causal(start: int, num_queries: int, window: int):
    last = start + np.arange(num_queries)[None]
    return np.maximum(last - window + 1, 0), last


def rounded(array, dtype) -> np.ndarray:
    return np.asarray(jnp.array(array, dtype), np.float64)


def expected(queries, keys, values, table, first, last, sinks) -> np.ndarray:
    out = np.zeros_like(queries)
    group = queries.shape[2] // keys.shape[1]
    for row, token, head in np.ndindex(queries.shape[:3]):
        low, high = first[row, token], last[row, token]
        if high < low:
            continue
        slot = np.arange(low, high + 1)
        page, offset = table[row, slot // keys.shape[2]], slot % keys.shape[2]
        own = head // group
        scores = keys[page, own, offset] @ queries[row, token, head] / np.sqrt(queries.shape[-1])
        weights = np.exp(np.append(scores, sinks[head]) - max(scores.max(), sinks[head]))
        out[row, token, head] = (weights / weights.sum())[:-1] @ values[page, own, offset]
    return out


def run(case, backend: Backend) -> np.ndarray:
    queries, keys, values, table, first, last, sinks = case
    return np.asarray(
        backend.run(
            *(jnp.array(array, backend.dtype) for array in (queries, keys, values)),
            *(jnp.array(array, jnp.int32) for array in (table, first, last)),
            jnp.array(sinks, backend.dtype),
        ),
        np.float64,
    )


def assert_right(case, backend: Backend, tokens: slice | np.ndarray = slice(None)) -> np.ndarray:
    """All that the backend gives is finite, and what it gives for these tokens of each row is right."""
    queries, keys, values, table, first, last, sinks = case
    queries, keys, values, sinks = (rounded(array, backend.dtype) for array in (queries, keys, values, sinks))
    answers = run(case, backend)
    assert np.isfinite(answers).all()
    truth = expected(queries[:, tokens], keys, values, table, first[:, tokens], last[:, tokens], sinks)
    found = answers[:, tokens]
    assert np.linalg.norm(found - truth) <= backend.tolerance * np.linalg.norm(truth)
    # And no row is lost among many right ones.
    row_error = np.linalg.norm(found - truth, axis=-1)
    assert (row_error <= 4 * backend.tolerance * np.maximum(np.linalg.norm(truth, axis=-1), 0.1)).all()
    return answers


@every_backend
@pytest.mark.parametrize(
    ("batch", "num_queries", "pages", "heads"),
    [
        (1, 1, 1, (8, 1)),
        (3, 1, 14, (16, 2)),
        (2, 5, 3, (3, 1)),
        (2, 17, 3, (8, 2)),
        (1, 64, 2, (2, 2)),
    ],
    ids=["one token", "decode", "five tokens, 3 heads", "17 tokens, groups of 4", "64 tokens, groups of 1"],
)
def test_random_ranges(batch, num_queries, pages, heads, backend):
    first, last = random_ranges(7, batch, num_queries, pages)
    assert_right(build(7, first, last, pages=pages, N=heads[0], K=heads[1]), backend)


@every_backend
def test_one_token_at_every_page_boundary(backend):
    last = np.array([0, 1, 62, 63, 64, 65, 126, 127, 128, 129, 191, 192])[:, None]
    for window in (1 << 30, 128, 1):
        assert_right(build(window % 97, np.maximum(last - window + 1, 0), last), backend)


@every_backend
@pytest.mark.parametrize(("start", "window"), [(0, 7), (52, 64), (100, 128), (231, 1 << 30)])
def test_chunk_of_a_context(start, window, backend):
    assert_right(build(start, *causal(start, 25, window), pages=4), backend)


@every_backend
@pytest.mark.parametrize("num_queries", [1, 4, 9])
def test_a_query_that_sees_nothing_gives_zeros(num_queries, backend):
    first, last = random_ranges(1, 2, num_queries, 2)
    last[:, ::2] = -1
    last[1] = -1
    case = build(1, first, last, pages=2)
    found = assert_right(case, backend) if num_queries > 1 else run(case, backend)
    assert (found[:, ::2] == 0).all()
    assert (found[1] == 0).all()


@every_backend
@pytest.mark.parametrize("num_queries", [1, 9])
@pytest.mark.parametrize("sink", [1e4, -1e4])
def test_sinks_beyond_the_range_of_exp(num_queries, sink, backend):
    case = build(5, *causal(70, num_queries, 60), sink=0.0)
    found = run((*case[:-1], np.full(8, sink)), backend)
    if sink > 0:
        assert (found == 0).all()
    else:
        assert_right((*case[:-1], np.full(8, sink)), backend)


@every_backend
@pytest.mark.parametrize("num_queries", [1, 11])
def test_entries_beyond_the_filled_part_of_a_table_are_never_read(num_queries, backend):
    queries, keys, values, table, first, last, sinks = build(6, *causal(130, num_queries, 1 << 30))
    wide = np.concatenate([table, np.full((1, 20), len(keys) + 7)], axis=1)
    narrow = assert_right((queries, keys, values, table, first, last, sinks), backend)
    found = run((queries, keys, values, wide, first, last, sinks), backend)
    assert np.linalg.norm(found - narrow) <= backend.tolerance * np.linalg.norm(narrow)


@pytest.mark.parametrize("name", ["hopper", "tpu"])
def test_rows_of_different_lengths_in_one_batch(name):
    last = np.array([[3], [500], [64], [1000], [127]])
    assert_right(build(8, np.zeros_like(last), last, N=16, K=2), BACKENDS[name])


def test_a_chunk_of_several_tiles_on_a_tpu():
    assert_right(build(2, *causal(70, 150, 100), N=4, K=2), BACKENDS["tpu"])


@pytest.mark.parametrize(
    ("num_queries", "tuning"),
    [
        (1, hopper_decode.Tuning(splits=1, warpgroups=2, shared=False)),
        (50, hopper_prefill.Tuning(warpgroups=1, blocks=3)),
        (50, hopper_prefill.Tuning(warpgroups=2, pages=1, stages=2, blocks=4)),
    ],
    ids=["pages in registers", "several tiles a block", "a page a step"],
)
def test_other_tunings_of_hopper(num_queries, tuning):
    def attend(queries, *rest):
        form = hopper_decode if num_queries == 1 else hopper_prefill
        grouped = queries.reshape(*queries.shape[:2], 1, *queries.shape[2:])
        *rest, sinks = rest
        attended = form.attention(
            grouped, *rest, sinks.reshape(1, -1), most_pages=rest[2].shape[1], interpret=True, tuning=tuning
        )
        return attended.reshape(queries.shape)

    case = build(3, *causal(140, num_queries, 100))
    assert_right(case, dataclasses.replace(BACKENDS["hopper"], run=jax.jit(attend)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": jnp.float32}, "float32"),
        ({"width": 32}, "width 64, not 32"),
        ({"slots": 16}, "64 slots, not 16"),
        ({"heads": 9}, "not 9 for 1"),
    ],
)
def test_hopper_says_what_it_cannot_take(change, words):
    sizes = {"dtype": jnp.bfloat16, "width": 64, "slots": 64, "heads": 8, **change}
    queries = jnp.zeros((1, 1, sizes["heads"], sizes["width"]), sizes["dtype"])
    pool = jnp.zeros((2, 1, sizes["slots"], sizes["width"]), sizes["dtype"])
    integers = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(Unsupported, match=words):
        attention(queries, pool, pool, integers, integers, integers, jnp.zeros(sizes["heads"]), impl="hopper")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": jnp.float32}, "float32"),
        ({"width": 64}, "width 64 in pools of width 128, not 64"),
        ({"slots": 16}, "64 slots, not 16"),
        ({"heads": 9}, "not 9 for 2"),
    ],
)
def test_tpu_says_what_it_cannot_take(change, words):
    sizes = {"dtype": jnp.bfloat16, "width": 128, "slots": 64, "heads": 8, **change}
    queries = jnp.zeros((1, 1, sizes["heads"], 64), sizes["dtype"])
    pool = jnp.zeros((2, 2, sizes["slots"], sizes["width"]), sizes["dtype"])
    integers = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(Unsupported, match=words):
        attention(queries, pool, pool, integers, integers, integers, jnp.zeros(sizes["heads"]), impl="tpu")


def test_sink_equals_the_log_sum_exp_form():
    queries, keys, values, table, first, last, sinks = build(4, *random_ranges(4, 2, 3, 2), pages=2, N=6, K=2)
    reference = BACKENDS["reference"]
    without = run((queries, keys, values, table, first, last, np.full(6, -1e30)), reference)
    lse = np.zeros((*queries.shape[:2], 6))
    for row, token, head in np.ndindex(lse.shape):
        slot = np.arange(first[row, token], last[row, token] + 1)
        scores = keys[table[row, slot // SLOTS], head // 3, slot % SLOTS] @ queries[row, token, head] / np.sqrt(H)
        lse[row, token, head] = np.log(np.exp(scores - scores.max()).sum()) + scores.max()
    scaled = without / (1 + np.exp(-(lse - sinks)))[..., None]
    found = run((queries, keys, values, table, first, last, sinks), reference)
    np.testing.assert_allclose(found, scaled, rtol=1e-4, atol=1e-5)


def test_reference_takes_other_widths_pages_and_groups():
    random = np.random.default_rng(9)
    table = np.arange(6).reshape(2, 3)
    keys, values = random.normal(size=(2, 6, 2, 16, 8))
    first, last = np.array([[0, 3, 7], [1, 20, 33]]), np.array([[5, 40, 7], [47, 21, 32]])
    case = (random.normal(size=(2, 3, 6, 8)), keys, values, table, first, last, random.normal(size=6))
    np.testing.assert_allclose(run(case, BACKENDS["reference"]), expected(*case), rtol=1e-5, atol=1e-5)


def test_scores_are_not_kept_for_the_whole_context():
    def temporaries(pages: int) -> int:
        arrays = [(1, 16, 6, 8), (pages, 2, 64, 8), (pages, 2, 64, 8), (6,)]
        floats = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in arrays]
        ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in [(1, pages), (1, 16), (1, 16)]]
        lowered = jax.jit(attention).lower(*floats[:3], *ints, floats[3])
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 1.1 * temporaries(64) + 2**16
