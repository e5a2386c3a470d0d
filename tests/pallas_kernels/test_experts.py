"""One suite for every backend of the expert layer, against a direct computation in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Unsupported, choose
from pallas_kernels.experts import BACKENDS, ExpertWeights, experts
from pallas_kernels.experts.reference import swiglu
from pallas_kernels.mxfp4 import MXFP4, dequantize

ALPHA, LIMIT = 1.702, 7.0
D, F, E, A = 96, 64, 10, 5


def random_weights(seed: int) -> ExpertWeights:
    random = np.random.default_rng(seed)

    def packed(rows: int, columns: int) -> MXFP4:
        shape = (E, rows, columns // 32)
        blocks = random.integers(0, 256, (*shape, 16), np.uint8)
        return MXFP4(jnp.array(blocks), jnp.array(random.integers(119, 126, shape, np.uint8)))

    def bias(width: int) -> jax.Array:
        return jnp.array(random.normal(size=(E, width)), jnp.float32)

    return ExpertWeights(packed(2 * F, D), bias(2 * F), packed(D, F), bias(D))


def expected(x, weights: ExpertWeights, ids, routing) -> np.ndarray:
    gate_up, down = (np.asarray(dequantize(matrix), np.float64) for matrix in (weights.gate_up, weights.down))
    y = np.zeros(x.shape)
    for token, chosen in enumerate(np.asarray(ids)):
        for expert, share in zip(chosen, np.asarray(routing, np.float64)[token], strict=True):
            if 0 <= expert < E:
                hidden = gate_up[expert] @ np.asarray(x[token], np.float64) + weights.gate_up_bias[expert]
                gate, up = np.minimum(hidden[0::2], LIMIT), np.clip(hidden[1::2], -LIMIT, LIMIT)
                activated = gate * 0.5 * (1 + np.tanh(ALPHA * gate / 2)) * (up + 1)  # a sigmoid that cannot overflow
                y[token] += share * (down[expert] @ activated + weights.down_bias[expert])
    return y


def random_case(num_tokens: int, *, seed: int, choices=range(E)):
    random = np.random.default_rng(seed)
    x = jnp.array(random.normal(size=(num_tokens, D)) * 3, jnp.float32)
    few = len(choices) < A
    ids = np.array([random.choice(list(choices), A, replace=few) for _ in range(num_tokens)]).reshape(num_tokens, A)
    return x, random_weights(seed), jnp.array(ids, jnp.int32), jnp.array(random.random((num_tokens, A)), jnp.float32)


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 64, 300])
def test_equals_the_direct_computation(num_tokens, impl):
    x, weights, ids, routing = random_case(num_tokens, seed=num_tokens)
    found = experts(x, weights, ids, routing, alpha=ALPHA, limit=LIMIT, impl=impl)
    np.testing.assert_allclose(found, expected(x, weights, ids, routing), rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("choices", [[3], [0, 9], [-1, 10, 4]], ids=["one expert", "two experts", "mostly elsewhere"])
def test_uneven_loads_and_experts_held_elsewhere(choices):
    x, weights, ids, routing = random_case(200, seed=5, choices=choices)
    found = experts(x, weights, ids, routing, alpha=ALPHA, limit=LIMIT)
    np.testing.assert_allclose(found, expected(x, weights, ids, routing), rtol=2e-5, atol=2e-3)


def test_no_expert_here_gives_zeros():
    x, weights, ids, routing = random_case(3, seed=1)
    found = experts(x, weights, ids + E, routing, alpha=ALPHA, limit=LIMIT)
    np.testing.assert_array_equal(found, 0)


def test_bfloat16_is_within_its_rounding():
    x, weights, ids, routing = random_case(40, seed=8)
    found = experts(x.astype(jnp.bfloat16), weights, ids, routing, alpha=ALPHA, limit=LIMIT)
    assert found.dtype == jnp.bfloat16
    truth = expected(x.astype(jnp.bfloat16), weights, ids, routing)
    assert np.linalg.norm(np.asarray(found, np.float64) - truth) < 5e-3 * np.linalg.norm(truth)


@pytest.mark.parametrize("num_tokens", [1, 64])
def test_at_most_one_expert_is_dequantized_at_a_time(num_tokens):
    x, weights, ids, routing = random_case(num_tokens, seed=2)
    run = jax.jit(lambda *args: experts(*args, alpha=ALPHA, limit=LIMIT))
    temporaries = run.lower(x, weights, ids, routing).compile().memory_analysis().temp_size_in_bytes
    one_expert = 4 * 3 * F * D
    rows = 4 * num_tokens * A * (3 * F + 6 * D)
    assert temporaries < 2 * one_expert + 2 * rows + 2**16 < 4 * E * 3 * F * D + 2 * rows


def test_swiglu_published_values():
    pairs = np.array([[1, 0], [1, 1], [10, 10], [-10, 3], [-2, -10], [3, -1]], np.float32)
    values = [0.8457957659, 1.6915915319, 55.9996250264, -1.6231845e-06, 0.3860482646, 0]
    np.testing.assert_allclose(swiglu(jnp.array(pairs), alpha=ALPHA, limit=LIMIT)[:, 0], values, rtol=1e-5)


def test_unknown_implementation_is_refused_by_name():
    with pytest.raises(Unsupported, match="experts: no implementation 'abacus'"):
        choose("experts", BACKENDS, "abacus")
