"""Memory for parts of a sum that other devices write into."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

MOST_TOKENS = 128
MOST_SENT = 256
"""Rows that a device writes for one sum, over all that it writes to: beyond, rings (NCCL's) move fewer bytes."""
_WORDS_PER_VALUE = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mailbox:
    """Where the devices of a group leave their parts of a sum for this one, and which sum is the next.

    Both arrays have a row per device of the mesh, this device's alone inside shard_map. Every device must take part in
    every sum, in the same order, through the one mailbox that it hands on, and nobody may copy it: a part may arrive
    before its sum is asked for.
    """

    boxes: Any
    """uint32 `devices 2 senders words`: a pair in turn, for each sender of the group a value and the sum's number."""
    number: Any
    """int32 `devices`: sums before this program, or before this turn of its loop."""
    calls: int = dataclasses.field(default=0, metadata={"static": True})
    """Sums since."""

    @classmethod
    def shape(cls, num_tokens: int, width: int, *, senders: int) -> "Mailbox":
        """What the mailbox of one device takes for rows of `width` values, at most `num_tokens` at a time.

        Example:
            >>> Mailbox.shape(8, 2880, senders=2).boxes.shape
            (1, 2, 2, 46080)
        """
        boxes = jax.ShapeDtypeStruct((1, 2, senders, num_tokens * width * _WORDS_PER_VALUE), jnp.uint32)
        return cls(boxes, jax.ShapeDtypeStruct((1,), jnp.int32))

    def holds(self, num_tokens: int, width: int, *, senders: int) -> bool:
        """Whether a sum of so many rows fits, and is small enough for each device to write to each other."""
        fits = num_tokens * width * _WORDS_PER_VALUE <= self.boxes.shape[3] and senders <= self.boxes.shape[2]
        return fits and num_tokens * (senders - 1) <= MOST_SENT

    def met(self, axes: tuple[str, ...]) -> "Mailbox":
        """The same once every device of the group has come here: to be called, inside shard_map, by a program that is
        given mailboxes, before its first sum, since another device may not have come to making them."""
        return dataclasses.replace(self, number=jax.lax.pmax(self.number, axes))

    def used(self, boxes: Array) -> "Mailbox":
        """The mailbox after one more sum."""
        return dataclasses.replace(self, boxes=boxes, calls=self.calls + 1)

    def settled(self) -> "Mailbox":
        """The same with its sums counted in `number`: what a loop can carry."""
        return Mailbox(self.boxes, self.number + jnp.int32(self.calls))
