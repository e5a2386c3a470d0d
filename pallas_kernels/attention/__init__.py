"""Attention with learned sinks: of a few queries over paged keys and values, and of whole rows with gradients."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import hopper, hopper_trainable, reference, tpu, trainable
from pallas_kernels.dispatch import Impl, choose, platform

__all__ = ["attention", "pool_width", "segment_attention"]

_hopper = jax.jit(hopper.attention, static_argnames=("window", "interpret"))  # layers share one trace and lowering
_tpu = jax.jit(tpu.attention, static_argnames=("window", "step_pages", "interpret"))
BACKENDS = {"reference": reference.attention, "cpu": reference.attention, "hopper": _hopper, "tpu": _tpu}
_segments = trainable.segment_attention
_hopper_segments = jax.jit(hopper_trainable.segment_attention, static_argnames=("window", "interpret"))
SEGMENT_BACKENDS = {"reference": _segments, "cpu": _segments, "hopper": _hopper_segments}


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
    impl: Impl = "auto",
) -> Float[Array, "B T N H"]:
    """Attend from each query to the keys first..last (inclusive) of its row.

    A row's keys are the slots of the pages its table lists, in that order; `first` and `last` count slots from the
    table's beginning. That pair is all that tells a sliding layer from a full one. A query with last < first sees
    no key and gets zeros. Query head n reads kv head n // (N // K). The scale is 1/sqrt(H); sinks[n] joins the
    softmax's denominator unscaled and adds no value (openai/gpt-oss gpt_oss/torch/model.py, sdpa). Softmax and
    accumulation in float32, the result in the queries' dtype. Slots outside first..last may hold anything, NaN
    included. A pool may be wider than H, then the rest is zero where the slot is visible (`pool_width`). Local arrays:
    call inside shard_map.

    `window` promises that no query sees more keys than that, so that a kernel can cut its work accordingly; what each
    one sees is first..last all the same.

    Raises Unsupported if the named implementation cannot run these arguments.
    """
    run = choose("attention", BACKENDS, impl)
    return run(queries, keys, values, page_table, first, last, sinks, window=window)


def segment_attention(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    sinks: Float[Array, " N"],
    *,
    window: int | None,
    impl: Impl = "auto",
) -> Float[Array, "B T N H"]:
    """Attend from each position to those up to it, of the same segment of its row.

    The positions of a segment are consecutive; segment 0 is padding: zeros come out. With a window, only the last
    `window` positions are seen, itself included. Query head n reads kv head n // (N // K). The scale is 1/sqrt(H);
    sinks[n] joins the softmax's denominator unscaled and adds no value. Differentiable but for the segments. Products
    are of the queries' dtype (float32: in full precision) and accumulate in float32, as does the softmax. The backward
    pass computes the scores again: memory is linear in T. Local arrays: call inside shard_map, every argument varying
    over the same mesh axes.

    Raises Unsupported if the named implementation cannot run these arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> values = jnp.arange(4.0).reshape(1, 4, 1, 1)
        >>> segments = jnp.array([[1, 1, 2, 0]])
        >>> zeros = jnp.zeros_like(values)
        >>> segment_attention(zeros, zeros, values, segments, jnp.full(1, -99.0), window=None)[0, :, 0, 0].tolist()
        [0.0, 0.5, 2.0, 0.0]
    """
    run = choose("segment attention", SEGMENT_BACKENDS, impl)
    return run(queries, keys, values, segments, sinks, window=window)


def pool_width(head_dim: int) -> int:
    """W, the last dim that pools of keys and values should have for the platform in use: H; on a TPU whole registers.

    There XLA would otherwise make the pages the last dim, and copy the pools for the kernel.

    Example:
        >>> pool_width(64)
        64
    """
    return tpu.pool_width(head_dim) if platform() == "tpu" else head_dim
