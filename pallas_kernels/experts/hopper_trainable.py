"""The expert layer on Hopper GPUs with gradients: packed weights, frozen, with or without adapters.

The backward pass computes the hidden values again, so that nothing is kept between the passes but the arguments, and
makes three grouped products of the same packed words, where the forward pass makes two: gate and up, down transposed,
gate and up transposed. The answers are not needed: a routing weight's gradient is found before down.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.experts import hopper_grouping, hopper_prefill, hopper_routing
from pallas_kernels.experts.hopper_adapters import AdaptedRows, Chunks, arrange
from pallas_kernels.experts.hopper_grouped_matmul import grouped_matmul
from pallas_kernels.experts.hopper_layout import TILE, HopperExperts, from_mma_order, to_mma_order
from pallas_kernels.experts.hopper_routing import Grouping
from pallas_kernels.experts.hopper_transposed import choose_tiling, grouped_matmul_transposed
from pallas_kernels.experts.hopper_transposed_parts import PAIR
from pallas_kernels.experts.tiles import Tiling
from pallas_kernels.experts.weights import ExpertAdapters

NARROWEST = PAIR * TILE
"""The least D and F that the transposed products take."""
_RUN = 8
"""Gates and ups alternate in the hidden values by so many."""


def trainable_experts(
    x: Float[Array, "T D"],
    weights: HopperExperts,
    expert_ids: Int[Array, "T A"],
    routing: Float[Array, "T A"],
    adapters: ExpertAdapters | None = None,
    *,
    alpha: float,
    limit: float,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> BFloat16[Array, "T D"]:
    """See `pallas_kernels.experts.trainable_experts`: bfloat16 tokens, and weights as `prepare` made them.

    Hidden values, activations, answers, what adapters add to them, and the gradients of all these are rounded to
    bfloat16; sums and SwiGLU are float32. `tiling` is that of the transposed products.

    Raises Unsupported for what `hopper_prefill.experts` and `hopper_transposed.grouped_matmul_transposed` cannot take.
    """
    if not isinstance(weights, HopperExperts):
        raise Unsupported("experts: the Hopper kernels read weights that prepare() has rearranged, not as published")
    if x.dtype != jnp.bfloat16:
        raise Unsupported(f"experts: tokens of {x.dtype}, the Hopper kernels take bfloat16")
    if min(weights.width, weights.expert_width) < NARROWEST:
        raise Unsupported(
            f"experts: gradients need widths of {NARROWEST}; D = {weights.width}, F = {weights.expert_width}"
        )
    if expert_ids.size == 0:
        return x
    layer = _Layer(alpha, limit, tiling or choose_tiling(expert_ids.size, weights), interpret)
    return _experts(layer, x, weights, adapters, expert_ids, routing)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What is known when compiling, and the kernels called with it."""

    alpha: float
    limit: float
    tiling: Tiling
    interpret: bool

    def spread(
        self, x: Float[Array, "T D"], expert_ids: Int[Array, "T A"], weights: HopperExperts
    ) -> tuple[Float[Array, "rows D"], Grouping]:
        """Tokens in their pairs' rows, in mma order; other rows are arbitrary."""
        spread = hopper_routing.spread if self.interpret else hopper_grouping.spread
        return spread(x, expert_ids, weights.num_experts, self.tiling.widths)

    def chunks(
        self, rows: Float[Array, "rows D"], grouping: Grouping, expert_ids: Int[Array, "T A"], weights: HopperExperts
    ) -> Chunks:
        """The rows in chunks of one expert each."""
        return Chunks.of(grouping, expert_ids, self.tiling.widths, rows.shape[0], weights.num_experts)

    def gate_up(
        self, rows: Float[Array, "rows D"], weights: HopperExperts, grouping: Grouping
    ) -> Float[Array, "rows F2"]:
        """The hidden values, in the order of the packed rows."""
        return self._product(rows, weights.gate_up_words, weights.gate_up_scales, weights.gate_up_bias, grouping)

    def down(
        self, activated: Float[Array, "rows F"], weights: HopperExperts, grouping: Grouping
    ) -> Float[Array, "rows D"]:
        """The answers, from activations in mma order."""
        return self._product(activated, weights.down_words, weights.down_scales, weights.down_bias, grouping)

    def transposed(self, d: Array, words: Array, scales: Array, grouping: Grouping) -> Float[Array, "rows K"]:
        """Gradients of what came into a product from those of what came out, both in mma order."""
        return grouped_matmul_transposed(d, words, scales, grouping, tiling=self.tiling, interpret=self.interpret)

    def _product(self, rows: Array, words: Array, scales: Array, bias: Array, grouping: Grouping) -> Array:
        tiling = Tiling(self.tiling.widths, min(3, words.shape[1]))
        return grouped_matmul(
            rows, words, scales, bias, grouping, tiling=tiling, activation=None, interpret=self.interpret
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(
    layer: _Layer,
    x: Float[Array, "T D"],
    weights: HopperExperts,
    adapters: ExpertAdapters | None,
    expert_ids: Int[Array, "T A"],
    routing: Float[Array, "T A"],
) -> BFloat16[Array, "T D"]:
    if adapters is None:
        return hopper_prefill.experts(
            x,
            weights,
            expert_ids,
            routing,
            alpha=layer.alpha,
            limit=layer.limit,
            tiling=layer.tiling if layer.interpret else None,
            interpret=layer.interpret,
        )
    rows, grouping = layer.spread(x, expert_ids, weights)
    low_rank, chunks = arrange(adapters), layer.chunks(rows, grouping, expert_ids, weights)
    inner = chunks.into(rows, low_rank.gate_up_a)
    hidden = chunks.plus(layer.gate_up(rows, weights, grouping), inner, from_mma_order(low_rank.gate_up_b))
    gate, up, sigmoid = _gate_and_up(hidden, layer)
    activated = (gate * sigmoid * (up + 1)).astype(x.dtype).reshape(hidden.shape[0], -1)
    inner = chunks.into(activated, low_rank.down_a)
    answers = chunks.plus(layer.down(activated, weights, grouping), inner, from_mma_order(low_rank.down_b))
    return hopper_prefill.combine(answers, grouping, routing)


def _forward(layer: _Layer, *arguments):
    return _experts(layer, *arguments), arguments


def _backward(layer: _Layer, arguments, d_y: Float[Array, "T D"]):
    x, weights, adapters, expert_ids, routing = arguments
    rows, grouping = layer.spread(x, expert_ids, weights)
    d_answers, _ = layer.spread(d_y, expert_ids, weights)
    hidden = layer.gate_up(rows, weights, grouping)
    d_activated = layer.transposed(d_answers, weights.down_words, weights.down_scales, grouping)
    adapted = None
    if adapters is not None:
        adapted = AdaptedRows(adapters, layer.chunks(rows, grouping, expert_ids, weights), rows, d_answers)
        hidden, d_activated = adapted.hidden(hidden), adapted.d_activated(d_activated)

    shares = jnp.zeros(hidden.shape[0], jnp.float32).at[grouping.places].set(routing.astype(jnp.float32), mode="drop")
    activated, d_hidden, d_shares = _swiglu_back(hidden, d_activated, shares, layer)
    d_rows = layer.transposed(d_hidden, weights.gate_up_words, weights.gate_up_scales, grouping)
    d_adapters = None
    if adapted is not None:
        d_rows = adapted.d_rows(d_rows, d_hidden)
        d_adapters = adapted.gradients(d_hidden, (activated * shares[:, None]).astype(x.dtype))
    d_x = from_mma_order(hopper_prefill.combine(d_rows, grouping, jnp.ones_like(routing)))
    d_routing = _of_pairs(d_shares, grouping) + _of_biases(d_y, weights.down_bias, expert_ids)
    return d_x, None, d_adapters, None, d_routing.astype(routing.dtype)


_experts.defvjp(_forward, _backward)


def _gate_and_up(hidden: Float[Array, "rows F2"], layer: _Layer) -> tuple[Array, Array, Array]:
    """Gates, ups, both clamped, and the gates' sigmoid, each `rows F/8 1 8`."""
    by_run = hidden.astype(jnp.float32).reshape(hidden.shape[0], -1, 2, _RUN)
    gate, up = jnp.minimum(by_run[:, :, :1], layer.limit), jnp.clip(by_run[:, :, 1:], -layer.limit, layer.limit)
    return gate, up, jax.nn.sigmoid(layer.alpha * gate)


def _swiglu_back(
    hidden: BFloat16[Array, "rows F2"],
    d_activated: BFloat16[Array, "rows F"],
    shares: Float[Array, " rows"],
    layer: _Layer,
) -> tuple[Float[Array, "rows F"], BFloat16[Array, "rows F2"], Float[Array, " rows"]]:
    """The activations, the gradients of the hidden values, in mma order, and those of the shares.

    Hidden values are in the order of the packed rows, activations in the order of those rows' pairs. `d_activated` is
    without the shares.
    """
    gate, up, sigmoid = _gate_and_up(hidden, layer)
    activated = gate * sigmoid * (up + 1)
    by_run = d_activated.astype(jnp.float32).reshape(gate.shape)
    d_shares = (activated * by_run).sum(axis=(1, 2, 3))

    # One formula for both: of two that are stacked XLA writes the sigmoid, which both need, to memory.
    is_gate = jnp.arange(2)[:, None] == 0
    slope = jnp.where(is_gate, (up + 1) * (1 + layer.alpha * gate * (1 - sigmoid)), gate) * sigmoid
    unclamped = hidden.astype(jnp.float32).reshape(hidden.shape[0], -1, 2, _RUN)
    inside = (jnp.abs(unclamped) <= layer.limit) | (is_gate & (unclamped <= layer.limit))
    d_hidden = jnp.where(inside, slope * (by_run * shares[:, None, None, None]), 0)
    d_hidden = to_mma_order(d_hidden.reshape(hidden.shape).astype(hidden.dtype))
    return activated.reshape(d_activated.shape), d_hidden, d_shares


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
