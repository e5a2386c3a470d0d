"""The Hopper kernels on hardware, at the published widths: against the float32 reference, and the same bits again.

What is inline PTX runs on hardware alone; the decode experts and the grouping are, as a whole.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.attention import hopper
from pallas_kernels.experts import experts, hopper_grouping, hopper_routing, prepare
from tests.gpu.published import D, draw_ids
from tests.pallas_kernels import test_attention as attention_suite

pytestmark = pytest.mark.gpu

A = 4
ALPHA, LIMIT = 1.702, 7.0
TOLERANCE = 3e-3
"""Of the answer's norm: two roundings to bfloat16, of the activation and of the result, come to 2.4e-3."""
MOST_COMPARED = 64
"""Tokens of a call that the reference computes too; no token depends on another."""


def leave_nan_in_free_memory() -> None:
    """What a kernel should have written is then most likely no number, and not the right one of an earlier call."""
    jnp.full(2**28, jnp.nan, jnp.float32).block_until_ready()


@pytest.mark.parametrize("choices", ["spread", "skewed", "one expert", "elsewhere", "nobody"])
@pytest.mark.parametrize(
    ("weights", "num_tokens"),
    [
        *((num_experts, num_tokens) for num_experts in (32, 128) for num_tokens in (1, 7, 8, 33, 64, 65, 128, 700)),
        *((32, num_tokens) for num_tokens in (2730, 8192)),
    ],
    indirect=["weights"],
)
def test_experts(weights, num_tokens, choices):
    num_experts = weights.num_experts
    random = np.random.default_rng(num_tokens)

    def draw(choices: str):
        x = jnp.array(random.normal(size=(num_tokens, D)), jnp.bfloat16)
        ids = jnp.array(draw_ids(random, num_tokens, A, num_experts, choices))
        return x, ids, jnp.array(random.random((num_tokens, A)), jnp.float32)

    def run(x, ids, routing, weights, impl):
        return np.asarray(experts(x, weights, ids, routing, alpha=ALPHA, limit=LIMIT, impl=impl), np.float64)

    prepared = jax.jit(prepare)(weights)
    case, other = draw(choices), draw("spread")
    leave_nan_in_free_memory()
    found = run(*case, prepared, "hopper")
    assert np.isfinite(run(*other, prepared, "hopper")).all()
    leave_nan_in_free_memory()
    np.testing.assert_array_equal(run(*case, prepared, "hopper"), found)
    assert np.isfinite(found).all()

    tokens = some_of(num_tokens, MOST_COMPARED)
    x, ids, routing = (array[tokens] for array in case)
    expected = run(x.astype(jnp.float32), ids, routing, weights, "reference")
    error = np.linalg.norm(found[tokens] - expected, axis=-1)
    norm = np.linalg.norm(expected, axis=-1)
    assert np.linalg.norm(error) <= TOLERANCE * np.linalg.norm(norm)
    assert (error <= 4 * TOLERANCE * norm).all()  # no token is lost among many right ones


def some_of(number: int, most: int) -> np.ndarray:
    """Ascending, the first and the last among them."""
    if number <= most:
        return np.arange(number)
    inner = 1 + np.random.default_rng(number).choice(number - 2, most - 2, replace=False)
    return np.sort(np.concatenate([[0, number - 1], inner]))


