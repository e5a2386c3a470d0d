"""One suite for every backend of attention over pages, against a direct computation in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attention

N, K, H = 6, 2, 8


def random_case(seed: int, *, batch: int, num_queries: int, pages: int, slots: int, spare: int = 3):
    """Rows whose pages are scattered over a pool that holds NaN wherever no query may look."""
    random = np.random.default_rng(seed)
    pool = batch * pages + spare
    table = random.permutation(pool)[: batch * pages].reshape(batch, pages)
    last = random.integers(0, pages * slots, (batch, num_queries))
    first = np.maximum(last - random.integers(0, pages * slots, (batch, num_queries)), 0)
    keys, values = random.normal(size=(2, pool, K, slots, H))
    seen = np.zeros((pool, slots), bool)
    for row in range(batch):
        for low, high in zip(first[row], last[row], strict=True):
            slot = np.arange(low, high + 1)
            seen[table[row, slot // slots], slot % slots] = True
    keys[~np.broadcast_to(seen[:, None], keys.shape[:3])] = np.nan
    values[~np.broadcast_to(seen[:, None], values.shape[:3])] = np.nan
    queries, sinks = random.normal(size=(batch, num_queries, N, H)) * 2, random.normal(size=N)
    return queries, keys, values, table, first, last, sinks


def expected(queries, keys, values, table, first, last, sinks) -> np.ndarray:
    out = np.zeros_like(queries)
    for row, token, head in np.ndindex(queries.shape[:3]):
        low, high = first[row, token], last[row, token]
        if high < low:
            continue
        slot = np.arange(low, high + 1)
        page, offset = table[row, slot // keys.shape[2]], slot % keys.shape[2]
        own = head // (N // K)
        scores = keys[page, own, offset] @ queries[row, token, head] / np.sqrt(H)
        weights = np.exp(np.append(scores, sinks[head]) - max(scores.max(), sinks[head]))
        out[row, token, head] = (weights / weights.sum())[:-1] @ values[page, own, offset]
    return out


def run(case, impl="auto", dtype=jnp.float32) -> np.ndarray:
    queries, keys, values, table, first, last, sinks = case
    return np.asarray(
        attention(
            *(jnp.array(array, dtype) for array in (queries, keys, values)),
            *(jnp.array(array, jnp.int32) for array in (table, first, last)),
            jnp.array(sinks, dtype),
            impl=impl,
        ),
        np.float64,
    )


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize(
    "shape",
    [
        {"batch": 1, "num_queries": 1, "pages": 1, "slots": 4},
        {"batch": 4, "num_queries": 1, "pages": 6, "slots": 64},
        {"batch": 3, "num_queries": 11, "pages": 5, "slots": 16},
        {"batch": 2, "num_queries": 5, "pages": 21, "slots": 64},
    ],
    ids=["one page", "decode", "prefill", "several blocks"],
)
def test_equals_the_direct_computation(shape, impl):
    case = random_case(7, **shape)
    np.testing.assert_allclose(run(case, impl), expected(*case), rtol=1e-5, atol=1e-5)


def test_a_query_that_sees_nothing_gives_zeros():
    queries, keys, values, table, first, last, sinks = random_case(1, batch=3, num_queries=4, pages=2, slots=8)
    last = np.where(np.arange(4) % 2 == 0, -1, last)
    found = run((queries, keys, values, table, first, last, sinks))
    assert (found[:, ::2] == 0).all()
    np.testing.assert_allclose(found, expected(queries, keys, values, table, first, last, sinks), rtol=1e-5, atol=1e-5)


def test_window_boundaries_fall_on_every_slot_of_a_page():
    slots, window = 4, 7
    queries, keys, values, table, _, _, sinks = random_case(3, batch=1, num_queries=24, pages=6, slots=slots)
    keys, values = np.nan_to_num(keys), np.nan_to_num(values)
    last = np.arange(24)[None]
    case = (queries, keys, values, table, np.maximum(last - window + 1, 0), last, sinks)
    np.testing.assert_allclose(run(case), expected(*case), rtol=1e-5, atol=1e-5)


def test_sink_equals_the_log_sum_exp_form():
    case = random_case(4, batch=2, num_queries=3, pages=2, slots=8)
    queries, keys, values, table, first, last, sinks = case
    without = run((queries, keys, values, table, first, last, np.full(N, -1e30)))
    lse = np.zeros((*queries.shape[:2], N))
    for row, token, head in np.ndindex(lse.shape):
        slot = np.arange(first[row, token], last[row, token] + 1)
        scores = keys[table[row, slot // 8], head // (N // K), slot % 8] @ queries[row, token, head] / np.sqrt(H)
        lse[row, token, head] = np.log(np.exp(scores).sum())
    scaled = without / (1 + np.exp(-(lse - sinks)))[..., None]
    np.testing.assert_allclose(run(case), scaled, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_within_its_rounding():
    case = random_case(9, batch=2, num_queries=5, pages=3, slots=16)
    found = run(case, dtype=jnp.bfloat16)
    truth = expected(*(np.asarray(jnp.array(array, jnp.bfloat16), np.float64) if array.dtype == np.float64 else array
                       for array in case))  # fmt: skip
    assert np.linalg.norm(found - truth) < 4e-3 * np.linalg.norm(truth)


def test_scores_are_not_kept_for_the_whole_context():
    def temporaries(pages: int) -> int:
        arrays = [(1, 16, N, H), (pages, K, 64, H), (pages, K, 64, H), (N,)]
        floats = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in arrays]
        ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in [(1, pages), (1, 16), (1, 16)]]
        lowered = jax.jit(attention).lower(*floats[:3], *ints, floats[3])
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 1.1 * temporaries(64) + 2**16
