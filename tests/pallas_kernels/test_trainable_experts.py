"""The expert layer's gradients against JAX's own, of a dense float32 formula written here."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

from gptoss_jax.sharding import AXES, make_mesh
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.experts import (
    DenseExperts,
    ExpertAdapters,
    ExpertWeights,
    experts,
    trainable_experts,
)
from pallas_kernels.mxfp4 import dequantize
from tests.pallas_kernels.random_experts import random_experts

ALPHA, LIMIT = 1.702, 1.5
D, F, E, A, R = 64, 96, 6, 3, 5
T = 37
layer = functools.partial(trainable_experts, alpha=ALPHA, limit=LIMIT)


def random_packed(seed: int, num_experts: int = E) -> ExpertWeights:
    return random_experts(seed, num_experts=num_experts, width=D, expert_width=F, scale_bytes=(121, 124))


def random_adapters(seed: int, num_experts: int = E) -> ExpertAdapters:
    random = np.random.default_rng(seed)
    shapes = ((R, D), (2 * F, R), (R, F), (D, R))
    return ExpertAdapters(*(jnp.array(random.normal(size=(num_experts, *s)) * 0.2, jnp.float32) for s in shapes))


def random_tokens(seed: int, *, num_tokens: int = T, per_token: int = A, choices=range(-1, E + 2)):
    """x, ids, routing and the gradient of y; by default some ids are of no expert."""
    random = np.random.default_rng(seed)
    x, d_y = (jnp.array(random.normal(size=(num_tokens, D)), jnp.float32) for _ in range(2))
    ids = jnp.array(random.choice(list(choices), (num_tokens, per_token)), jnp.int32)
    return x, ids, jnp.array(random.normal(size=(num_tokens, per_token)), jnp.float32), d_y


def dense(weights: ExpertWeights) -> DenseExperts:
    return DenseExperts(dequantize(weights.gate_up), weights.gate_up_bias, dequantize(weights.down), weights.down_bias)


def formula(x, weights: DenseExperts, ids, routing, adapters: ExpertAdapters | None = None):
    """Every token through every expert, in float32."""
    x, weights, routing, adapters = jax.tree.map(lambda a: a.astype(jnp.float32), (x, weights, routing, adapters))
    gate_up, down = weights.gate_up, weights.down
    einsum = functools.partial(jnp.einsum, precision="highest")
    if adapters is not None:
        gate_up = gate_up + einsum("Efr,ErD->EfD", adapters.gate_up_b, adapters.gate_up_a)
        down = down + einsum("EDr,ErF->EDF", adapters.down_b, adapters.down_a)
    hidden = einsum("TD,EfD->TEf", x, gate_up) + weights.gate_up_bias
    gate, up = jnp.minimum(hidden[..., ::2], LIMIT), jnp.clip(hidden[..., 1::2], -LIMIT, LIMIT)
    activated = gate * jax.nn.sigmoid(ALPHA * gate) * (up + 1)
    answers = einsum("TEF,EDF->TED", activated, down) + weights.down_bias
    shares = jnp.where(ids[..., None] == jnp.arange(len(gate_up)), routing[..., None], 0.0).sum(axis=1)
    return einsum("TED,TE->TD", answers, shares)


@jax.jit
def expected(x, weights, ids, routing, adapters, d_y):
    """y, and the gradients of x, weights, routing and adapters."""
    y, back = jax.vjp(lambda x, weights, *rest: formula(x, weights, ids, *rest), x, weights, routing, adapters)
    return y, back(d_y.astype(y.dtype))


@jax.jit
def found(x, weights, ids, routing, adapters, d_y):
    """What `expected` returns, of the layer under test; the weights' gradients only if they are dense."""

    def run(x, trained, routing, adapters):
        return layer(x, weights if trained is None else trained, ids, routing, adapters=adapters)

    y, back = jax.vjp(run, x, weights if isinstance(weights, DenseExperts) else None, routing, adapters)
    return y, back(d_y.astype(y.dtype))


def assert_close(found, wanted, tolerance: float) -> None:
    """The norm of each array's error is at most `tolerance` of the norm of the array."""
    for (path, one), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert one.shape == other.shape
        error, norm = np.linalg.norm(one - other), np.linalg.norm(other)
        assert error <= tolerance * norm, f"{jax.tree_util.keystr(path)}: {error / max(norm, 1e-30):.2e}"


