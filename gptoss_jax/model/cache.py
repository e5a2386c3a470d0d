"""The key/value cache: pools of pages, one page table per layer kind, one length per row.

A full layer's table grows with the context. A sliding layer's table is a ring: page number p of a row lies in entry
p modulo the ring's width, and the ring is just wide enough for the window and one chunk of new tokens. That width is
all that tells the two kinds apart, so writing, reading and masking are one code.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from gptoss_jax.config import LayerKind, ModelConfig
from gptoss_jax.errors import CacheError
from gptoss_jax.sharding import (
    DEVICES,
    MODEL_AXES,
    AxisNames,
    activation,
    ambient_mesh,
    check_batch,
    head_axes,
    per_row,
)
from pallas_kernels.attention import pool_width
from pallas_kernels.dispatch import platform
from pallas_kernels.exchange import MOST_SENT, MOST_TOKENS, Mailbox, Mailboxes

PAGE_SLOTS = 64
"""Tokens in a page."""
_FEWEST_MAILED = 16
"""Tokens that a mailbox holds at least: the shortest chunk of a prompt."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """Where the tokens of one chunk go in a layer kind's pools, and which keys they see.

    Page numbers at or past the pool's end stand for "nowhere": what is written there is dropped.
    """

    pages: Any
    """`B T`: the page each new key and value is written to."""
    slots: Any
    """`B T`: the slot within that page."""
    table: Any
    """`B pages`: the row's pages in the order of their positions."""
    first: Any
    """`B T`: the first key visible to each token, counted in slots from the table's beginning."""
    last: Any
    """`B T`: the last one; below `first` for tokens that are padding."""
    window: int = dataclasses.field(metadata={"static": True})
    """The most keys that a token sees."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, for the rows of one batch.

    Example:
        >>> from gptoss_jax.config import gpt_oss_20b
        >>> cache = jax.eval_shape(lambda: Cache.create(gpt_oss_20b(), batch=1, max_length=131072))
        >>> cache.nbytes / 2**20  # MiB: 3072 of full layers, 16.5 of sliding layers
        3088.5
    """

    keys: tuple[Any, ...]
    """One pool per layer, `P K slots W`; layers of one kind use the same page numbers."""
    values: tuple[Any, ...]
    tables: dict[LayerKind, Any]
    """Per layer kind `B pages`: the page numbers of each row, counted within the row's own data shard."""
    lengths: Any
    """`B`: tokens held so far."""
    mailboxes: Mailboxes
    """Where devices that share a layer's sums leave their parts for each other, by the axes that they span; empty where
    the compiler's all-reduce does it."""
    max_length: int = dataclasses.field(metadata={"static": True})
    """Places for tokens that a row has, in whole pages."""
    max_chunk: int = dataclasses.field(metadata={"static": True})
    """The most tokens one step may add to a row."""

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        *,
        batch: int,
        max_length: int,
        max_chunk: int = 512,
        dtype: Any = jnp.bfloat16,
        mesh: Mesh | None = None,
        mailboxes: bool | None = None,
    ) -> "Cache":
        """An empty cache with room for `max_length` tokens in each of `batch` rows.

        Its bytes: 2 * K * H * itemsize for each token of each full layer, and for each sliding layer a ring that
        holds the window and one chunk, whatever `max_length` is. On a TPU H counts as the next multiple of 128.

        Without `mesh` the cache goes where the ambient mesh says, so that a traced function can make one. `mailboxes`,
        by default as `mails(mesh)` says and none without a mesh, are for programs that call `met` before all else.

        Raises CacheError if `max_length` is outside the model's context, ShardingError if rows do not divide.
        """
        if not 0 < max_length <= config.max_context:
            raise CacheError(
                f"room for {max_length} tokens asked for",
                where=f"a model with a context of {config.max_context}",
                fix=f"ask for 1 to {config.max_context}",
            )
        if mesh is not None:
            check_batch(batch, mesh)
            with jax.set_mesh(mesh):
                return _create_on_mesh(
                    config,
                    batch=batch,
                    max_length=max_length,
                    max_chunk=max_chunk,
                    dtype=dtype,
                    mailboxes=mails(mesh) if mailboxes is None else mailboxes,
                )
        max_chunk = min(max_chunk, max_length)
        all_pages = -(-max_length // PAGE_SLOTS)
        ring_pages = -(-(config.sliding_window + max_chunk - 2) // PAGE_SLOTS) + 1
        widths: dict[LayerKind, int] = {
            "full_attention": all_pages,
            "sliding_attention": min(ring_pages, all_pages),
        }

        ambient = jax.sharding.get_abstract_mesh()
        rows_in_shard = batch // ambient.shape.get("data", 1)

        heads = head_axes(config.num_kv_heads, ambient)

        def zeros(dims: str, shape: tuple[int, ...], dtype: Any) -> Array:
            return jnp.zeros(shape, dtype, out_sharding=None if ambient.empty else activation(dims, heads))

        width = pool_width(config.head_dim)

        def pools() -> tuple[Array, ...]:
            return tuple(
                zeros("P K S W", (batch * widths[kind], config.num_kv_heads, PAGE_SLOTS, width), dtype)
                for kind in config.layer_kinds
            )

        def table(width: int) -> Array:
            row = zeros("B", (batch,), jnp.int32) + jnp.arange(batch, dtype=jnp.int32) % rows_in_shard
            return row[:, None] * width + jnp.arange(width, dtype=jnp.int32)

        return cls(
            keys=pools(),
            values=pools(),
            tables={kind: table(widths[kind]) for kind in sorted(set(config.layer_kinds))},
            lengths=zeros("B", (batch,), jnp.int32),
            mailboxes=_mailboxes(config, rows_in_shard) if mailboxes and dtype == jnp.bfloat16 else {},
            max_length=all_pages * PAGE_SLOTS,  # in whole pages: lengths of equal shapes share programs
            max_chunk=max_chunk,
        )

    @property
    def batch(self) -> int:
        """Rows."""
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, over all devices."""
        return sum(pool.size * pool.dtype.itemsize for pool in (*self.keys, *self.values))

    def met(self) -> "Cache":
        """The same cache once every device that mails parts of sums has come to this program. Needs an ambient mesh."""

        def meet(mailboxes: Mailboxes) -> Mailboxes:
            return {axes: mailbox.met(axes) for axes, mailbox in mailboxes.items()}

        if not self.mailboxes:
            return self
        met = jax.shard_map(meet, in_specs=DEVICES, out_specs=DEVICES, check_vma=False)(self.mailboxes)
        return dataclasses.replace(self, mailboxes=met)

    def step(self, kind: LayerKind, counts: Int[Array, " B"], num_tokens: int, config: ModelConfig) -> Step:
        """Plan the addition of `counts[b]` tokens to each row, out of a chunk of `num_tokens` (the rest is padding)."""
        window = config.sliding_window if kind == "sliding_attention" else config.max_context
        pool = self.keys[config.layer_kinds.index(kind)]
        slots_per_page = pool.shape[2]

        def plan(table: Int[Array, "B pages"], lengths: Int[Array, " B"], counts: Int[Array, " B"]) -> Step:
            width, ring = table.shape[1], table
            offset = jnp.arange(num_tokens, dtype=jnp.int32)
            position = lengths[:, None] + offset
            is_token = offset < counts[:, None]
            # No number here is negative: `div` and `rem` then do what `//` and `%` do, in fewer operations.
            entry, slot = jax.lax.div(position, slots_per_page), jax.lax.rem(position, slots_per_page)
            base = 0
            if width * slots_per_page < self.max_length:  # else a row never comes round, its ring is in order
                entry = jax.lax.rem(entry, width)
                last_page = jax.lax.div(jnp.maximum(lengths + counts - 1, 0), slots_per_page)
                base_page = jnp.maximum(last_page - width + 1, 0)[:, None]
                order = jax.lax.rem(base_page + jnp.arange(width, dtype=jnp.int32), width)
                base, table = base_page * slots_per_page, jnp.take_along_axis(ring, order, axis=1)
            page = jnp.take_along_axis(ring, entry, axis=1)
            return Step(
                pages=jnp.where(is_token, page, pool.shape[0]),
                slots=slot,
                table=table,
                first=jnp.maximum(position - window + 1, 0) - base,
                last=jnp.where(is_token, position - base, -1),
                window=window,
            )

        return per_row(plan)(self.tables[kind], self.lengths, counts)


def mails(mesh: Mesh) -> bool:
    """Whether devices of the mesh leave parts of sums in each other's memory: Hopper GPUs of one process, by their
    numbers in order, as Mosaic counts them."""
    numbers = [device.id for device in mesh.devices.flat]
    with ambient_mesh(mesh):
        return jax.process_count() == 1 and platform() == "hopper" and numbers == list(range(mesh.size))


def _mailboxes(config: ModelConfig, rows: int) -> Mailboxes:
    """Empty mailboxes for steps of so many rows, for each group of devices that shares a layer's sums."""
    mesh = jax.sharding.get_abstract_mesh()

    def empty(axes: AxisNames) -> Mailbox:
        senders = math.prod(mesh.shape[axis] for axis in axes)
        most = min(max(rows, _FEWEST_MAILED), MOST_TOKENS, MOST_SENT // max(1, senders - 1))
        shape = Mailbox.shape(most, config.hidden_size, senders=senders)
        return jax.tree.map(
            lambda leaf: jnp.zeros((mesh.size, *leaf.shape[1:]), leaf.dtype, out_sharding=DEVICES), shape
        )

    groups = head_axes(config.num_kv_heads, mesh), MODEL_AXES
    return {axes: empty(axes) for axes in groups if any(mesh.shape[axis] > 1 for axis in axes)}


_create_on_mesh = jax.jit(
    Cache.create, static_argnums=0, static_argnames=("batch", "max_length", "max_chunk", "dtype", "mailboxes")
)
