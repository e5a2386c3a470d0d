"""Attention over pages in plain JAX, in float32: what every kernel is compared with, and what runs on a CPU."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_BLOCK_SLOTS = 512
"""Keys visited at a time: bounds the scores in memory, whatever the context."""


def attention(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "P K slots W"],
    values: Float[Array, "P K slots W"],
    page_table: Int[Array, "B pages"],
    first: Int[Array, "B T"],
    last: Int[Array, "B T"],
    sinks: Float[Array, " N"],
    *,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.attention.attention`; `window` makes no difference here.

    Visits the keys block by block with a running maximum and denominator (Milakov and Gimelshein 2018, arXiv
    1805.02867), which start from the sink; blocks that no query sees are skipped.
    """
    batch, num_queries, _, width = queries.shape
    num_kv_heads, slots_per_page = keys.shape[1:3]
    pages_per_block = max(1, min(page_table.shape[1], _BLOCK_SLOTS // slots_per_page))
    num_blocks = -(-page_table.shape[1] // pages_per_block)
    padding = num_blocks * pages_per_block - page_table.shape[1]
    tables = jnp.pad(page_table, ((0, 0), (0, padding))).reshape(batch, num_blocks, pages_per_block)
    block_slots = pages_per_block * slots_per_page

    grouped = queries.astype(jnp.float32).reshape(batch, num_queries, num_kv_heads, -1, width) * width**-0.5
    grouped_sinks = sinks.astype(jnp.float32).reshape(num_kv_heads, -1)
    running_max = jnp.broadcast_to(grouped_sinks, grouped.shape[:-1])
    some_visible = first <= last
    lowest = jnp.min(jnp.where(some_visible, first, jnp.iinfo(first.dtype).max))
    highest = jnp.max(jnp.where(some_visible, last, -1))

    def visit(carry: tuple[Array, Array, Array], block: Int[Array, ""]) -> tuple[Array, Array, Array]:
        pages = jax.lax.dynamic_index_in_dim(tables, block, axis=1, keepdims=False)
        slot = block * block_slots + jnp.arange(block_slots)
        visible = (slot >= first[..., None]) & (slot <= last[..., None])
        return _add_block(carry, grouped, _gather(keys, pages, width), _gather(values, pages, width), visible)

    def step(carry: tuple[Array, Array, Array], block: Int[Array, ""]) -> tuple[tuple[Array, Array, Array], None]:
        needed = (block * block_slots <= highest) & ((block + 1) * block_slots > lowest)
        return jax.lax.cond(needed, visit, lambda carry, _: carry, carry, block), None

    start = (running_max, jnp.ones_like(running_max), jnp.zeros_like(grouped))
    (_, denominator, weighted), _ = jax.lax.scan(step, start, jnp.arange(num_blocks))
    return (weighted / denominator[..., None]).reshape(queries.shape).astype(queries.dtype)


def _gather(
    pool: Float[Array, "P K slots W"], pages: Int[Array, "B pages"], width: int
) -> Float[Array, "B K block_slots H"]:
    gathered = pool[pages][..., :width].astype(jnp.float32).swapaxes(1, 2)
    return gathered.reshape(*gathered.shape[:2], -1, gathered.shape[-1])


def _add_block(
    carry: tuple[Float[Array, "B T K G"], Float[Array, "B T K G"], Float[Array, "B T K G H"]],
    queries: Float[Array, "B T K G H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B T S"],
) -> tuple[Array, Array, Array]:
    running_max, denominator, weighted = carry
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    scores = einsum("BTKGH,BKSH->BTKGS", queries, keys)
    scores = jnp.where(visible[:, :, None, None, :], scores, -jnp.inf)
    new_max = jnp.maximum(running_max, scores.max(axis=-1))
    weights = jnp.exp(scores - new_max[..., None])
    # A slot that no query of the row may see can hold NaN, and 0 * NaN is NaN.
    seen = visible.any(axis=1)[:, None, :, None]
    shrink = jnp.exp(running_max - new_max)
    added = einsum("BTKGS,BKSH->BTKGH", weights, jnp.where(seen, values, 0.0))
    return new_max, denominator * shrink + weights.sum(axis=-1), weighted * shrink[..., None] + added
