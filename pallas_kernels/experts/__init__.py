"""The expert layer of one token batch: gate/up, clamped SwiGLU, down, weighted sum; experts packed in MXFP4."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Impl, choose
from pallas_kernels.exchange import Parts
from pallas_kernels.experts import hopper, hopper_layout, reference, tpu, tpu_layout
from pallas_kernels.experts.hopper_layout import HopperExperts
from pallas_kernels.experts.tpu_layout import TPUExperts
from pallas_kernels.experts.trainable import trainable_experts
from pallas_kernels.experts.weights import DenseExperts, ExpertAdapters, ExpertWeights

__all__ = [
    "DenseExperts",
    "ExpertAdapters",
    "ExpertWeights",
    "HopperExperts",
    "PreparedExperts",
    "TPUExperts",
    "expert_parts",
    "experts",
    "preparable",
    "prepare",
    "prepared_order",
    "trainable_experts",
]

PreparedExperts = HopperExperts | TPUExperts
"""Weights in a backend's own order; the fields of all have the same names."""

# Jitted so that layers share one trace and one lowering.
_hopper = jax.jit(hopper.expert_parts, static_argnames=("alpha", "limit", "total_experts"))
_tpu = jax.jit(tpu.experts, static_argnames=("alpha", "limit", "interpret"))


def _whole(experts: Callable[..., Array]) -> Callable[..., Parts]:
    """A backend that adds up itself."""

    def run(
        x: Array,
        weights: Any,
        expert_ids: Array,
        routing: Array,
        *,
        first_expert: Array | None,
        total_experts: int | None,
        **kwargs: Any,
    ) -> Parts:
        local_ids = expert_ids if first_expert is None else expert_ids - first_expert
        return Parts(experts(x, weights, local_ids, routing, **kwargs)[:, None])

    return run


_reference = _whole(reference.experts)
BACKENDS = {"reference": _reference, "cpu": _reference, "hopper": _hopper, "tpu": _whole(_tpu)}
PREPARE = {
    "reference": lambda weights, *, axis: weights,
    "cpu": lambda weights, *, axis: weights,
    "hopper": hopper_layout.prepare,
    "tpu": lambda weights, *, axis: tpu_layout.pack(weights),
}
ORDERS = {"reference": lambda: None, "cpu": lambda: None, "hopper": lambda: HopperExperts, "tpu": lambda: TPUExperts}
PREPARABLE = {
    "reference": lambda weights, *, experts_per_token: False,
    "cpu": lambda weights, *, experts_per_token: False,
    "hopper": hopper.preparable,
    "tpu": tpu.preparable,
}


def experts(
    x: Float[Array, "T D"],
    weights: ExpertWeights | PreparedExperts,
    expert_ids: Int[Array, "T A"],
    routing: Float[Array, "T A"],
    *,
    alpha: float,
    limit: float,
    impl: Impl = "auto",
) -> Float[Array, "T D"]:
    """Send every token through its chosen experts and add up what they say.

    For token t: sum over a of routing[t, a] * (down(swiglu(gate_up(x[t]))) + down_bias) of expert expert_ids[t, a]
    (openai/gpt-oss gpt_oss/torch/model.py, MLPBlock). Ids outside 0..E-1 contribute nothing, whatever their routing
    weight: so a device that holds some of the experts passes ids relative to its own and the parts are summed.
    Products accumulate in float32; the result has x's dtype. Only the chosen experts' bytes are read, and no more
    than one expert is dequantized at a time. `weights` are what `prepare` made for the same `impl`. Local arrays:
    call inside shard_map.

    Raises Unsupported if the named implementation cannot run these arguments.
    """
    parts = expert_parts(x, weights, expert_ids, routing, alpha=alpha, limit=limit, impl=impl)
    return parts.total().astype(x.dtype)


def expert_parts(
    x: Float[Array, "T D"],
    weights: ExpertWeights | PreparedExperts,
    expert_ids: Int[Array, "T A"],
    routing: Float[Array, "T A"],
    *,
    alpha: float,
    limit: float,
    first_expert: Int[Array, " 1"] | None = None,
    total_experts: int | None = None,
    impl: Impl = "auto",
) -> Parts:
    """What `experts` is the sum of, for whoever adds other devices' parts to it.

    The weights are those of the experts from `first_expert` on (None: from 0). `total_experts` says how many there are
    on all devices: with as many as there are weights for, every id is promised to be of one of them.
    """
    run = choose("experts", BACKENDS, impl)
    return run(
        x,
        weights,
        expert_ids,
        routing,
        alpha=alpha,
        limit=limit,
        first_expert=first_expert,
        total_experts=total_experts,
    )


def prepared_order(*, impl: Impl = "auto") -> type[PreparedExperts] | None:
    """The type of what `prepare` makes; None where it leaves the weights as they are."""
    return choose("experts", ORDERS, impl)()


def preparable(weights: ExpertWeights, *, experts_per_token: int, impl: Impl = "auto") -> bool:
    """Whether `prepare` would rearrange these weights, for so many experts per token. Looks at values: not under jit.

    Once rearranged, they are of use to that implementation alone: the reference cannot stand in for it any more. So
    what it could not run is found here; a named one raises Unsupported, "auto" warns and answers no.
    """
    return choose("experts", PREPARABLE, impl)(weights, experts_per_token=experts_per_token)


def prepare(weights: ExpertWeights, *, axis: str | None = None, impl: Impl = "auto") -> ExpertWeights | PreparedExperts:
    """The same experts with their bytes in the order that the implementation's kernels read.

    As many bytes as before, but for biases in float32. Devices along the mesh axis `axis` hold different experts
    before; if the implementation is Hopper's, each has a part of the width of all of them afterwards, padded to whole
    tiles (`HopperExperts.dims` says of which arrays), so that a token keeps them equally busy whichever experts it
    chose. Pure, local arrays: call under jit, inside shard_map.

    Raises Unsupported if the named implementation cannot take these weights.
    """
    return choose("experts", PREPARE, impl)(weights, axis=axis)
