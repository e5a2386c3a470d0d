"""The Hopper layout of the expert weights, against the published format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mxfp4
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.experts import ExpertWeights, hopper_layout
from pallas_kernels.experts.hopper_layout import (
    LARGEST_SCALE,
    HopperExperts,
    from_mma_order,
    to_mma_order,
)
from pallas_kernels.experts.weights import ScaleTooLarge, refuse_large_scales
from pallas_kernels.mxfp4 import MXFP4
from pallas_kernels.mxfp4 import pack as pack_codes

E, D, F = 3, 192, 128
PLACES = ((15, 8, 7, 6), (9, 2, 1, 0), (3, 28, 27, 26), (13, 14, 5, 4))
"""Bits of a word that hold code 2j, from the sign to the lowest; code 2j + 1's are 16 further, around the word."""

pack = jax.jit(hopper_layout.pack)
dequantize = jax.jit(hopper_layout.dequantize, static_argnums=2)
dequantize_published = jax.jit(mxfp4.dequantize)


def random_weights(seed: int = 0, *, width: int = D, expert_width: int = F) -> ExpertWeights:
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> MXFP4:
        shape = (E, rows, columns // 32)
        blocks = random.integers(0, 256, (*shape, 16), np.uint8)
        return MXFP4(jnp.array(blocks), jnp.array(random.integers(1, 129, shape, np.uint8)))

    def bias(rows: int) -> jax.Array:
        return jnp.array(random.normal(size=(E, rows)), jnp.float32)

    return ExpertWeights(
        matrix(2 * expert_width, width), bias(2 * expert_width), matrix(width, expert_width), bias(width)
    )


def published_row(packed_row: int) -> int:
    """The row of gate_up that the contract puts at a packed row, computed from its words."""
    tile, row = divmod(packed_row, 64)
    warp, r, g = row // 16, row // 8 % 2, row % 8
    place = 8 * warp + g
    a, h, t, p = place // 16, place // 8 % 2, place // 2 % 4, place % 2
    return 2 * (32 * tile + 8 * t + 4 * a + 2 * h + p) + r


def published_column(column: int) -> int:
    """The actual column that the contract calls `column` in mma order."""
    tile, k = divmod(column, 64)
    c, a, h, t, p = k // 32, k // 16 % 2, k // 8 % 2, k // 2 % 4, k % 2
    return 64 * tile + 32 * c + 8 * t + 4 * a + 2 * h + p


def rows_of(words, scales) -> np.ndarray:
    values = np.asarray(dequantize(words, scales))
    return values.reshape(values.shape[0], -1, values.shape[-1])


def test_values_are_those_of_the_published_matrices():
    weights = random_weights()
    packed = pack(weights)
    gate_up, down = (np.asarray(dequantize_published(matrix)) for matrix in (weights.gate_up, weights.down))
    rows = [published_row(row) for row in range(2 * F)]
    columns = [published_column(column) for column in range(D)]
    assert sorted(rows) == list(range(2 * F))
    np.testing.assert_array_equal(rows_of(packed.gate_up_words, packed.gate_up_scales), gate_up[:, rows][:, :, columns])
    np.testing.assert_array_equal(packed.gate_up_bias, np.asarray(weights.gate_up_bias)[:, rows])
    np.testing.assert_array_equal(rows_of(packed.down_words, packed.down_scales), down[:, :, columns[:F]])
    np.testing.assert_array_equal(packed.down_bias, weights.down_bias)


def test_every_code_under_every_scale():
    codes = np.arange(64 * 128, dtype=np.uint8).reshape(1, 64, 128) % 16
    codes = np.random.default_rng(1).permuted(codes, axis=-1)
    for start in range(1, 129, 32):
        scales = (start + np.arange(64 * 4).reshape(1, 64, 4) % 32).astype(np.uint8)
        matrix = MXFP4(pack_codes(jnp.array(codes)), jnp.array(scales))
        packed = pack(ExpertWeights(matrix, jnp.zeros((1, 64)), matrix, jnp.zeros((1, 64))))
        expected = to_mma_order(dequantize_published(matrix))
        found = dequantize(packed.down_words, packed.down_scales).reshape(1, 64, 128)
        np.testing.assert_array_equal(np.asarray(found).view(np.uint32), np.asarray(expected).view(np.uint32))


def test_words_and_scales_lie_where_the_contract_says():
    weights = random_weights(2)
    packed = pack(weights)
    blocks, scales = np.asarray(weights.down.blocks), np.asarray(weights.down.scales)
    words, scale_words = np.asarray(packed.down_words), np.asarray(packed.down_scales)
    random = np.random.default_rng(3)
    for _ in range(50):
        expert, tile, k, thread = (int(random.integers(end)) for end in (E, D // 64, F // 64, 128))
        c, r = (int(random.integers(2)) for _ in range(2))
        w, g, t = thread // 32, thread // 4 % 8, thread % 4
        row = 64 * tile + 16 * w + 8 * r + g
        assert (scale_words[expert, tile, k, 8 * w + g] >> 8 * (2 * c + r)) & 255 == scales[
            expert, row, 2 * k + c
        ] + 126
        word = int(words[expert, tile, k, thread * 4 + 2 * c + r])
        for j in range(4):
            for p in range(2):
                bits = [(word >> (place + 16 * p) % 32) & 1 for place in PLACES[j]]
                code = 8 * bits[0] + 4 * bits[1] + 2 * bits[2] + bits[3]
                k_in_tile = published_column(32 * c + 8 * j + 2 * t + p)
                byte = int(blocks[expert, row, 2 * k + k_in_tile // 32, k_in_tile % 32 // 2])
                assert code == (byte >> 4 * (k_in_tile % 2)) & 15


def test_orders_of_columns_are_inverse():
    x = jnp.arange(3 * 192).reshape(3, 192)
    np.testing.assert_array_equal(to_mma_order(x)[0], [published_column(column) for column in range(192)])
    np.testing.assert_array_equal(from_mma_order(to_mma_order(x)), x)


def test_bfloat16_holds_the_values():
    packed = pack(random_weights(4))
    exact = dequantize(packed.down_words, packed.down_scales)
    rounded = dequantize(packed.down_words, packed.down_scales, jnp.bfloat16)
    np.testing.assert_array_equal(rounded.astype(jnp.float32), exact)


def test_widths_are_those_of_the_weights():
    packed = jax.eval_shape(pack, random_weights())
    assert isinstance(packed, HopperExperts)
    assert (packed.num_experts, packed.width, packed.expert_width) == (E, D, F)


@pytest.mark.parametrize(("width", "expert_width"), [(96, 128), (128, 96)])
def test_odd_widths_are_refused(width, expert_width):
    with pytest.raises(Unsupported, match=f"D = {width} and F = {expert_width}"):
        pack(random_weights(width=width, expert_width=expert_width))


def test_a_large_scale_is_refused():
    weights = random_weights()
    refuse_large_scales(weights, LARGEST_SCALE)
    scales = weights.down.scales.at[1, 2, 3].set(129)
    damaged = ExpertWeights(
        weights.gate_up, weights.gate_up_bias, MXFP4(weights.down.blocks, scales), weights.down_bias
    )
    with pytest.raises(ScaleTooLarge, match="down has a scale byte of 129"):
        refuse_large_scales(damaged, LARGEST_SCALE)
