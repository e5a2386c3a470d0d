"""Attention of a few queries over paged keys and values, with learned sinks."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import hopper, reference
from pallas_kernels.dispatch import Impl, choose

__all__ = ["attention"]

_hopper = jax.jit(hopper.attention, static_argnames=("window", "interpret"))  # layers share one trace and lowering
BACKENDS = {"reference": reference.attention, "cpu": reference.attention, "hopper": _hopper}


def attention(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "P K slots H"],
    values: Float[Array, "P K slots H"],
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
    included. Local arrays: call inside shard_map.

    `window` promises that no query sees more keys than that, so that a kernel can cut its work accordingly; what each
    one sees is first..last all the same.

    Raises Unsupported if the named implementation cannot run these arguments.
    """
    run = choose("attention", BACKENDS, impl)
    return run(queries, keys, values, page_table, first, last, sinks, window=window)
