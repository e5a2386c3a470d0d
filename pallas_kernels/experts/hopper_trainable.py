"""The expert layer on Hopper GPUs with gradients: packed weights, frozen; for tokens and routing weights.

The backward pass computes the hidden values again, so that nothing is kept between the passes but the arguments, and
makes three grouped products of the same packed words, where the forward pass makes two: gate and up, down transposed,
gate and up transposed. The answers are not needed: a routing weight's gradient is found before down.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.experts import hopper_grouping, hopper_prefill, hopper_routing
from pallas_kernels.experts.hopper_grouped_matmul import grouped_matmul
from pallas_kernels.experts.hopper_layout import HopperExperts, from_mma_order, to_mma_order
from pallas_kernels.experts.hopper_routing import Grouping
from pallas_kernels.experts.hopper_transposed import choose_tiling, grouped_matmul_transposed
from pallas_kernels.experts.tiles import Tiling

_RUN = 8
"""Gates and ups alternate in the hidden values by so many."""


def trainable_experts(
    x: Float[Array, "T D"],
    weights: HopperExperts,
    expert_ids: Int[Array, "T A"],
    routing: Float[Array, "T A"],
    *,
    alpha: float,
    limit: float,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> BFloat16[Array, "T D"]:
    """What `hopper_prefill.experts` computes, with gradients of x and routing; weights and biases are frozen.

    Hidden values, activations and their gradients are rounded to bfloat16 between the products; sums and SwiGLU are
    float32. The tiling is that of the backward pass.

    Raises Unsupported for what `hopper_prefill.experts` and `hopper_transposed.grouped_matmul_transposed` cannot take.
    """
    if weights.width < 128 or weights.expert_width < 128:
        raise Unsupported(f"experts: gradients need widths of 128; D = {weights.width}, F = {weights.expert_width}")
    if expert_ids.size == 0:
        return hopper_prefill.experts(x, weights, expert_ids, routing, alpha=alpha, limit=limit)
    return _experts(alpha, limit, tiling, interpret, x, weights, expert_ids, routing)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _experts(
    alpha: float,
    limit: float,
    tiling: Tiling | None,
    interpret: bool,
    x: Float[Array, "T D"],
    weights: HopperExperts,
    expert_ids: Int[Array, "T A"],
    routing: Float[Array, "T A"],
) -> BFloat16[Array, "T D"]:
    cut = tiling if interpret else None
    return hopper_prefill.experts(
        x, weights, expert_ids, routing, alpha=alpha, limit=limit, tiling=cut, interpret=interpret
    )


def _forward(alpha: float, limit: float, tiling: Tiling | None, interpret: bool, *arguments):
    return _experts(alpha, limit, tiling, interpret, *arguments), arguments


def _backward(alpha: float, limit: float, tiling: Tiling | None, interpret: bool, arguments, d_y):
    x, weights, expert_ids, routing = arguments
    forward, backward = _tilings(tiling, expert_ids.size, weights)
    spread = hopper_routing.spread if interpret else hopper_grouping.spread
    rows, grouping = spread(x, expert_ids, weights.num_experts, forward.widths)
    d_answers, _ = spread(d_y, expert_ids, weights.num_experts, forward.widths)
    hidden = grouped_matmul(
        rows,
        weights.gate_up_words,
        weights.gate_up_scales,
        weights.gate_up_bias,
        grouping,
        tiling=forward,
        activation=None,
        interpret=interpret,
    )
    d_activated = grouped_matmul_transposed(
        d_answers, weights.down_words, weights.down_scales, grouping, tiling=backward, interpret=interpret
    )
    shares = jnp.zeros(rows.shape[0], jnp.float32).at[grouping.places].set(routing.astype(jnp.float32), mode="drop")
    d_hidden, d_shares = _swiglu_back(hidden, d_activated, shares, alpha=alpha, limit=limit)
    d_rows = grouped_matmul_transposed(
        d_hidden, weights.gate_up_words, weights.gate_up_scales, grouping, tiling=backward, interpret=interpret
    )
    d_x = from_mma_order(hopper_prefill.combine(d_rows, grouping, jnp.ones_like(routing)))
    d_routing = _of_pairs(d_shares, grouping) + _of_biases(d_y, weights.down_bias, expert_ids)
    return d_x, None, None, d_routing.astype(routing.dtype)


_experts.defvjp(_forward, _backward)


def _tilings(tiling: Tiling | None, num_pairs: int, weights: HopperExperts) -> tuple[Tiling, Tiling]:
    """Of the product and of the transposed ones, whose rows are the same."""
    backward = tiling or choose_tiling(num_pairs, weights)
    forward = hopper_prefill.choose_tiling(num_pairs, weights)
    return Tiling(backward.widths, forward.warpgroups), backward


def _swiglu_back(
    hidden: BFloat16[Array, "rows F2"],
    d_activated: BFloat16[Array, "rows F"],
    shares: Float[Array, " rows"],
    *,
    alpha: float,
    limit: float,
) -> tuple[BFloat16[Array, "rows F2"], Float[Array, " rows"]]:
    """The gradients of the hidden values, in mma order, and of the shares, from those of the activations without them.

    Hidden values are in the order of the packed rows, activations in the order of those rows' pairs.
    """
    by_run = hidden.astype(jnp.float32).reshape(hidden.shape[0], -1, 2, _RUN)
    gate, up = jnp.minimum(by_run[:, :, :1], limit), jnp.clip(by_run[:, :, 1:], -limit, limit)
    sigmoid = jax.nn.sigmoid(alpha * gate)
    d_activated = d_activated.astype(jnp.float32).reshape(gate.shape)
    d_shares = (gate * sigmoid * (up + 1) * d_activated).sum(axis=(1, 2, 3))

    # One formula for both: of two that are stacked XLA writes the sigmoid, which both need, to memory.
    is_gate = jnp.arange(2)[:, None] == 0
    slope = jnp.where(is_gate, (up + 1) * (1 + alpha * gate * (1 - sigmoid)), gate) * sigmoid
    inside = (jnp.abs(by_run) <= limit) | (is_gate & (by_run <= limit))
    d_hidden = jnp.where(inside, slope * (d_activated * shares[:, None, None, None]), 0)
    return to_mma_order(d_hidden.reshape(hidden.shape).astype(hidden.dtype)), d_shares


def _of_pairs(values: Float[Array, " rows"], grouping: Grouping) -> Float[Array, "T A"]:
    """Each pair's row; zero for pairs whose expert is elsewhere."""
    here = grouping.places < values.shape[0]
    return jnp.where(here, values[jnp.where(here, grouping.places, 0)], 0)


def _of_biases(
    d_y: Float[Array, "T D"], bias: Float[Array, "E D"], expert_ids: Int[Array, "T A"]
) -> Float[Array, "T A"]:
    """What the bias of down has to do with the routing weights."""
    here = (expert_ids >= 0) & (expert_ids < bias.shape[0])
    products = jnp.dot(d_y.astype(jnp.float32), bias.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(here, jnp.take_along_axis(products, jnp.where(here, expert_ids, 0), axis=1), 0)
