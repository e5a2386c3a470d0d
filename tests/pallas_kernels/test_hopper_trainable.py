"""The expert layer with gradients on Hopper, interpreted on the CPU, against float32 autodiff of the plain formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.experts import ExpertWeights
from pallas_kernels.experts.hopper_layout import HopperExperts, pack
from pallas_kernels.experts.hopper_trainable import trainable_experts
from pallas_kernels.experts.reference import swiglu
from pallas_kernels.experts.tiles import Tiling
from pallas_kernels.mxfp4 import MXFP4, dequantize

ALPHA, LIMIT = 1.702, 1.503  # a limit that no bfloat16 is equal to: there the gradient is a matter of taste
E, A, D, F, T = 4, 3, 128, 192, 11
TILING = Tiling(widths=(8, 16), warpgroups=1, stages=2)


def random_weights(seed: int) -> ExpertWeights:
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> MXFP4:
        shape = (E, rows, columns // 32)
        blocks = random.integers(0, 256, (*shape, 16), np.uint8)
        return MXFP4(jnp.array(blocks), jnp.array(random.integers(119, 123, shape, np.uint8)))

    def bias(rows: int) -> jax.Array:
        return jnp.array(random.normal(size=(E, rows)), jnp.float32)

    return ExpertWeights(matrix(2 * F, D), bias(2 * F), matrix(D, F), bias(D))


def random_case(choices=range(-1, E + 1)):
    """Tokens, ids, some of which are of no expert, routing weights, and the gradient of the result."""
    random = np.random.default_rng(len(choices))
    x, d_y = (jnp.array(random.normal(size=(T, D)), jnp.bfloat16) for _ in range(2))
    ids = jnp.array(random.choice(list(choices), (T, A)), jnp.int32)
    return x, ids, jnp.array(random.normal(size=(T, A)), jnp.float32), d_y


@jax.jit
def expected(x, weights: ExpertWeights, ids, routing, d_y):
    """The result, and the gradients of x and routing, of a dense formula in float32.

    Hidden values are rounded as the backward pass has them: one next to the limit has a gradient on one side only.
    """

    def layer(x, routing):
        shares = (jax.nn.one_hot(ids, E) * routing[..., None]).sum(axis=1)
        hidden = jnp.einsum("td,efd->tef", x, dequantize(weights.gate_up), precision="highest") + weights.gate_up_bias
        hidden += jax.lax.stop_gradient(hidden.astype(jnp.bfloat16).astype(jnp.float32) - hidden)
        activated = swiglu(hidden.reshape(-1, 2 * F), alpha=ALPHA, limit=LIMIT).reshape(T, E, F)
        answers = jnp.einsum("tef,edf->ted", activated, dequantize(weights.down), precision="highest")
        return jnp.einsum("ted,te->td", answers + weights.down_bias, shares, precision="highest")

    y, back = jax.vjp(layer, x.astype(jnp.float32), routing)
    return y, *back(d_y.astype(jnp.float32))


@jax.jit
def interpreted(x, weights: HopperExperts, ids, routing, d_y):
    layer = functools.partial(trainable_experts, alpha=ALPHA, limit=LIMIT, tiling=TILING, interpret=True)
    y, back = jax.vjp(lambda x, routing: layer(x, weights, ids, routing), x, routing)
    return y, *back(d_y)


@pytest.mark.parametrize("choices", [range(-1, E + 1), [2]], ids=["some elsewhere", "all of one expert"])
def test_gradients_are_those_of_the_formula(choices):
    x, ids, routing, d_y = random_case(choices)
    weights = random_weights(len(choices))
    found = interpreted(x, pack(weights), ids, routing, d_y)
    for one, other, dtype in zip(
        found, expected(x, weights, ids, routing, d_y), (x.dtype, x.dtype, routing.dtype), strict=True
    ):
        assert one.dtype == dtype
        assert one.shape == other.shape
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        # Activations, answers, and the gradients on the way are bfloat16.
        assert np.linalg.norm(one - other) < 6e-3 * np.linalg.norm(other)


def test_pairs_that_are_elsewhere_get_no_gradient():
    x, ids, routing, d_y = random_case()
    _, d_x, d_routing = interpreted(x, pack(random_weights(0)), ids, routing, d_y)
    elsewhere = (np.asarray(ids) < 0) | (np.asarray(ids) >= E)
    assert elsewhere.any()
    np.testing.assert_array_equal(np.asarray(d_routing)[elsewhere], 0)
    assert np.isfinite(np.asarray(d_x, np.float32)).all()


def test_narrow_weights_are_refused_with_numbers():
    x, ids, routing, _ = random_case()
    weights = random_weights(0)
    narrow = ExpertWeights(
        MXFP4(weights.gate_up.blocks[:, :128], weights.gate_up.scales[:, :128]),
        weights.gate_up_bias[:, :128],
        MXFP4(weights.down.blocks[:, :, :2], weights.down.scales[:, :, :2]),
        weights.down_bias,
    )
    with pytest.raises(Unsupported, match="widths of 128; D = 128, F = 64"):
        trainable_experts(x, pack(narrow), ids, routing, alpha=ALPHA, limit=LIMIT, interpret=True)
