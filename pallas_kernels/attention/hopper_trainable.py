"""Attention with gradients on Hopper: the prefill kernel over rows cut into pages, and kernels for the gradients."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import hopper_gradients, hopper_prefill
from pallas_kernels.attention.hopper import GROUP, HEAD_WIDTH, PAGE_SLOTS
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.hopper_card import LOG2_E, NUM_MULTIPROCESSORS

_BLOCKS_EACH = 3
"""Blocks that a multiprocessor should get of the keys' gradients at least, since some have more to do than others."""


def segment_attention(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    sinks: Float[Array, " N"],
    *,
    window: int | None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.attention.segment_attention`; bfloat16, width 64, 8 query heads for each kv head.

    Weights, and gradients of scores, are rounded to bfloat16 before they are multiplied. `interpret` runs the kernels
    on the CPU.

    Raises Unsupported for anything else.
    """
    _check(queries, keys, values)
    batch, length, num_heads, width = queries.shape
    num_kv_heads = keys.shape[2]

    def padded(array: Array) -> Array:
        return jnp.pad(array, ((0, 0), (0, -length % hopper_gradients.BLOCK)) + ((0, 0),) * (array.ndim - 2))

    first, last = visible(padded(segments), window)
    queries = padded(queries).reshape(batch, -1, num_kv_heads, GROUP, width)
    sinks = sinks.astype(jnp.float32).reshape(num_kv_heads, GROUP)
    answers: Array = _attend(queries, padded(keys), padded(values), first, last, sinks, window, interpret)
    return answers[:, :length].reshape(batch, length, num_heads, width)


def _check(queries: Array, keys: Array, values: Array) -> None:
    if not queries.dtype == keys.dtype == values.dtype == jnp.bfloat16:
        raise Unsupported(
            f"segment attention: the Hopper kernels take bfloat16, not queries {queries.dtype}, keys {keys.dtype}, "
            f"values {values.dtype}"
        )
    num_heads, width = queries.shape[2:]
    if width != HEAD_WIDTH or num_heads != GROUP * keys.shape[2]:
        raise Unsupported(
            f"segment attention: the Hopper kernels take heads of width {HEAD_WIDTH}, {GROUP} for each kv head, not "
            f"{num_heads} of width {width} for {keys.shape[2]}"
        )


def visible(segments: Int[Array, "B T"], window: int | None) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The first and last position that each one sees: none, first after last, where the segment is 0."""
    position = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(begins, position, 0), axis=1)
    if window is not None:
        first = jnp.maximum(first, position - window + 1)
    return first, jnp.where(segments == 0, -1, position)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(
    queries: Float[Array, "B T K G H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    first: Int[Array, "B T"],
    last: Int[Array, "B T"],
    sinks: Float[Array, "K G"],
    window: int | None,
    interpret: bool,
) -> Float[Array, "B T K G H"]:
    return _forward(queries, keys, values, first, last, sinks, window, interpret)[0]


def _forward(queries: Array, keys: Array, values: Array, first: Array, last: Array, sinks: Array, window, interpret):
    batch, length, num_kv_heads, _, width = queries.shape
    num_pages = length // PAGE_SLOTS

    def pages(array: Float[Array, "B T K H"]) -> Float[Array, "P K slots H"]:
        return array.reshape(batch * num_pages, PAGE_SLOTS, num_kv_heads, width).swapaxes(1, 2)

    table = jnp.arange(batch * num_pages, dtype=jnp.int32).reshape(batch, num_pages)
    most_pages = num_pages if window is None else min(num_pages, -(-(window - 1) // PAGE_SLOTS) + 1)
    answers, log_sums = _varying_as(
        queries,
        *hopper_prefill.attention_and_log_sums(
            queries, pages(keys), pages(values), table, first, last, sinks, most_pages=most_pages, interpret=interpret
        ),
    )
    return answers, (queries, keys, values, first, last, sinks, answers, log_sums)


def _backward(window, interpret: bool, residuals: tuple[Array, ...], d_answers: Float[Array, "B T K G H"]):
    queries, keys, values, first, last, sinks, answers, log_sums = residuals
    batch, length, num_kv_heads, group, width = queries.shape
    num_splits = splits(batch * num_kv_heads * length // hopper_gradients.BLOCK, group)

    def rows(array: Float[Array, "B T K G *any"]) -> Float[Array, "R rows *any"]:
        """Rows of one token next to each other, `group // num_splits` of them."""
        array = array.reshape(batch, length, num_kv_heads * num_splits, group // num_splits, *array.shape[4:])
        return array.swapaxes(1, 2).reshape(-1, length * group // num_splits, *array.shape[4:])

    def heads(array: Float[Array, "B T K H"]) -> Float[Array, "heads T H"]:
        return array.swapaxes(1, 2).reshape(-1, length, width)

    # Written to memory before it joins the facts: XLA would compute each sum anew for all four.
    slopes = jax.lax.optimization_barrier((answers.astype(jnp.float32) * d_answers.astype(jnp.float32)).sum(axis=-1))
    d_sinks = -(jnp.exp2(sinks * LOG2_E - log_sums) * slopes).sum(axis=(0, 1))
    positions = (jnp.broadcast_to(array[..., None, None], slopes.shape) for array in (first, last))
    facts = jnp.stack([rows(array.astype(jnp.float32)) for array in (log_sums, slopes, *positions)], axis=1)
    facts = facts.reshape(len(facts), 4, -1, hopper_gradients.TILE).swapaxes(1, 2)
    arguments = rows(queries), rows(d_answers), facts, heads(keys), heads(values)
    row_bounds, key_bounds = bounds(first, last, group // num_splits)
    d_queries, *sums = _varying_as(
        queries,
        hopper_gradients.gradients_of_queries(*arguments, key_bounds, interpret=interpret),
        *hopper_gradients.gradients_of_keys(*arguments, row_bounds, interpret=interpret),
    )
    d_queries = d_queries.reshape(batch, num_kv_heads * num_splits, length, group // num_splits, width).swapaxes(1, 2)
    d_keys, d_values = (
        array.reshape(batch, num_kv_heads, num_splits, length, width).sum(axis=2).swapaxes(1, 2).astype(keys.dtype)
        for array in sums
    )
    return d_queries.reshape(queries.shape), d_keys, d_values, None, None, d_sinks


_attend.defvjp(_forward, _backward)


def _varying_as(like: Array, *results: Array) -> tuple[Array, ...]:
    """The same, varying over the mesh axes that `like` varies over: what a kernel returns is said to vary over none."""
    axes = jax.typeof(like).manual_axis_type.varying
    return tuple(
        jax.lax.pcast(result, tuple(sorted(axes - jax.typeof(result).manual_axis_type.varying)), to="varying")
        for result in results
    )


def splits(num_blocks: int, group: int) -> int:
    """Into how many groups the rows of a kv head's tokens go, so that there is work for every multiprocessor."""
    wanted = -(-_BLOCKS_EACH * NUM_MULTIPROCESSORS // num_blocks)
    return min(group, 1 << math.ceil(math.log2(wanted)))


def bounds(
    first: Int[Array, "B T"], last: Int[Array, "B T"], rows_each: int
) -> tuple[Int[Array, "B key_blocks 2"], Int[Array, "B row_blocks 2"]]:
    """For every block of keys the tiles of rows that see them, for every block of rows the tiles of keys they see."""
    length, tile, block = first.shape[1], hopper_gradients.TILE, hopper_gradients.BLOCK
    start = jnp.arange(0, length, block)[:, None]
    sees = (first[:, None] < start + block) & (last[:, None] >= start)
    position = jnp.arange(length)
    begin = jnp.where(sees, position, length).min(axis=-1) * rows_each // tile
    end = -(-(jnp.where(sees, position + 1, 0).max(axis=-1) * rows_each) // tile)
    of_rows = jnp.stack([jnp.minimum(begin, end), end], axis=-1)

    tokens = block // rows_each
    first = jnp.where(first <= last, first, length).reshape(-1, length // tokens, tokens).min(axis=-1)
    end = last.reshape(-1, length // tokens, tokens).max(axis=-1) // tile + 1
    return of_rows.astype(jnp.int32), jnp.stack([jnp.minimum(first // tile, end), end], axis=-1).astype(jnp.int32)
