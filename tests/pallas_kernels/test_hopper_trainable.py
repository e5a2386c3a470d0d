"""The expert layer with gradients on Hopper, interpreted on the CPU, against float32 autodiff of the plain formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import experts
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.experts import ExpertAdapters, ExpertWeights
from pallas_kernels.experts.hopper_layout import HopperExperts, pack
from pallas_kernels.experts.hopper_trainable import trainable_experts
from pallas_kernels.experts.reference import swiglu
from pallas_kernels.experts.tiles import Tiling
from pallas_kernels.mxfp4 import MXFP4, dequantize
from tests.pallas_kernels.random_experts import random_experts

ALPHA = 1.702
LIMIT = 1.503  # no bfloat16 is equal to it: there the gradient is a matter of taste
NO_LIMIT = 1e4
E, A, D, F, T, R = 4, 3, 128, 192, 11, 5
TILING = Tiling(widths=(8, 16), warpgroups=1, stages=2)


def random_weights(seed: int) -> ExpertWeights:
    return random_experts(seed, num_experts=E, width=D, expert_width=F)


def random_case(choices=range(-1, E + 1)):
    """Tokens, ids, some of which are of no expert, routing weights, and the gradient of the result."""
    random = np.random.default_rng(len(choices))
    x, d_y = (jnp.array(random.normal(size=(T, D)), jnp.bfloat16) for _ in range(2))
    ids = jnp.array(random.choice(list(choices), (T, A)), jnp.int32)
    return x, ids, jnp.array(random.normal(size=(T, A)), jnp.float32), d_y


def random_adapters(dtype=jnp.float32) -> ExpertAdapters:
    random = np.random.default_rng(7)
    shapes = ((R, D), (2 * F, R), (R, F), (D, R))
    return ExpertAdapters(*(jnp.array(random.normal(size=(E, *shape)) * 0.2, dtype) for shape in shapes))


@functools.partial(jax.jit, static_argnames="limit")
def expected(x, weights: ExpertWeights, adapters: ExpertAdapters | None, ids, routing, d_y, limit=LIMIT):
    """The result, and the gradients of x, adapters and routing, of a dense formula in float32.

    Hidden values are rounded as the backward pass has them: one next to the limit has a gradient on one side only.
    """
    einsum = functools.partial(jnp.einsum, precision="highest")

    def layer(x, adapters, routing):
        gate_up, down = dequantize(weights.gate_up), dequantize(weights.down)
        if adapters is not None:
            gate_up += einsum("efr,erd->efd", adapters.gate_up_b, adapters.gate_up_a)
            down += einsum("edr,erf->edf", adapters.down_b, adapters.down_a)
        shares = (jax.nn.one_hot(ids, E) * routing[..., None]).sum(axis=1)
        hidden = einsum("td,efd->tef", x, gate_up) + weights.gate_up_bias
        hidden += jax.lax.stop_gradient(hidden.astype(jnp.bfloat16).astype(jnp.float32) - hidden)
        activated = swiglu(hidden.reshape(-1, 2 * F), alpha=ALPHA, limit=limit).reshape(T, E, F)
        return einsum("ted,te->td", einsum("tef,edf->ted", activated, down) + weights.down_bias, shares)

    y, back = jax.vjp(layer, x.astype(jnp.float32), adapters, routing)
    return y, *back(d_y.astype(jnp.float32))


@functools.partial(jax.jit, static_argnames="limit")
def interpreted(x, weights: HopperExperts, adapters: ExpertAdapters | None, ids, routing, d_y, limit=LIMIT):
    layer = functools.partial(trainable_experts, alpha=ALPHA, limit=limit, tiling=TILING, interpret=True)
    y, back = jax.vjp(lambda x, adapters, routing: layer(x, weights, ids, routing, adapters), x, adapters, routing)
    return y, *back(d_y)


def assert_equal(found, wanted, tolerance: float) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.shape == other.shape
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.linalg.norm(one - other) < tolerance * np.linalg.norm(other)


@pytest.mark.parametrize("choices", [range(-1, E + 1), [2]], ids=["some elsewhere", "all of one expert"])
def test_gradients_are_those_of_the_formula(choices):
    x, ids, routing, d_y = random_case(choices)
    weights = random_weights(len(choices))
    found = interpreted(x, pack(weights), None, ids, routing, d_y)
    assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [x.dtype, x.dtype, routing.dtype]
    # Activations, answers, and the gradients on the way are bfloat16.
    assert_equal(found, expected(x, weights, None, ids, routing, d_y), 6e-3)


@pytest.mark.parametrize("choices", [range(-1, E + 1), [1, 3]], ids=["some elsewhere", "of two experts"])
def test_adapters_have_the_gradients_of_the_formula(choices):
    x, ids, routing, d_y = random_case(choices)
    weights, adapters = random_weights(len(choices)), random_adapters()
    # What adapters add is rounded by itself, so hidden values next to a limit would be on different sides of it.
    found = interpreted(x, pack(weights), adapters, ids, routing, d_y, NO_LIMIT)
    assert {leaf.dtype for leaf in jax.tree.leaves(found[2])} == {jnp.dtype(jnp.float32)}
    assert_equal(found, expected(x, weights, adapters, ids, routing, d_y, NO_LIMIT), 1e-2)


def test_pairs_that_are_elsewhere_get_no_gradient():
    x, ids, routing, d_y = random_case()
    _, d_x, _, d_routing = interpreted(x, pack(random_weights(0)), None, ids, routing, d_y)
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


def test_prepared_weights_need_their_platform():
    x, ids, routing, _ = random_case()
    with pytest.raises(Unsupported, match="prepared for Hopper's kernels; 'auto' on 'cpu'"):
        experts.trainable_experts(x, pack(random_weights(0)), ids, routing, alpha=ALPHA, limit=LIMIT)


def test_both_passes_lower_to_eight_kernels():
    """A grouping and two products; in the backward pass two groupings, one product and two transposed ones."""
    x, ids, routing, d_y = random_case()

    def run(x, weights, ids, routing, d_y):
        def layer(x, routing):
            return trainable_experts(x, weights, ids, routing, alpha=ALPHA, limit=LIMIT)

        y, back = jax.vjp(layer, x, routing)
        return y, *back(d_y)

    traced = jax.jit(run).trace(x, pack(random_weights(0)), ids, routing, d_y)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu_v2") == 3 + 5
