"""The Hopper kernels on hardware, at the published widths: against the float32 reference, and the same bits twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import hopper
from pallas_kernels.experts import ExpertWeights, experts, prepare
from pallas_kernels.mxfp4 import MXFP4
from tests.pallas_kernels import test_attention as attention_suite

pytestmark = pytest.mark.gpu

D = F = 2880
A = 4
ALPHA, LIMIT = 1.702, 7.0
TOLERANCE = 3e-3
"""Of the answer's norm: two roundings to bfloat16, of the activation and of the result, come to 2.4e-3."""


@pytest.fixture(scope="module", params=[32, 128], ids=["32 experts", "128 experts"])
def weights(request) -> ExpertWeights:
    def packed(key: jax.Array, rows: int) -> MXFP4:
        codes, scales = jax.random.split(key)
        shape = (request.param, rows, D // 32)
        return MXFP4(
            jax.random.bits(codes, (*shape, 16), jnp.uint8),
            119 + jax.random.randint(scales, shape, 0, 2).astype(jnp.uint8),
        )

    @jax.jit
    def draw() -> ExpertWeights:
        keys = jax.random.split(jax.random.key(request.param), 4)
        gate_up_bias = jax.random.normal(keys[2], (request.param, 2 * F), jnp.bfloat16)
        down_bias = jax.random.normal(keys[3], (request.param, D), jnp.bfloat16)
        return ExpertWeights(packed(keys[0], 2 * F), gate_up_bias, packed(keys[1], D), down_bias)

    return draw()


@pytest.mark.parametrize("choices", ["spread", "one expert", "elsewhere"])
@pytest.mark.parametrize("num_tokens", [1, 7, 64, 65, 700])
def test_experts(weights, num_tokens, choices):
    num_experts = weights.num_experts
    random = np.random.default_rng(num_tokens)
    x = jnp.array(random.normal(size=(num_tokens, D)), jnp.bfloat16)
    ids = np.array([random.choice(num_experts, A, replace=False) for _ in range(num_tokens)])
    if choices == "one expert":
        ids[:] = num_experts - 1
    if choices == "elsewhere":
        ids = np.where(ids % 3 == 0, -1, np.where(ids % 3 == 1, num_experts + ids, ids))
    routing = jnp.array(random.random((num_tokens, A)), jnp.float32)

    def run(x, weights, impl):
        ids_T = jnp.array(ids, jnp.int32)
        return np.asarray(experts(x, weights, ids_T, routing, alpha=ALPHA, limit=LIMIT, impl=impl), np.float64)

    prepared = jax.jit(prepare)(weights)
    found, again = (run(x, prepared, "hopper") for _ in range(2))
    expected = run(x.astype(jnp.float32), weights, "reference")
    assert np.linalg.norm(found - expected) <= TOLERANCE * np.linalg.norm(expected)
    np.testing.assert_array_equal(found, again)


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
