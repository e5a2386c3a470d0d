"""The expert layer on Hopper GPUs: which of its two forms runs."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.exchange import Parts
from pallas_kernels.experts import hopper_decode, hopper_prefill
from pallas_kernels.experts.hopper_layout import LARGEST_SCALE, TILE, HopperExperts
from pallas_kernels.experts.weights import ExpertWeights, refuse_large_scales, refuse_odd_widths

MAX_DECODE_ROWS = 8
"""Rows an expert gets on average up to which weights are streamed through registers; beyond, rows are grouped by
expert for the tensor cores (docs/performance.md has the times of both)."""


def expert_parts(
    x: Float[Array, "T D"],
    weights: ExpertWeights | HopperExperts,
    expert_ids: Int[Array, "T A"],
    routing: Float[Array, "T A"],
    *,
    alpha: float,
    limit: float,
    first_expert: Int[Array, " 1"] | None = None,
    total_experts: int | None = None,
) -> Parts:
    """See `pallas_kernels.experts.expert_parts`; the weights as `prepare` made them."""
    if not isinstance(weights, HopperExperts):
        raise Unsupported("experts: the Hopper kernels read weights that prepare() has rearranged, not as published")
    rows_per_expert = expert_ids.size / (total_experts or weights.num_experts)
    form = {"alpha": alpha, "limit": limit, "total_experts": total_experts}
    if x.shape[0] <= hopper_decode.MAX_TOKENS and rows_per_expert <= MAX_DECODE_ROWS:
        return hopper_decode.expert_parts(x, weights, expert_ids, routing, first_expert=first_expert, **form)
    local_ids = expert_ids if first_expert is None else expert_ids - first_expert
    return Parts(hopper_prefill.experts(x, weights, local_ids, routing, **form)[:, None])


def preparable(weights: ExpertWeights, *, experts_per_token: int) -> bool:
    """See `pallas_kernels.experts.preparable`: Unsupported if the kernels could not run these weights, else yes."""
    if experts_per_token > hopper_decode.MAX_PER_TOKEN:
        raise Unsupported(
            f"experts: the Hopper kernels take 1 to {hopper_decode.MAX_PER_TOKEN} experts per token, not "
            f"{experts_per_token}"
        )
    refuse_odd_widths(weights, TILE)
    if not isinstance(weights.down_bias, jax.ShapeDtypeStruct):
        refuse_large_scales(weights, LARGEST_SCALE)
    return True
