"""Attention with gradients on Hopper, interpreted on the CPU, against plain JAX in float32.

The interpreter compiles for seconds, so each case has several things to show: padding before, between and after
segments, segments that end within tiles, keys that nothing sees, and rows cut into as many groups as there are heads or
into one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import hopper_gradients, hopper_trainable, segment_attention, trainable
from pallas_kernels.attention.hopper_gradients_parts import TILE
from pallas_kernels.dispatch import Unsupported

B, T, N, K, H = 2, 150, 8, 1, 64
SEGMENTS = np.array([[1] * 100 + [2] * 30 + [0] * 20, [0] * 3 + [1] * 87 + [2] + [0] * 9 + [3] * 50], np.int32)


def random_arrays(seed: int) -> tuple[jax.Array, ...]:
    """Queries, keys, values, sinks and the gradient of the answers."""
    random = np.random.default_rng(seed)
    queries, keys, values, d_answers = (
        jnp.array(random.normal(size=(B, T, heads, H)), jnp.bfloat16) for heads in (N, K, K, N)
    )
    return 2 * queries, keys, values, jnp.array(random.normal(size=N), jnp.float32), d_answers


@functools.partial(jax.jit, static_argnames=("function", "static"))
def value_and_gradients(function, arrays, static):
    """The answers, and the gradients of queries, keys, values and sinks."""
    *arguments, d_answers = arrays
    answers, back = jax.vjp(
        lambda q, k, v, sinks: function(q, k, v, jnp.array(SEGMENTS), sinks, **dict(static)), *arguments
    )
    return answers, *back(d_answers.astype(answers.dtype))


@pytest.mark.parametrize(("window", "multiprocessors"), [(None, 132), (20, 1)], ids=["a head a group", "all heads"])
def test_value_and_gradients_are_those_of_float32(monkeypatch, window, multiprocessors):
    monkeypatch.setattr(hopper_trainable, "NUM_MULTIPROCESSORS", multiprocessors)
    arrays = random_arrays(0)
    ours, static = hopper_trainable.segment_attention, (("window", window), ("interpret", True))
    found = jax.block_until_ready(value_and_gradients(ours, arrays, static))  # before the device has other work
    in_float32 = tuple(array.astype(jnp.float32) for array in arrays)
    wanted = value_and_gradients(trainable.segment_attention, in_float32, (("window", window),))
    for name, one, other in zip(("answers", "queries", "keys", "values", "sinks"), found, wanted, strict=True):
        assert one.dtype == (jnp.float32 if name == "sinks" else jnp.bfloat16)
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.linalg.norm(one - other) <= 4e-3 * np.linalg.norm(other), name  # operands and results are bfloat16
        if name != "sinks":
            assert not one[SEGMENTS == 0].any(), name


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("rows_each", [1, 8])
def test_tiles_outside_the_bounds_are_not_seen(window, rows_each):
    length = 256
    segments = np.pad(SEGMENTS, ((0, 0), (0, length - T)))
    first, last = hopper_trainable.visible(jnp.array(segments), window)
    position = np.arange(length)
    sees = (np.asarray(first)[..., None] <= position) & (position <= np.asarray(last)[..., None])
    own = segments[:, :, None] == segments[:, None]
    distance = position[:, None] - position
    wanted = own & (segments > 0)[..., None] & (distance >= 0) & (distance < (window or length))
    assert (sees == wanted).all()

    of_rows, of_keys = (np.asarray(bounds) for bounds in hopper_trainable.bounds(first, last, rows_each))
    by_row = sees.repeat(rows_each, axis=1)
    size = hopper_gradients.BLOCK
    assert of_rows.shape == (B, length // size, 2)
    assert of_keys.shape == (B, length * rows_each // size, 2)
    for one, bounds in ((by_row.swapaxes(1, 2), of_rows), (by_row, of_keys)):
        for row in range(B):
            for block in range(bounds.shape[1]):
                inside = one[row, block * size : (block + 1) * size].any(axis=0)
                tiles = np.flatnonzero(inside.reshape(-1, TILE).any(axis=1))
                begin, end = bounds[row, block]
                assert begin <= end
                assert (begin, end) == (tiles[0], tiles[-1] + 1) if tiles.size else begin == end


def test_few_blocks_are_cut_by_heads():
    blocks = [hopper_trainable.splits(count, 8) for count in (1, 128, 200, 396, 5000)]
    assert blocks == [8, 4, 2, 1, 1]


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "width", "dtype", "message"),
    [
        (8, 1, 64, jnp.float32, "bfloat16, not queries float32"),
        (8, 1, 32, jnp.bfloat16, "8 of width 32 for 1"),
        (4, 1, 64, jnp.bfloat16, "4 of width 64 for 1"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(num_heads, num_kv_heads, width, dtype, message):
    queries, keys = (jnp.zeros((1, 8, heads, width), dtype) for heads in (num_heads, num_kv_heads))
    segments, sinks = jnp.ones((1, 8), jnp.int32), jnp.zeros(num_heads)
    with pytest.raises(Unsupported, match=message):
        segment_attention(queries, keys, keys, segments, sinks, window=None, impl="hopper")
