"""Attention over pages on Hopper GPUs: what it takes, and which of its two kernels runs."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Unsupported

HEAD_WIDTH = 64
PAGE_SLOTS = 64
GROUP = 8
"""Query heads per kv head in the kernels; fewer are padded."""
MAX_DECODE_TOKENS = 8
"""Up to here the keys are split over the multiprocessors; beyond, the queries are."""


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
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.attention.attention`; bfloat16, width 64, pages of 64 slots, up to 8 query heads a kv head.

    The weights are rounded to bfloat16 before they meet the values. `interpret` runs the kernels on the CPU.
    """
    _check(queries, keys, values)
    from pallas_kernels.attention import hopper_decode, hopper_prefill

    batch, num_tokens, num_heads, width = queries.shape
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    grouped = queries.reshape(batch, num_tokens, num_kv_heads, group, width)
    if sinks.dtype not in (jnp.bfloat16, jnp.float32):
        sinks = sinks.astype(jnp.float32)
    grouped_sinks = sinks.reshape(num_kv_heads, group)
    if group < GROUP:
        grouped = jnp.pad(grouped, ((0, 0),) * 3 + ((0, GROUP - group), (0, 0)))
        grouped_sinks = jnp.pad(grouped_sinks, ((0, 0), (0, GROUP - group)))
    form = hopper_decode if num_tokens <= MAX_DECODE_TOKENS else hopper_prefill
    most_pages = page_table.shape[1]
    if window is not None:
        most_pages = min(most_pages, -(-(window - 1) // PAGE_SLOTS) + 1)
    attended = form.attention(
        grouped, keys, values, page_table, first, last, grouped_sinks, most_pages=most_pages, interpret=interpret
    )
    return attended[:, :, :, :group].reshape(queries.shape)


def _check(queries: Array, keys: Array, values: Array) -> None:
    if not queries.dtype == keys.dtype == values.dtype == jnp.bfloat16:
        raise Unsupported(
            f"attention: the Hopper kernels take bfloat16, not queries {queries.dtype}, keys {keys.dtype}, "
            f"values {values.dtype}"
        )
    if queries.shape[-1] != HEAD_WIDTH:
        raise Unsupported(f"attention: the Hopper kernels take heads of width {HEAD_WIDTH}, not {queries.shape[-1]}")
    if keys.shape[3] != HEAD_WIDTH:
        raise Unsupported(f"attention: the Hopper kernels take pools of width {HEAD_WIDTH}, not {keys.shape[3]}")
    if keys.shape[2] != PAGE_SLOTS:
        raise Unsupported(f"attention: the Hopper kernels take pages of {PAGE_SLOTS} slots, not {keys.shape[2]}")
    num_heads, num_kv_heads = queries.shape[2], keys.shape[1]
    if num_heads % num_kv_heads or num_heads > GROUP * num_kv_heads:
        raise Unsupported(
            f"attention: the Hopper kernels take 1 to {GROUP} query heads for each kv head, not {num_heads} for "
            f"{num_kv_heads}"
        )
