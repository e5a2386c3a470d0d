"""The decode form of the Hopper experts: what it accepts, and that its kernels lower; their sums need a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.experts import hopper_decode
from pallas_kernels.experts.hopper_decode import DecodeTiles, choose_tiles
from pallas_kernels.experts.hopper_layout import HopperExperts

E, D, F = 6, 128, 64


def shape_of_weights(*, width: int = D, expert_width: int = F) -> HopperExperts:
    def tiles(rows: int, columns: int):
        return [jax.ShapeDtypeStruct((E, rows // 64, columns // 64, size), jnp.uint32) for size in (512, 32)]

    def bias(rows: int):
        return jax.ShapeDtypeStruct((E, rows), jnp.float32)

    return HopperExperts(
        *tiles(2 * expert_width, width), bias(2 * expert_width), *tiles(width, expert_width), bias(width)
    )


def lower(num_tokens: int, per_token: int, *, dtype=jnp.bfloat16, tiles: DecodeTiles | None = None, **widths: int):
    weights = shape_of_weights(**widths)
    x = jax.ShapeDtypeStruct((num_tokens, weights.width), dtype)
    ids = jax.ShapeDtypeStruct((num_tokens, per_token), jnp.int32)
    routing = jax.ShapeDtypeStruct((num_tokens, per_token), jnp.float32)

    def layer(x, weights, ids, routing):
        return hopper_decode.experts(x, weights, ids, routing, alpha=1.702, limit=7.0, tiles=tiles)

    return jax.jit(layer).trace(x, weights, ids, routing).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": 129, "per_token": 2}, "129 tokens"),
        ({"num_tokens": 1, "per_token": 9}, "9 experts per token"),
        ({"num_tokens": 1, "per_token": 2, "dtype": jnp.float32}, "float32"),
        ({"num_tokens": 1, "per_token": 2, "tiles": DecodeTiles(12)}, "columns=12"),
        ({"num_tokens": 1, "per_token": 2, "tiles": DecodeTiles(8, num_blocks=6)}, "num_blocks=6"),
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


def test_passes_grow_with_the_rows_of_an_expert():
    columns = [choose_tiles(4 * num_tokens, 32).columns for num_tokens in (1, 8, 32, 64, 128)]
    assert columns == [8, 8, 8, 16, 32]


def test_tiles_are_hashable_and_static():
    assert hash(dataclasses.replace(DecodeTiles(8), strips=2)) != hash(DecodeTiles(8))
