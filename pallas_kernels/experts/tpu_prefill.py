"""The expert layer on TPUs for many tokens: rows grouped by expert, two grouped products, a weighted sum."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.experts import tpu_product
from pallas_kernels.experts.tpu_layout import TPUExperts
from pallas_kernels.experts.tpu_product import RowTiles, SwiGLU, Tiles

TILE_ROWS = 128


def experts(
    x: BFloat16[Array, "T D"],
    weights: TPUExperts,
    expert_ids: Int[Array, "T A"],
    routing: Float[Array, "T A"],
    *,
    activation: SwiGLU,
    cut: Tiles,
    tile_rows: int = TILE_ROWS,
    interpret: Any = False,
) -> BFloat16[Array, "T D"]:
    """See `pallas_kernels.experts.experts`: any number of tokens but none."""
    tiles, places, sources = group(expert_ids, weights.num_experts, tile_rows)
    num_rows = sources.shape[0]
    activations = tpu_product.gate_up(
        x[sources], weights, tiles, tile_rows=tile_rows, num_rows=num_rows, activation=activation, cut=cut,
        interpret=interpret,
    )  # fmt: skip
    answers = tpu_product.down(
        activations, weights, tiles, tile_rows=tile_rows, num_rows=num_rows, cut=cut, interpret=interpret
    )
    here = places < num_rows
    # A pair that is elsewhere must not read a row that nothing wrote, which may hold NaN.
    chosen = jnp.where(here[..., None], answers[jnp.where(here, places, 0)].astype(jnp.float32), 0.0)
    return (chosen * routing.astype(jnp.float32)[..., None]).sum(axis=1).astype(x.dtype)


def group(
    expert_ids: Int[Array, "T A"], num_experts: int, tile_rows: int
) -> tuple[RowTiles, Int[Array, "T A"], Int[Array, " rows"]]:
    """Group the (token, expert) pairs by expert in tiles of `tile_rows` rows, an expert's own.

    Returns the tiles, the row of each pair (the number of rows, where its expert is elsewhere), and the token of each
    row (any, where it has none). Groups lie in the order of the experts; within a group pairs keep their order.

    Example:
        >>> tiles, places, sources = group(jnp.array([[0, 2], [2, 7], [2, 0]]), 4, 2)
        >>> tiles.experts.tolist(), tiles.sources.tolist(), tiles.num_tiles.tolist()
        ([0, 2, 2, 2, 2, 2, 2], [0, 1, 2, 2, 2, 2, 2], [3])
        >>> places.tolist(), sources[:5].tolist()
        ([[0, 2], [3, 14], [4, 1]], [0, 2, 0, 1, 2])
    """
    num_pairs = expert_ids.size
    most_tiles = num_pairs // tile_rows + min(num_pairs, num_experts)
    num_rows = most_tiles * tile_rows
    chosen_ME = expert_ids.reshape(-1, 1) == jnp.arange(num_experts)
    ordinals_ME = jnp.cumsum(chosen_ME, axis=0, dtype=jnp.int32) - 1
    tiles_E = -(-(ordinals_ME[-1] + 1) // tile_rows)
    tile_ends_E = jnp.cumsum(tiles_E)
    first_rows_E = (tile_ends_E - tiles_E) * tile_rows
    places = jnp.where(chosen_ME, first_rows_E + ordinals_ME, 0).sum(axis=1)
    places = jnp.where(chosen_ME.any(axis=1), places, num_rows)
    tokens = jnp.arange(num_pairs, dtype=jnp.int32) // expert_ids.shape[1]
    sources = jnp.zeros(num_rows, jnp.int32).at[places].set(tokens, mode="drop")

    num_tiles = tile_ends_E[-1]
    tiles = jnp.minimum(jnp.arange(most_tiles, dtype=jnp.int32), jnp.maximum(num_tiles - 1, 0))
    experts = (tiles[:, None] >= tile_ends_E).sum(axis=1, dtype=jnp.int32)
    experts = jnp.minimum(experts, num_experts - 1)
    return RowTiles(experts, tiles, tiles, num_tiles.reshape(1)), places.reshape(expert_ids.shape), sources
