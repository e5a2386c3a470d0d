"""The expert layer of one token batch: gate/up, clamped SwiGLU, down, weighted sum; experts packed in MXFP4."""

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Impl, choose
from pallas_kernels.experts import reference
from pallas_kernels.experts.weights import ExpertWeights

__all__ = ["ExpertWeights", "experts"]

BACKENDS = {"reference": reference.experts, "cpu": reference.experts}


def experts(
    x: Float[Array, "T D"],
    weights: ExpertWeights,
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
    than one expert is dequantized at a time. Local arrays: call inside shard_map.

    Raises Unsupported if the named implementation cannot run these arguments.
    """
    run = choose("experts", BACKENDS, impl)
    return run(x, weights, expert_ids, routing, alpha=alpha, limit=limit)
