"""Which row of the grouped buffer each (token, expert) pair gets, and how that buffer is cut into tiles.

Plain JAX, by counting: what the kernel of `hopper_grouping` does in one launch is defined here, and runs under the
interpreter.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from pallas_kernels.experts.hopper_layout import to_mma_order

_ROW_TILE = 8
_MAX_ONE_CHUNK = 2048
"""Up to this many pairs each is compared with all before it; beyond, with those of its chunk."""
_CHUNK = 256
_MAX_CHUNKS = 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grouping:
    """The pairs grouped by expert: the groups lie in the order of the experts, each cut into tiles of known widths."""

    places: Any
    """int32 `T A`: the row of each pair; of pairs whose expert is elsewhere, the number of rows."""
    tile_experts: Any
    """int32 `tiles`; arbitrary, like the next two, where there is no tile."""
    tile_rows: Any
    """int32 `tiles`: the first row."""
    tile_widths: Any
    """int32 `tiles`: index into the widths."""
    num_tiles: Any
    """int32 `1`: how many of the tiles are there, from the front."""


def num_grouped_rows(num_pairs: int, num_experts: int, widths: tuple[int, ...]) -> int:
    """Rows that hold any grouping of so many pairs, in whole TMA tiles of eight.

    Example:
        >>> num_grouped_rows(65 * 4, 32, (16, 32, 64))
        1256
    """
    gaps = [width - previous - 1 for previous, width in zip((0, *widths), widths, strict=False)]
    return -(-(num_pairs + min(num_pairs, num_experts) * max(gaps)) // _ROW_TILE) * _ROW_TILE


def max_tiles(num_pairs: int, num_experts: int, widths: tuple[int, ...]) -> int:
    """Tiles that hold any grouping of so many pairs."""
    return num_pairs // widths[-1] + min(num_pairs, num_experts)


def group(expert_ids: Int[Array, "T A"], num_experts: int, widths: tuple[int, ...]) -> Grouping:
    """Group the pairs by expert and cut the groups into tiles of the given widths, ascending.

    A group is as many tiles of the largest width as it fills and one more that is as narrow as holds the rest. The
    full tiles come first, in the order of the experts, then the others from wide to narrow, so that the last to start
    are the quickest. Within a group the pairs keep their order.

    Example:
        >>> grouping = group(jnp.array([[0, 2], [2, 7], [2, 0]]), 4, (1, 2))
        >>> grouping.places.tolist(), grouping.num_tiles.tolist()
        ([[0, 2], [3, 8], [4, 1]], [3])
        >>> grouping.tile_experts[:3].tolist(), grouping.tile_rows[:3].tolist(), grouping.tile_widths[:3].tolist()
        ([0, 2, 2], [0, 2, 4], [1, 1, 0])
    """
    num_tokens, per_token = expert_ids.shape
    num_pairs = num_tokens * per_token
    num_rows = num_grouped_rows(num_pairs, num_experts, widths)
    ids = _in_chunks(jnp.where((expert_ids >= 0) & (expert_ids < num_experts), expert_ids, num_experts).reshape(-1))
    counts_cE = _sum(ids[:, :, None] == jnp.arange(num_experts), axis=1)
    sizes_E = counts_cE.sum(axis=0)

    full_E = sizes_E // widths[-1]
    rest_E = sizes_E - full_E * widths[-1]
    rest_index_E, rest_width_E = _narrowest(rest_E, widths)
    starts_E = _sum_before(full_E * widths[-1] + rest_width_E)

    places = _places(ids, counts_cE, starts_E, num_pairs=num_pairs, num_rows=num_rows)

    first_full_E = _sum_before(full_E)
    num_full = full_E.sum()
    earlier = (rest_width_E > rest_width_E[:, None]) | (
        (rest_width_E == rest_width_E[:, None]) & (jnp.arange(num_experts) < jnp.arange(num_experts)[:, None])
    )
    rest_tile_E = num_full + _sum(earlier & (rest_E > 0), axis=1)

    tiles = jnp.arange(max_tiles(num_pairs, num_experts, widths), dtype=jnp.int32)[:, None]
    is_full = (tiles >= first_full_E) & (tiles < first_full_E + full_E)
    is_rest = (tiles == rest_tile_E) & (rest_E > 0)
    offset = jnp.where(is_full, tiles - first_full_E, full_E) * widths[-1]

    def of_tile(values: Array) -> Array:
        return jnp.where(is_full | is_rest, values, 0).sum(axis=1)

    return Grouping(
        places=places.reshape(num_tokens, per_token),
        tile_experts=of_tile(jnp.arange(num_experts, dtype=jnp.int32)),
        tile_rows=of_tile(starts_E + offset),
        tile_widths=of_tile(jnp.where(is_full, jnp.int32(len(widths) - 1), rest_index_E)),
        num_tiles=(num_full + _sum(rest_E > 0, axis=0)).reshape(1),
    )


def spread(
    x: Shaped[Array, "T D"], expert_ids: Int[Array, "T A"], num_experts: int, widths: tuple[int, ...]
) -> tuple[Shaped[Array, "rows D"], Grouping]:
    """Group the pairs and copy each token to its pairs' rows, columns in mma order; other rows are arbitrary."""
    grouping = group(expert_ids, num_experts, widths)
    rows = jnp.zeros((num_grouped_rows(expert_ids.size, num_experts, widths), x.shape[1]), x.dtype)
    return rows.at[grouping.places].set(to_mma_order(x)[:, None], mode="drop"), grouping