def assert_right(case, weights, adapters, tolerance: float) -> None:
    x, ids, routing, d_y = case
    y, (d_x, d_weights, *others) = found(x, weights, ids, routing, adapters, d_y)
    plain = weights if isinstance(weights, DenseExperts) else dense(weights)
    right_y, (right_x, right_weights, *right) = expected(x, plain, ids, routing, adapters, d_y)
    assert_close((y, d_x, *others), (right_y, right_x, *right), tolerance)
    if d_weights is not None:
        assert_close(d_weights, right_weights, tolerance)


CASES = {
    "some ids of no expert": random_tokens(1),
    "experts without rows": random_tokens(2, choices=(0, 0, 0, 1, 4)),
    "one expert has all rows": random_tokens(3, choices=(4,)),
    "nothing chosen": random_tokens(7, choices=(-1, E, 99)),
}
OTHER_SHAPES = {
    "one token": random_tokens(4, num_tokens=1),
    "one expert a token": random_tokens(5, num_tokens=23, per_token=1),
    "eight experts a token": random_tokens(6, num_tokens=13, per_token=8),
}
PACKED, ADAPTERS = random_packed(9), random_adapters(8)
WEIGHTS = {"packed": PACKED, "dense": dense(PACKED)}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_weights = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
every_adapters = pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["no adapters", "adapters"])


@every_case
@every_weights
@every_adapters
def test_value_and_gradients_are_those_of_the_formula(case, weights, adapters):
    assert_right(case, weights, adapters, 1e-5)


@pytest.mark.parametrize("case", OTHER_SHAPES.values(), ids=OTHER_SHAPES.keys())
def test_any_number_of_tokens_and_experts_a_token(case):
    assert_right(case, PACKED, ADAPTERS, 1e-5)


def test_the_clamps_are_reached_on_every_side():
    x, *_ = CASES["some ids of no expert"]
    weights = WEIGHTS["dense"]
    hidden = jnp.einsum("TD,EfD->TEf", x, weights.gate_up) + weights.gate_up_bias
    gate, up = hidden[..., ::2], hidden[..., 1::2]
    for clamped in (gate > LIMIT, up > LIMIT, up < -LIMIT):
        assert 0.05 < clamped.mean() < 0.7


def test_value_is_that_of_inference():
    x, ids, routing, _ = CASES["some ids of no expert"]
    wanted = experts(x, PACKED, ids, routing, alpha=ALPHA, limit=LIMIT, impl="reference")
    assert_close(layer(x, PACKED, ids, routing), wanted, 1e-6)


@every_weights
def test_bfloat16_rounds_operands_only(weights):
    """Operands and results have 8 bits: each rounding is off by 2^-9 at most, 2^-10 or so in the norm."""
    x, ids, routing, d_y = CASES["some ids of no expert"]

    def rounded(tree):
        return jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, tree)

    assert_right((*rounded((x,)), ids, routing, rounded(d_y)), rounded(weights), rounded(ADAPTERS), 6e-3)


def test_gradients_have_their_arguments_dtypes():
    x, ids, routing, d_y = CASES["some ids of no expert"]
    x, d_y = x.astype(jnp.bfloat16), d_y.astype(jnp.bfloat16)
    y, gradients = found(x, WEIGHTS["dense"], ids, routing, ADAPTERS, d_y)
    assert y.dtype == jnp.bfloat16
    dtypes = [
        [leaf.dtype for leaf in jax.tree.leaves(tree)] for tree in (gradients, (x, WEIGHTS["dense"], routing, ADAPTERS))
    ]
    assert dtypes[0] == dtypes[1]


def test_gradients_are_finite_differences():
    """Along each argument's gradient, the answer's slope is the gradient's norm."""
    x, ids, routing, d_y = CASES["some ids of no expert"]
    arguments = (x, WEIGHTS["dense"], routing, ADAPTERS)
    _, gradients = found(x, WEIGHTS["dense"], ids, routing, ADAPTERS, d_y)

    @jax.jit
    def total(x, weights, routing, adapters):
        return (layer(x, weights, ids, routing, adapters=adapters) * d_y).sum()

    for place, gradient in enumerate(gradients):
        norm = float(optax.tree.norm(gradient))
        ahead, behind = (
            jax.tree.map(lambda a, g, step=step / norm: a + step * g, arguments[place], gradient)
            for step in (0.01, -0.01)
        )
        slope = sum(
            sign * float(total(*arguments[:place], moved, *arguments[place + 1 :]))
            for sign, moved in ((50, ahead), (-50, behind))
        )
        assert slope == pytest.approx(norm, rel=0.01)


