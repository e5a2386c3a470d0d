"""Attention with gradients on a Hopper GPU, at the published widths, against plain JAX in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import segment_attention, trainable

pytestmark = pytest.mark.gpu

N, K, H = 64, 8, 64


@functools.partial(jax.jit, static_argnames=("function", "window"))
def value_and_gradients(function, arrays, segments, *, window):
    *arguments, d_answers = arrays
    attend = functools.partial(function, segments=segments, window=window)
    answers, back = jax.vjp(lambda q, k, v, sinks: attend(q, k, v, sinks=sinks), *arguments)
    return answers, *back(d_answers.astype(answers.dtype))


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("shape", [(2, 700), (1, 2048)], ids=str)
def test_value_and_gradients_are_those_of_float32(shape, window):
    random = np.random.default_rng(shape[1])
    queries, keys, values, d_answers = (
        jnp.array(random.normal(size=(*shape, heads, H)), jnp.bfloat16) for heads in (N, K, K, N)
    )
    arrays = 2 * queries, keys, values, jnp.array(random.normal(size=N), jnp.float32), d_answers
    ends = np.sort(random.choice(np.arange(1, shape[1]), 5, replace=False))
    segments = np.broadcast_to(1 + np.searchsorted(ends, np.arange(shape[1]), side="right"), shape).astype(np.int32)
    segments = np.where(segments == 4, 0, segments)  # padding between segments

    once, again = (value_and_gradients(segment_attention, arrays, segments, window=window) for _ in range(2))
    exact = tuple(array.astype(jnp.float32) for array in arrays)
    wanted = value_and_gradients(trainable.segment_attention, exact, segments, window=window)
    for name, one, same, other in zip(
        ("answers", "queries", "keys", "values", "sinks"), once, again, wanted, strict=True
    ):
        assert jnp.array_equal(one, same), name
        error = jnp.linalg.norm(one.astype(jnp.float32) - other) / jnp.linalg.norm(other)
        assert error < 4e-3, name  # operands and results are bfloat16
