"""Attention over packed rows in plain JAX, against a float32 softmax and JAX's own gradients of it."""

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
from pallas_kernels.attention import trainable

B, T, N, K, H = 2, 43, 6, 2, 8
SEGMENTS = jnp.array([[1] * 20 + [2] * 3 + [3] * 15 + [0] * 5, [0] * 2 + [1] * 40 + [2]])
Arrays = tuple[jax.Array, ...]


def random_arrays(seed: int, *, batch: int = B, positions: int = T) -> Arrays:
    """Queries, keys, values, sinks and the gradient of the answers."""
    random = np.random.default_rng(seed)
    shapes = ((batch, positions, heads, H) for heads in (N, K, K, N))
    queries, keys, values, d_answers = (jnp.array(random.normal(size=shape), jnp.float32) for shape in shapes)
    return 2 * queries, keys, values, jnp.array(random.normal(size=N), jnp.float32), d_answers


def formula(queries, keys, values, sinks, *, segments, window):
    queries, keys, values, sinks = (array.astype(jnp.float32) for array in (queries, keys, values, sinks))
    keys, values = (jnp.repeat(array, N // K, axis=2) for array in (keys, values))
    scores = jnp.einsum("BTNH,BSNH->BNTS", queries, keys, precision="highest") / H**0.5
    position = jnp.arange(queries.shape[1])
    distance = position[:, None] - position
    own = segments[:, :, None]
    visible = (own == segments[:, None]) & (own > 0) & (distance >= 0) & (distance < (window or 10**6))
    scores = jnp.where(visible[:, None], scores, -1e9)
    sink = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
    weights = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("BNTS,BSNH->BTNH", jnp.where(visible[:, None], weights, 0), values, precision="highest")


@functools.partial(jax.jit, static_argnames=("function", "window", "block"))
def value_and_gradients(function, arrays: Arrays, segments, **static):
    """The answers, and the gradients of queries, keys, values and sinks."""
    *arguments, d_answers = arrays
    answers, back = jax.vjp(lambda *arguments: function(*arguments, segments=segments, **static), *arguments)
    return answers, *back(d_answers.astype(answers.dtype))


def ours(queries, keys, values, sinks, *, segments, **static):
    return trainable.segment_attention(queries, keys, values, segments, sinks, **static)


def assert_close(found: Arrays, wanted: Arrays, tolerance: float) -> None:
    """The norm of each array's error is at most `tolerance` of the norm of the array."""
    for name, one, other in zip(("answers", "queries", "keys", "values", "sinks"), found, wanted, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other), name


@pytest.mark.parametrize(("window", "block"), [(None, 512), (None, 8), (7, 8), (1, 512), (99, 8)])
def test_value_and_gradients_are_those_of_the_formula(window, block):
    arrays = random_arrays(0)
    found = value_and_gradients(ours, arrays, SEGMENTS, window=window, block=block)
    assert_close(found, value_and_gradients(formula, arrays, SEGMENTS, window=window), 1e-5)


def test_heads_taken_one_at_a_time_are_the_same(monkeypatch):
    block = 15  # as nowhere else, so that this is traced anew
    monkeypatch.setattr(trainable, "_SCORES", 1)
    arrays = random_arrays(1)
    found = value_and_gradients(ours, arrays, SEGMENTS, window=None, block=block)
    assert_close(found, value_and_gradients(formula, arrays, SEGMENTS, window=None), 1e-5)


@pytest.mark.parametrize("window", [None, 7])
def test_bfloat16_rounds_operands_only(window):
    """Operands and results have 8 bits; the error of several roundings, in the norm."""
    arrays = tuple(array.astype(jnp.bfloat16) for array in random_arrays(2))
    found = value_and_gradients(ours, arrays, SEGMENTS, window=window, block=16)
    assert {array.dtype for array in found} == {jnp.dtype(jnp.bfloat16)}
    assert_close(found, value_and_gradients(formula, arrays, SEGMENTS, window=window), 6e-3)


def test_packed_segments_are_rows_of_their_own():
    *arguments, _ = random_arrays(3, batch=1, positions=20)
    packed = ours(*arguments, segments=jnp.array([[3] * 12 + [1] * 8]), window=5)
    for part in (slice(0, 12), slice(12, 20)):
        alone = [array[:, part] for array in arguments[:3]]
        row = ours(*alone, arguments[3], segments=jnp.ones((1, part.stop - part.start), jnp.int32), window=5)
        np.testing.assert_allclose(packed[:, part], row, rtol=1e-5, atol=1e-6)


def test_padding_is_zero_and_moves_nothing():
    arrays = random_arrays(4)
    answers, *gradients = value_and_gradients(ours, arrays, SEGMENTS, window=None, block=16)
    padding = np.asarray(SEGMENTS == 0)
    for array in (answers, *gradients[:3]):
        assert not np.asarray(array)[padding].any()
        assert np.asarray(array)[~padding].any(axis=(1, 2)).all()


def test_head_without_a_sink():
    """exp(-inf) adds nothing, where there is padding too."""
    queries, keys, values, sinks, d_answers = random_arrays(6)
    arrays = queries, keys, values, sinks.at[::2].set(-jnp.inf), d_answers
    found = value_and_gradients(ours, arrays, SEGMENTS, window=None, block=16)
    assert_close(found, value_and_gradients(formula, arrays, SEGMENTS, window=None), 1e-5)
    assert not np.asarray(found[0])[np.asarray(SEGMENTS == 0)].any()


def test_gradients_are_finite_differences():
    """Along each argument's gradient, the answer's slope is the gradient's norm."""
    *arguments, d_answers = random_arrays(5)
    _, *gradients = value_and_gradients(ours, (*arguments, d_answers), SEGMENTS, window=7, block=16)

    @jax.jit
    def total(*arguments):
        return (ours(*arguments, segments=SEGMENTS, window=7, block=16) * d_answers).sum()

    for place, gradient in enumerate(gradients):
        norm = float(optax.tree.norm(gradient))
        step = 0.01 * gradient / norm
        ahead, behind = (
            float(total(*arguments[:place], arguments[place] + moved, *arguments[place + 1 :]))
            for moved in (step, -step)
        )
        assert (ahead - behind) / 0.02 == pytest.approx(norm, rel=0.01)


def test_eight_devices_find_the_gradients_of_one():
    """Rows over data, heads over tensor; every argument varies over all axes, and check_vma looks."""
    mesh = make_mesh(data=2, expert=2, tensor=2)
    arrays = random_arrays(6)

    def local(queries, keys, values, sinks, segments):
        queries, keys, values = jax.lax.pcast((queries, keys, values), "expert", to="varying")
        segments = jax.lax.pcast(segments, ("expert", "tensor"), to="varying")
        sinks = jax.lax.pcast(sinks, ("data", "expert"), to="varying")
        answers = trainable.segment_attention(queries, keys, values, segments, sinks, window=7, block=16)
        assert jax.typeof(answers).mat.varying == set(AXES)
        return jax.lax.pmean(answers, "expert")

    heads = P("data", None, "tensor")
    places = (heads, heads, heads, P("tensor"), P("data"))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=places, out_specs=heads, check_vma=True)
    *arguments, segments, d_answers = (
        jax.device_put(array, jax.NamedSharding(mesh, place))
        for array, place in zip((*arrays[:4], SEGMENTS, arrays[4]), (*places, heads), strict=True)
    )

    def on_eight(*arguments, segments):
        return sharded(*arguments, segments)

    found = value_and_gradients(on_eight, (*arguments, d_answers), segments)
    assert_close(found, value_and_gradients(ours, arrays, SEGMENTS, window=7, block=16), 1e-6)


def rematerialised(*arguments, **static):
    return jax.checkpoint(functools.partial(ours, **static))(*arguments)


def test_rematerialised_gradients_are_the_same():
    arrays = random_arrays(7)
    plain, again = (
        value_and_gradients(function, arrays, SEGMENTS, window=7, block=16) for function in (ours, rematerialised)
    )
    assert_close(again, plain, 0.0)


def arrays_of(jaxpr, times: int = 1) -> Iterator[tuple[str, jax.core.ShapedArray, int]]:
    """Every array a program makes, in loops and calls too, with the name of what makes it and how often."""
    for equation in jaxpr.eqns:
        yield from ((equation.primitive.name, variable.aval, times) for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from arrays_of(inner, times * equation.params.get("length", 1))


@pytest.mark.parametrize(("window", "scores"), [(None, 2 * 8 * (16 + 32 + 48 + 64)), (6, 8 * 8 * 14)])
def test_blocks_that_nothing_sees_are_not_computed(window, scores):
    """Of 64 positions the causal triangle has 2080 scores; blocks and bands make that 2560."""
    arrays = random_arrays(0, batch=1, positions=64)
    program = jax.make_jaxpr(functools.partial(value_and_gradients, ours, window=window, block=8))
    made = list(arrays_of(program(arrays, jnp.ones((1, 64), jnp.int32)).jaxpr))
    softmax = sum(aval.size * times for name, aval, times in made if name == "exp" and aval.ndim == 4)
    assert softmax == 2 * N * scores  # one pass forward, one backward
    assert max(aval.size for _, aval, _ in made) == N * 64 * H  # the queries themselves
