"""Attention over pages on TPUs: one kernel for decode and prefill, which fetches the pages a tile of queries sees.

A grid step has some tokens of one row, and some of its key/value heads: all of them for few tokens, else one. It walks
from the first page that any of its tokens sees to the last, a few at a time, with the next few on their way to VMEM
(double buffering, by hand, since which pages there are is known on the device alone). Running maximum, denominator and
sum as in the reference; they start from the sink. Query heads of one key/value head are rows of the same product.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Unsupported

LANES = 128
PAGE_SLOTS = 64
MAX_DECODE_TOKENS = 8
"""Up to here a step has all key/value heads of a row."""
TILE_TOKENS = 128
STEP_PAGES = 8
"""Pages on their way or in use at a time."""
_VMEM_BYTES = 32 * 2**20


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
    step_pages: int = STEP_PAGES,
    interpret: Any = False,
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.attention.attention`; bfloat16, pools as wide as `pool_width` says, pages of 64 slots.

    The weights are rounded to bfloat16 before they meet the values. `window` makes no difference: what no query sees
    is not fetched. `interpret` is Pallas's.
    """
    del window
    _check(queries, keys, values)
    batch, num_tokens, num_heads, head_width = queries.shape
    num_kv_heads, width = keys.shape[1], keys.shape[3]
    group = num_heads // num_kv_heads
    tile_tokens = min(num_tokens, TILE_TOKENS)
    padding = -num_tokens % tile_tokens
    num_tiles = (num_tokens + padding) // tile_tokens
    first = jnp.pad(first, ((0, 0), (0, padding)))
    last = jnp.pad(last, ((0, 0), (0, padding)), constant_values=-1)
    tile_heads = num_kv_heads if num_tokens <= MAX_DECODE_TOKENS else 1
    tile_rows = tile_tokens * group
    step_pages = min(step_pages, page_table.shape[1])

    split = queries.reshape(batch, num_tokens, num_kv_heads, group, head_width).swapaxes(1, 2)
    padded = jnp.pad(split, ((0, 0), (0, 0), (0, padding), (0, 0), (0, width - head_width)))
    rows = padded.reshape(batch, num_kv_heads, -1, width)
    ends_of_token = jnp.stack([first, last], axis=1)
    ends_of_row = jnp.repeat(jnp.stack([first, last], axis=-1), group, axis=1)
    sinks_of_row = jnp.tile(sinks.astype(jnp.float32).reshape(num_kv_heads, group), (1, tile_tokens))[..., None]
    first_page, last_page = _page_ranges(first, last, num_tiles=num_tiles)
    page_buffer = pltpu.VMEM((2, step_pages, tile_heads, PAGE_SLOTS, width), keys.dtype)

    attended = pl.pallas_call(
        functools.partial(_kernel, scale=head_width**-0.5),
        out_shape=jax.ShapeDtypeStruct(rows.shape, queries.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, num_kv_heads // tile_heads, num_tiles),
            in_specs=[
                pl.BlockSpec(
                    (None, 1, page_table.shape[1]), lambda row, *_: (row, 0, 0), memory_space=pltpu.MemorySpace.SMEM
                ),
                pl.BlockSpec((None, 2, tile_tokens), lambda row, head, tile, *_: (row, 0, tile)),
                pl.BlockSpec((None, tile_rows, 2), lambda row, head, tile, *_: (row, tile, 0)),
                pl.BlockSpec((tile_heads, tile_rows, 1), lambda row, head, *_: (head, 0, 0)),
                pl.BlockSpec((None, tile_heads, tile_rows, width), lambda row, head, tile, *_: (row, head, tile, 0)),
                pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM),
                pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM),
            ],
            out_specs=pl.BlockSpec(
                (None, tile_heads, tile_rows, width), lambda row, head, tile, *_: (row, head, tile, 0)
            ),
            scratch_shapes=[
                page_buffer,
                page_buffer,
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.VMEM((tile_heads, tile_rows, 1), jnp.float32),
                pltpu.VMEM((tile_heads, tile_rows, 1), jnp.float32),
                pltpu.VMEM((tile_heads, tile_rows, width), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=_cost(rows, keys, page_table, num_tiles=num_tiles),
        name="attention",
        interpret=interpret,
    )(first_page, last_page, page_table[:, None], ends_of_token, ends_of_row, sinks_of_row, rows, keys, values)
    attended = attended.reshape(batch, num_kv_heads, -1, group, width)[:, :, :num_tokens, :, :head_width]
    return attended.swapaxes(1, 2).reshape(queries.shape)


def _cost(
    rows: Float[Array, "B K rows W"],
    keys: Float[Array, "P K slots W"],
    page_table: Int[Array, "B pages"],
    *,
    num_tiles: int,
) -> pl.CostEstimate:
    """What the compiler cannot see: the most that these shapes may need, every page of the table being visible."""
    slots = page_table.shape[1] * PAGE_SLOTS
    page_bytes = keys.size // keys.shape[0] * keys.dtype.itemsize
    return pl.CostEstimate(
        flops=4 * rows.size * slots,
        bytes_accessed=2 * num_tiles * page_table.size * page_bytes + 2 * rows.size * rows.dtype.itemsize,
        transcendentals=rows.size // rows.shape[-1] * slots,
    )


def pool_width(head_dim: int) -> int:
    """The width of a pool for heads of `head_dim`: whole registers, the rest of a head's being zero."""
    return -(-head_dim // LANES) * LANES


def _page_ranges(
    first: Int[Array, "B T"], last: Int[Array, "B T"], *, num_tiles: int
) -> tuple[Int[Array, "B tiles"], Int[Array, "B tiles"]]:
    """The first and the last page that any token of each tile sees; 0 and -1 if none sees any."""
    visible = first <= last
    first = jnp.where(visible, first, jnp.iinfo(jnp.int32).max).reshape(first.shape[0], num_tiles, -1).min(axis=-1)
    last = jnp.where(visible, last, -1).reshape(last.shape[0], num_tiles, -1).max(axis=-1)
    return jnp.where(last < 0, 0, first // PAGE_SLOTS), last // PAGE_SLOTS


def _kernel(
    first_page: Any, last_page: Any,
    table: Any, ends_of_token: Any, ends_of_row: Any, sinks: Any, queries: Any, keys: Any, values: Any,
    out: Any,
    key_buffer: Any, value_buffer: Any, semaphores: Any, largest: Any, denominator: Any, total: Any,
    *,
    scale: float,
) -> None:  # fmt: skip
    row, head_tile, token_tile = (pl.program_id(dim) for dim in range(3))
    start, end = first_page[row, token_tile], last_page[row, token_tile]
    _, step_pages, num_heads, _, width = key_buffer.shape
    steps = jax.lax.div(end - start + step_pages, step_pages)
    num_slots = step_pages * PAGE_SLOTS

    def copies(step: Int[Array, ""]) -> Iterator[Any]:
        """The pages of a step; in place of those past the last, the last one, which is masked."""
        half = jax.lax.rem(step, 2)
        for page in range(step_pages):
            number = table[0, jnp.minimum(start + step * step_pages + page, end)]
            heads = pl.ds(head_tile * num_heads, num_heads)
            for index, (pool, buffer) in enumerate(((keys, key_buffer), (values, value_buffer))):
                yield pltpu.make_async_copy(pool.at[number, heads], buffer.at[half, page], semaphores.at[half, index])

    largest[...] = sinks[...]
    denominator[...] = jnp.ones_like(denominator)
    total[...] = jnp.zeros_like(total)

    @pl.when(steps > 0)
    def _() -> None:
        for copy in copies(jnp.int32(0)):
            copy.start()

    def visit(step: Int[Array, ""], _: None) -> None:
        @pl.when(step + 1 < steps)
        def _() -> None:
            for copy in copies(step + 1):
                copy.start()

        for copy in copies(step):
            copy.wait()
        half = jax.lax.rem(step, 2)
        base = (start + step * step_pages) * PAGE_SLOTS
        slot = base + jax.lax.broadcasted_iota(jnp.int32, (1, num_slots), 1)
        visible = (slot >= ends_of_row[:, 0:1]) & (slot <= ends_of_row[:, 1:2])
        # A slot that no query sees can hold NaN, and 0 * NaN is NaN.
        slot = base + jax.lax.broadcasted_iota(jnp.int32, (num_slots, 1), 0)
        seen = (slot >= ends_of_token[0:1]) & (slot <= ends_of_token[1:2])
        seen = jnp.max(seen.astype(jnp.int32), axis=1, keepdims=True) > 0
        for head in range(num_heads):
            key = key_buffer[half, :, head].reshape(num_slots, width)
            value = jnp.where(seen, value_buffer[half, :, head].reshape(num_slots, width), 0)
            scores = jax.lax.dot_general(
                queries[head], key, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
            scores = jnp.where(visible, scores * scale, -jnp.inf)
            before = largest[head]
            after = jnp.maximum(before, scores.max(axis=1, keepdims=True))
            weights = jnp.exp(scores - after)
            shrink = jnp.exp(before - after)
            largest[head] = after
            denominator[head] = denominator[head] * shrink + weights.sum(axis=1, keepdims=True)
            added = jnp.dot(weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
            total[head] = total[head] * shrink + added

    jax.lax.fori_loop(0, steps, visit, None)
    out[...] = (total[...] / denominator[...]).astype(out.dtype)


def _check(queries: Array, keys: Array, values: Array) -> None:
    if not queries.dtype == keys.dtype == values.dtype == jnp.bfloat16:
        raise Unsupported(
            f"attention: the TPU kernel takes bfloat16, not queries {queries.dtype}, keys {keys.dtype}, "
            f"values {values.dtype}"
        )
    if keys.shape[3] != pool_width(queries.shape[3]):
        raise Unsupported(
            f"attention: the TPU kernel takes heads of width {queries.shape[3]} in pools of width "
            f"{pool_width(queries.shape[3])}, not {keys.shape[3]}"
        )
    if keys.shape[2] != PAGE_SLOTS:
        raise Unsupported(f"attention: the TPU kernel takes pages of {PAGE_SLOTS} slots, not {keys.shape[2]}")
    num_heads, num_kv_heads = queries.shape[2], keys.shape[1]
    if num_heads % num_kv_heads:
        raise Unsupported(
            f"attention: the TPU kernel takes the same number of query heads for each kv head, not {num_heads} for "
            f"{num_kv_heads}"
        )
