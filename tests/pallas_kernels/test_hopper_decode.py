"""The decode form of the Hopper experts: what it refuses, what its table says, and that its kernels lower.

They are inline PTX as a whole, so nothing of them runs here: what they compute is tested in tests/gpu.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.experts import hopper_decode
from pallas_kernels.experts.hopper_layout import HopperExperts
from pallas_kernels.experts.tiles import DECODE, DECODE_BEYOND, DECODE_FEW, DecodeTiles, decode

E, D, F = 6, 128, 64


def shape_of_weights(*, width: int = D, expert_width: int = F) -> HopperExperts:
    def matrix(rows: int, columns: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        tiles = (E, rows // 64, columns // 64)
        words, scales = (jax.ShapeDtypeStruct((*tiles, size), jnp.uint32) for size in (512, 32))
        return words, scales, jax.ShapeDtypeStruct((E, rows), jnp.float32)

    return HopperExperts(*matrix(2 * expert_width, width), *matrix(width, expert_width))


def lower(num_tokens: int, per_token: int, *, dtype=jnp.bfloat16, tiles: DecodeTiles | None = None, **widths: int):
    weights = shape_of_weights(**widths)
    x = jax.ShapeDtypeStruct((num_tokens, weights.width), dtype)
    ids = jax.ShapeDtypeStruct((num_tokens, per_token), jnp.int32)
    routing = jax.ShapeDtypeStruct((num_tokens, per_token), jnp.float32)

    def layer(x, weights, ids, routing):
        return hopper_decode.experts(x, weights, ids, routing, alpha=1.702, limit=7.0, tiles=tiles)

    return jax.jit(layer).trace(x, weights, ids, routing).lower(lowering_platforms=("cuda",))


def changed(**fields: int) -> DecodeTiles:
    return dataclasses.replace(DECODE_FEW, **fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": 129, "per_token": 2}, "129 tokens"),
        ({"num_tokens": 1, "per_token": 9}, "9 experts per token"),
        ({"num_tokens": 1, "per_token": 2, "dtype": jnp.float32}, "float32"),
        ({"num_tokens": 1, "per_token": 2, "tiles": changed(columns=12)}, "columns=12.* multiples of 8"),
        ({"num_tokens": 1, "per_token": 2, "tiles": changed(columns=40)}, "columns=40.* up to 32"),
        ({"num_tokens": 1, "per_token": 2, "tiles": changed(strips=4)}, "strips=4.* 1 or 2 strips"),
        ({"num_tokens": 1, "per_token": 2, "tiles": changed(warpgroups=6)}, "warpgroups=6.* 1 to 4 warpgroups"),
        ({"num_tokens": 1, "per_token": 2, "tiles": changed(num_blocks=6)}, "num_blocks=6"),
    ],
)
def test_names_what_it_cannot_take(arguments, message):
    with pytest.raises(Unsupported, match=message):
        lower(**arguments)


@pytest.mark.parametrize(("num_tokens", "per_token"), [(1, 4), (9, 8), (128, 2)])
def test_a_layer_is_two_kernels(num_tokens, per_token):
    text = lower(num_tokens, per_token).as_text()
    assert text.count("mosaic_gpu_v2") == 2


def test_lowers_for_widths_that_split_unevenly():
    lower(3, 2, width=17 * 64, expert_width=3 * 64)


@pytest.mark.parametrize("tiles", [DECODE_FEW, *(tiles for _, tiles in DECODE), DECODE_BEYOND], ids=str)
def test_lowers_with_all_tiles_of_the_table(tiles):
    lower(3, 2, tiles=tiles)


def test_passes_grow_with_the_rows_of_an_expert():
    chosen = [decode(4 * num_tokens, 32) for num_tokens in (1, 2, 3, 32, 33, 64, 65)]
    assert [tiles.columns for tiles in chosen] == [8, 8, 8, 8, 16, 16, 32]
    assert [tiles.strips for tiles in chosen] == [1, 1, 2, 2, 2, 2, 2]
    assert [tiles.scale_sums for tiles in chosen] == [tiles.columns == 8 for tiles in chosen]
