"""What the blocks of the prefill kernel must know of their tokens, found once for all layers of a kind.

Plain JAX on small integers. Layers whose tokens see the same keys share it: XLA computes equal expressions once.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

SLOTS = 64
WARPGROUP_TOKENS = 8
GROUP = 8

BEGIN, END, LOW, HIGH, HAS_HOLES = range(5)
"""Of a tile: the pages [BEGIN, END) that any of its tokens sees, the first and last slot, and whether slots between
those two are seen by no token."""
WARPGROUP_FACTS = 5
"""Then two numbers a warpgroup: slots from the first to the second are seen by all of its tokens."""

_FAR = 2**30


def plan(
    first: Int[Array, "B T"], last: Int[Array, "B T"], *, warpgroups: int
) -> tuple[Int[Array, "B tiles facts"], Int[Array, "B tiles warpgroups 2 rows"]]:
    """Facts of the tiles of `warpgroups` x 8 tokens, and the first and last slot each row of a tile sees.

    A row is one query head of one token; tokens past the end see nothing.
    """
    batch, num_tokens = first.shape
    tile_tokens = warpgroups * WARPGROUP_TOKENS
    num_tiles = -(-num_tokens // tile_tokens)
    padding = ((0, 0), (0, num_tiles * tile_tokens - num_tokens))
    first = jnp.pad(first.astype(jnp.int32), padding).reshape(batch, num_tiles, tile_tokens)
    last = jnp.pad(last.astype(jnp.int32), padding, constant_values=-1).reshape(batch, num_tiles, tile_tokens)
    sees = first <= last
    low = jnp.where(sees, first, _FAR)
    high = jnp.where(sees, last, -1)
    lowest, highest = low.min(-1), high.max(-1)

    # The slots seen are in one piece if every token but the lowest continues where one that begins before it ends.
    continues = (low[..., None, :] < low[..., None]) & (high[..., None, :] >= low[..., None] - 1)
    has_holes = (sees & (low > lowest[..., None]) & ~continues.any(-1)).any(-1)

    begin = jnp.where(highest < 0, 0, lowest // SLOTS)
    tile_facts = jnp.stack([begin, highest // SLOTS + 1, lowest, highest, has_holes.astype(jnp.int32)], -1)
    by_warpgroup = (batch, num_tiles, warpgroups, WARPGROUP_TOKENS)
    all_from = jnp.where(sees, first, 0).reshape(by_warpgroup).max(-1)
    all_to = jnp.where(sees, last, _FAR).reshape(by_warpgroup).min(-1)
    warpgroup_facts = jnp.stack([all_from, all_to], -1).reshape(batch, num_tiles, -1)

    rows = jnp.stack([first.reshape(by_warpgroup), last.reshape(by_warpgroup)], axis=-2)
    return jnp.concatenate([tile_facts, warpgroup_facts], -1), jnp.repeat(rows, GROUP, axis=-1)
