"""The expert layer on TPUs for few tokens: every expert that anyone chose meets all tokens.

The matrix unit takes up to 128 rows in the time it takes to load its weights, so rows are not gathered by expert; a
token's share of an expert it did not choose is zero.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.experts import tpu_product
from pallas_kernels.experts.tpu_layout import TPUExperts
from pallas_kernels.experts.tpu_product import RowTiles, SwiGLU, Tiles

MAX_TOKENS = 128
_ROWS = 16
"""Rows of bfloat16 in a vector register."""


def experts(
    x: BFloat16[Array, "T D"],
    weights: TPUExperts,
    expert_ids: Int[Array, "T A"],
    routing: Float[Array, "T A"],
    *,
    activation: SwiGLU,
    cut: Tiles,
    interpret: Any = False,
) -> BFloat16[Array, "T D"]:
    """See `pallas_kernels.experts.experts`: up to 128 tokens."""
    num_tokens = x.shape[0]
    rows = jnp.pad(x, ((0, -num_tokens % _ROWS), (0, 0)))
    tiles, shares = chosen_experts(expert_ids, routing, weights.num_experts)
    shares = jnp.pad(shares, ((0, 0), (0, rows.shape[0] - num_tokens)))[:, :, None]
    activations = tpu_product.gate_up(
        rows,
        weights,
        tiles,
        tile_rows=rows.shape[0],
        num_rows=shares.shape[0] * rows.shape[0],
        activation=activation,
        cut=cut,
        interpret=interpret,
    )
    # The second product's input rows are where the first one's result rows went.
    tiles = RowTiles(tiles.experts, tiles.targets, tiles.targets, tiles.num_tiles)
    return tpu_product.down_and_sum(activations, weights, tiles, shares, cut=cut, interpret=interpret)[:num_tokens]


def chosen_experts(
    expert_ids: Int[Array, "T A"], routing: Float[Array, "T A"], num_experts: int
) -> tuple[RowTiles, Float[Array, "tiles T"]]:
    """A row tile for each expert here that some token chose, ascending, and each token's share of it.

    Example:
        >>> tiles, shares = chosen_experts(jnp.array([[3, 0], [3, 9]]), jnp.array([[0.75, 0.25], [0.5, 0.5]]), 5)
        >>> tiles.experts.tolist(), tiles.num_tiles.tolist()
        ([0, 3, 3, 3], [2])
        >>> shares[:2].tolist()
        [[0.25, 0.0], [0.75, 0.5]]
    """
    most = min(expert_ids.size, num_experts)
    chosen_TAE = expert_ids[:, :, None] == jnp.arange(num_experts)
    shares_TE = jnp.where(chosen_TAE, routing.astype(jnp.float32)[:, :, None], 0.0).sum(axis=1)
    present_E = chosen_TAE.any(axis=(0, 1))
    place_E = jnp.cumsum(present_E, dtype=jnp.int32) - 1
    num_tiles = present_E.sum(dtype=jnp.int32)
    places = jnp.arange(most, dtype=jnp.int32)
    targets = jnp.minimum(places, jnp.maximum(num_tiles - 1, 0))
    is_of_tile = present_E & (place_E == targets[:, None])
    experts = jnp.where(is_of_tile, jnp.arange(num_experts, dtype=jnp.int32), 0).sum(axis=1)
    shares = jnp.where(is_of_tile[:, :, None], shares_TE.T, 0.0).sum(axis=1)
    return RowTiles(experts, jnp.zeros_like(targets), targets, num_tiles.reshape(1)), shares