def _in_chunks(ids: Int[Array, " M"]) -> Int[Array, "chunks chunk"]:
    """Cut into chunks, filled up with an id that is no expert's."""
    num_pairs = ids.shape[0]
    chunk = num_pairs if num_pairs <= _MAX_ONE_CHUNK else max(_CHUNK, -(-num_pairs // _MAX_CHUNKS))
    padding = -num_pairs % chunk
    return jnp.pad(ids.astype(jnp.int32), (0, padding), constant_values=-1).reshape(-1, chunk)


def _places(
    ids: Int[Array, "chunks chunk"],
    counts_cE: Int[Array, "chunks E"],
    starts_E: Int[Array, " E"],
    *,
    num_pairs: int,
    num_rows: int,
) -> Int[Array, " M"]:
    """The row of each pair; `num_rows` for those with no expert here."""
    num_chunks, chunk = ids.shape
    num_experts = starts_E.shape[0]
    earlier_chunk = jnp.arange(num_chunks)[:, None] > jnp.arange(num_chunks)
    before_cE = starts_E + jnp.where(earlier_chunk[:, :, None], counts_cE, 0).sum(axis=1)
    earlier = jnp.arange(chunk)[:, None] > jnp.arange(chunk)
    rank = _sum((ids[:, :, None] == ids[:, None, :]) & earlier, axis=2)
    known = (ids >= 0) & (ids < num_experts)
    start = jnp.take_along_axis(before_cE, jnp.clip(ids, 0, num_experts - 1), axis=1)
    return jnp.where(known, start + rank, num_rows).reshape(-1)[:num_pairs]


def _narrowest(sizes_E: Int[Array, " E"], widths: tuple[int, ...]) -> tuple[Int[Array, " E"], Int[Array, " E"]]:
    """The narrowest width that holds each size and its index; for size 0, width 0."""
    index, width = jnp.zeros_like(sizes_E), jnp.zeros_like(sizes_E)
    for place, (previous, wider) in enumerate(zip((0, *widths), widths, strict=False)):
        index = jnp.where(sizes_E > previous, place, index)
        width = jnp.where(sizes_E > previous, wider, width)
    return index, width


def _sum_before(values_E: Int[Array, " E"]) -> Int[Array, " E"]:
    """The exclusive running sum, as one reduction."""
    places = jnp.arange(values_E.shape[0])
    return jnp.where(places < places[:, None], values_E, 0).sum(axis=1)


def _sum(flags: Array, *, axis: int) -> Array:
    return flags.sum(axis=axis, dtype=jnp.int32)
