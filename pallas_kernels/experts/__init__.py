"""The expert layer of one token batch: gate/up, clamped SwiGLU, down, weighted sum; experts packed in MXFP4."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Impl, choose
from pallas_kernels.experts import hopper, hopper_layout, reference, tpu, tpu_layout
from pallas_kernels.experts.hopper_layout import HopperExperts
from pallas_kernels.experts.tpu_layout import TPUExperts
from pallas_kernels.experts.weights import ExpertWeights

__all__ = ["ExpertWeights", "HopperExperts", "PreparedExperts", "TPUExperts", "experts", "preparable", "prepare"]

PreparedExperts = HopperExperts | TPUExperts
"""Weights in a backend's own order; the fields of all have the same names."""

_hopper = jax.jit(hopper.experts, static_argnames=("alpha", "limit"))  # so that layers share one trace and lowering
_tpu = jax.jit(tpu.experts, static_argnames=("alpha", "limit", "interpret"))
BACKENDS = {"reference": reference.experts, "cpu": reference.experts, "hopper": _hopper, "tpu": _tpu}
PREPARE = {
    "reference": lambda weights: weights,
    "cpu": lambda weights: weights,
    "hopper": hopper_layout.pack,
    "tpu": tpu_layout.pack,
}
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
    run = choose("experts", BACKENDS, impl)
    return run(x, weights, expert_ids, routing, alpha=alpha, limit=limit)


def preparable(weights: ExpertWeights, *, experts_per_token: int, impl: Impl = "auto") -> bool:
    """Whether `prepare` would rearrange these weights, for so many experts per token. Looks at values: not under jit.

    Once rearranged, they are of use to that implementation alone: the reference cannot stand in for it any more. So
    what it could not run is found here; a named one raises Unsupported, "auto" warns and answers no.
    """
    return choose("experts", PREPARABLE, impl)(weights, experts_per_token=experts_per_token)


def prepare(weights: ExpertWeights, *, impl: Impl = "auto") -> ExpertWeights | PreparedExperts:
    """The same experts with their bytes in the order that the implementation's kernels read.

    As many bytes as before, but for biases in float32. Pure, local arrays: call under jit, inside shard_map.

    Raises Unsupported if the named implementation cannot take these weights.
    """
    return choose("experts", PREPARE, impl)(weights)