@pytest.mark.parametrize(
    ("num_tokens", "per_token", "num_experts", "choices", "widths"),
    [
        (1, 1, 1, "spread", (8,)),
        (65, 4, 32, "spread", (16, 24, 32)),
        (133, 5, 10, "spread", (32, 48, 64)),
        (512, 4, 32, "nobody", (64, 72, 80, 96)),
        (1000, 4, 128, "skewed", (64, 72, 80, 96)),
        (3000, 8, 200, "elsewhere", (32, 64, 96, 128, 160)),
        (8192, 4, 32, "one expert", (32, 64, 96, 128, 160)),
        (16384, 4, 128, "skewed", (32, 64, 96, 128, 160)),
    ],
)
def test_grouping_is_what_defines_it(num_tokens, per_token, num_experts, choices, widths):
    random = np.random.default_rng(num_tokens)
    x = jnp.array(random.standard_normal((num_tokens, D), np.float32), jnp.bfloat16)
    ids = jnp.array(draw_ids(random, num_tokens, per_token, num_experts, choices))
    expected_rows, expected = jax.jit(hopper_routing.spread, static_argnums=(2, 3))(x, ids, num_experts, widths)
    spread = jax.jit(hopper_grouping.spread, static_argnums=(2, 3))
    count = int(expected.num_tiles[0])
    places = np.unique(np.asarray(expected.places))
    places = places[places < expected_rows.shape[0]]
    for _ in range(3):  # the blocks run in another order each time
        leave_nan_in_free_memory()
        rows, found = spread(x, ids, num_experts, widths)
        assert int(found.num_tiles[0]) == count
        np.testing.assert_array_equal(found.places, expected.places)
        for name in ("tile_experts", "tile_rows", "tile_widths"):
            np.testing.assert_array_equal(getattr(found, name)[:count], getattr(expected, name)[:count])
        bits, expected_bits = (lax.bitcast_convert_type(array[places], jnp.uint16) for array in (rows, expected_rows))
        np.testing.assert_array_equal(bits, expected_bits)


HOPPER = attention_suite.Backend(jax.jit(hopper.attention), jnp.bfloat16, TOLERANCE)


@pytest.mark.parametrize(
    ("batch", "num_queries", "pages"),
    [(1, 1, 1), (3, 1, 17), (2, 1, 200), (40, 1, 4), (2, 5, 9), (3, 9, 7), (1, 64, 2), (2, 200, 20)],
)
def test_attention_over_random_ranges(batch, num_queries, pages):
    ranges = attention_suite.random_ranges(batch * num_queries, batch, num_queries, pages)
    case = attention_suite.build(num_queries, *ranges, pages=pages, N=64, K=8)
    found = attention_suite.assert_right(case, HOPPER)
    np.testing.assert_array_equal(found, attention_suite.run(case, HOPPER))


@pytest.mark.parametrize("window", [128, 10**6], ids=["sliding", "full"])
@pytest.mark.parametrize(("start", "num_queries"), [(0, 300), (1000, 130), (777, 1), (127, 2), (128, 1)])
def test_attention_of_a_chunk(start, num_queries, window):
    case = attention_suite.build(start, *attention_suite.causal(start, num_queries, window), N=64, K=8, sink=30.0)
    attention_suite.assert_right(case, HOPPER)


@pytest.mark.parametrize(("first", "last"), [(0, 131_071), (64_001, 100_000), (0, 70)])
def test_attention_with_a_table_of_131072_keys(first, last):
    # Two of the eight kv heads: the kernel cuts them alike, and NumPy takes a quarter of the time.
    case = attention_suite.build(last, np.array([[first]]), np.array([[last]]), pages=2048, N=16, K=2)
    leave_nan_in_free_memory()
    found = attention_suite.assert_right(case, HOPPER)
    np.testing.assert_array_equal(found, attention_suite.run(case, HOPPER))


@pytest.mark.parametrize("start", [0, 3000])
@pytest.mark.parametrize("window", [128, None], ids=["sliding", "full"])
def test_attention_of_2000_queries(window, start):
    ranges = attention_suite.causal(start, 2000, window or 10**6)
    case = attention_suite.build(start, *ranges, N=64, K=8)
    run = jax.jit(functools.partial(hopper.attention, window=window))
    backend = attention_suite.Backend(run, jnp.bfloat16, TOLERANCE)
    leave_nan_in_free_memory()
    found = attention_suite.assert_right(case, backend, some_of(2000, 24))
    other = attention_suite.build(start + 1, *ranges, N=64, K=8)
    assert np.isfinite(attention_suite.run(other, backend)).all()
    np.testing.assert_array_equal(found, attention_suite.run(case, backend))
