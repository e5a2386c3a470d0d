"""The expert layer on Hopper GPUs for many tokens: rows grouped by expert, two grouped products, a weighted sum."""

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.experts import hopper_grouping, hopper_routing, tiles
from pallas_kernels.experts.hopper_grouped_matmul import grouped_matmul
from pallas_kernels.experts.hopper_layout import TILE, HopperExperts
from pallas_kernels.experts.hopper_prefill_parts import SwiGLU
from pallas_kernels.experts.hopper_routing import Grouping
from pallas_kernels.experts.tiles import Tiling

MAX_PER_TOKEN = 8


def experts(
    x: Float[Array, "T D"],
    weights: HopperExperts,
    expert_ids: Int[Array, "T A"],
    routing: Float[Array, "T A"],
    *,
    alpha: float,
    limit: float,
    total_experts: int | None = None,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> BFloat16[Array, "T D"]:
    """See `pallas_kernels.experts.experts`: any number; used beyond 128 tokens, or 8 rows an expert on average.

    The activations and each expert's answer are rounded to bfloat16. `interpret` runs the two products on the CPU, with
    `hopper_routing.spread` before them in place of the `hopper_grouping` kernel, which is inline PTX.

    Raises Unsupported for more than 8 experts a token, tokens not of bfloat16, and widths the weights do not have.
    """
    num_tokens, per_token = expert_ids.shape
    if per_token > MAX_PER_TOKEN:
        raise Unsupported(f"experts: {per_token} experts a token, the Hopper kernels take {MAX_PER_TOKEN}")
    if x.dtype != jnp.bfloat16:
        raise Unsupported(f"experts: tokens of {x.dtype}, the Hopper kernels take bfloat16")
    if x.shape[1] != weights.width:
        raise Unsupported(f"experts: tokens of width {x.shape[1]}, weights of width {weights.width}")
    if num_tokens == 0:
        return x
    chosen = tiling or choose_tiling(num_tokens * per_token, weights, total_experts)
    spread = hopper_routing.spread if interpret else hopper_grouping.spread
    rows, grouping = spread(x, expert_ids, weights.num_experts, chosen.widths)
    activations = grouped_matmul(
        rows,
        weights.gate_up_words,
        weights.gate_up_scales,
        weights.gate_up_bias,
        grouping,
        tiling=chosen,
        activation=SwiGLU(alpha, limit),
        interpret=interpret,
    )
    answers = grouped_matmul(
        activations,
        weights.down_words,
        weights.down_scales,
        weights.down_bias,
        grouping,
        tiling=chosen,
        activation=None,
        interpret=interpret,
    )
    return combine(answers, grouping, routing)


def choose_tiling(num_pairs: int, weights: HopperExperts, total_experts: int | None = None) -> Tiling:
    """The tiling for so many pairs, were they spread evenly over the experts, of which these may be some; narrower
    where the weights have few tiles."""
    chosen = tiles.prefill(num_pairs / (total_experts or weights.num_experts))
    row_tiles = min(2 * weights.expert_width, weights.width) // TILE
    if weights.width // TILE % chosen.k_tiles or weights.expert_width // TILE % chosen.k_tiles:
        chosen = Tiling(chosen.widths, chosen.warpgroups)
    if chosen.warpgroups > row_tiles:
        chosen = Tiling(chosen.widths, row_tiles, chosen.k_tiles)
    return chosen


def combine(
    answers: BFloat16[Array, "rows D"], grouping: Grouping, routing: Float[Array, "T A"]
) -> BFloat16[Array, "T D"]:
    """Sum each token's answers, weighted, in float32; pairs whose expert is elsewhere have no answer."""
    num_rows = answers.shape[0]
    here = grouping.places < num_rows
    # A pair that is elsewhere must not read a row that nothing wrote, which may hold NaN.
    chosen = jnp.where(here[..., None], answers[jnp.where(here, grouping.places, 0)].astype(jnp.float32), 0.0)
    return (chosen * routing.astype(jnp.float32)[..., None]).sum(axis=1).astype(answers.dtype)
