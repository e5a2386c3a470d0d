"""The order in which the blocks of the prefill kernel take the tiles of its plan."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels.attention.hopper_prefill_plan import BEGIN, END

Index = int | Int[Array, ""]


class Tiles:
    """Which tiles a block attends for, one after the other."""

    def __init__(self, plan: Any, num_heads: int, *, blocks: int, pages: int) -> None:
        self.plan, self.num_heads, self.pages = plan, num_heads, pages
        self.total = plan.shape[0] * plan.shape[1] * num_heads
        self.num_blocks = min(blocks, self.total)
        self.turns = -(-self.total // self.num_blocks)

    def _index(self, turn: Index) -> Int[Array, ""]:
        """The largest tiles come first, and the block that has the largest of a turn the smallest of the next."""
        block = lax.axis_index("block")
        return turn * self.num_blocks + jnp.where(lax.rem(turn, 2) == 0, block, self.num_blocks - 1 - block)

    def exists(self, turn: Index) -> Bool[Array, ""]:
        """Whether there is one for the block in this turn."""
        return self._index(turn) < self.total

    def place(self, turn: Index) -> tuple[Index, Index, Index]:
        """Row, tile and kv head. The last tokens of a row see most."""
        index = jnp.minimum(self._index(turn), self.total - 1)
        rest, head = lax.div(index, self.num_heads), lax.rem(index, self.num_heads)
        batch, num_tiles = self.plan.shape[:2]
        return lax.rem(rest, batch), num_tiles - 1 - lax.div(rest, batch), head

    def steps(self, row: Index, tile: Index) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """The first page, and the number of steps."""
        begin, end = self.plan[row, tile, BEGIN], self.plan[row, tile, END]
        return begin, lax.div(end - begin + self.pages - 1, self.pages)