@pytest.mark.parametrize("packed", [True, False], ids=WEIGHTS.keys())
def test_eight_devices_find_the_gradients_of_one(packed):
    """Tokens over data, experts over the other axes; every argument varies over all axes, and check_vma looks."""
    mesh = make_mesh(data=2, expert=2, tensor=2)
    spec = {"x": P("data"), "weights": P(("expert", "tensor"))}
    weights, adapters = random_packed(12, 2 * E), random_adapters(13, 2 * E)
    weights = weights if packed else dense(weights)
    x, ids, routing, d_y = random_tokens(14, num_tokens=2 * T + 2, choices=range(2 * E))

    def local(x, weights, ids, routing, adapters):
        x, ids, routing = jax.lax.pcast((x, ids, routing), ("expert", "tensor"), to="varying")
        weights, adapters = jax.lax.pcast((weights, adapters), "data", to="varying")
        ours = ids - jax.lax.axis_index(("expert", "tensor")) * weights.num_experts
        y = jax.checkpoint(layer)(x, weights, ours, routing, adapters=adapters)
        assert jax.typeof(y).mat.varying == set(AXES)
        return jax.lax.psum(y, ("expert", "tensor"))

    places = (spec["x"], spec["weights"], spec["x"], spec["x"], spec["weights"])
    sharded = jax.shard_map(local, mesh=mesh, in_specs=places, out_specs=spec["x"], check_vma=True)
    arguments = tuple(
        jax.device_put(argument, jax.NamedSharding(mesh, place))
        for argument, place in zip((x, weights, ids, routing, adapters), places, strict=True)
    )

    @jax.jit
    def on_eight(x, weights, ids, routing, adapters, d_y):
        trained = (x, None if packed else weights, routing, adapters)

        def run(x, trained, routing, adapters):
            return sharded(x, weights if trained is None else trained, ids, routing, adapters)

        y, back = jax.vjp(run, *trained)
        return y, back(d_y)

    one = found(x, weights, ids, routing, adapters, d_y)
    assert_close(on_eight(*arguments, jax.device_put(d_y, jax.NamedSharding(mesh, spec["x"]))), one, 1e-6)


def test_rematerialised_gradients_are_the_same():
    x, ids, routing, d_y = CASES["some ids of no expert"]

    def total(x, adapters, run):
        return (run(x, PACKED, ids, routing, adapters=adapters) * d_y).sum()

    plain, again = (
        jax.jit(jax.grad(functools.partial(total, run=run), (0, 1)))(x, ADAPTERS)
        for run in (layer, jax.checkpoint(layer))
    )
    assert_close(again, plain, 0.0)


def test_no_tokens_make_no_rows_and_no_gradients():
    x, ids, routing, d_y = random_tokens(13, num_tokens=0)
    y, gradients = found(x, WEIGHTS["dense"], ids, routing, ADAPTERS, d_y)
    assert y.shape == (0, D)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


def test_what_no_expert_is_sent_may_be_nan():
    x, ids, routing, d_y = CASES["some ids of no expert"]
    ids = ids.at[5].set(-1).at[9].set(E)
    spoilt = (x.at[5].set(jnp.nan), ids, routing.at[9].set(jnp.nan), d_y.at[5].set(jnp.nan))
    y, gradients = found(spoilt[0], WEIGHTS["dense"], *spoilt[1:3], ADAPTERS, spoilt[3])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((y, gradients)))


def arrays_of(jaxpr) -> Iterator[jax.core.ShapedArray]:
    """Every array a program makes, in loops and calls too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from arrays_of(inner)


def test_packed_experts_are_unpacked_one_at_a_time():
    x, ids, routing, d_y = CASES["some ids of no expert"]
    jaxpr = jax.make_jaxpr(found)(x, PACKED, ids, routing, ADAPTERS, d_y)
    sizes = {aval.size for aval in arrays_of(jaxpr.jaxpr) if jnp.issubdtype(aval.dtype, jnp.floating)}
    assert 2 * F * D in sizes
    assert max(sizes) < E * F * D


def test_an_implementation_without_gradients_is_refused():
    x, ids, routing, _ = CASES["some ids of no expert"]
    with pytest.raises(Unsupported, match="trainable_experts: no implementation 'tpu'"):
        layer(x, PACKED, ids, routing, impl="tpu")
