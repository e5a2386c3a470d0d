"""The mixture of experts: route each token to a few packed experts and add up their answers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gptoss_jax.config import ModelConfig
from gptoss_jax.model.layers import parameter, rearranged
from gptoss_jax.sharding import DEVICES, MODEL_AXES, WEIGHT_AXES, Axes, activation, concrete_mesh, spec
from pallas_kernels.dispatch import Impl
from pallas_kernels.exchange import Mailboxes, add_parts
from pallas_kernels.experts import (
    ExpertWeights,
    HopperExperts,
    PreparedExperts,
    expert_parts,
    preparable,
    prepare,
    prepared_order,
)
from pallas_kernels.mxfp4 import BLOCK, BLOCK_BYTES, MXFP4

_INIT_SCALE_BYTE = 121  # 2**-6: codes average about 3 in magnitude, so values about 0.05


class PackedLinear(nnx.Module):
    """One matrix per expert in MXFP4, [out, in], with bias."""

    def __init__(self, out_dim: str, shape: tuple[int, int, int], *, dtype: Any, rngs: nnx.Rngs) -> None:
        num_experts, num_out, num_in = shape
        num_blocks = num_in // BLOCK
        blocks = jax.random.bits(rngs.params(), (num_experts, num_out, num_blocks, BLOCK_BYTES), jnp.uint8)
        scales = jnp.full((num_experts, num_out, num_blocks), _INIT_SCALE_BYTE, jnp.uint8)
        self.blocks = nnx.Param(blocks, out_sharding=spec(f"E {out_dim} J 16", WEIGHT_AXES))
        self.scales = nnx.Param(scales, out_sharding=spec(f"E {out_dim} J", WEIGHT_AXES))
        self.bias = parameter(rngs, f"E {out_dim}", (num_experts, num_out), dtype=dtype)


class Experts(nnx.Module):
    """All experts of a layer, split over the mesh's model axes."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        num_experts, width, expert_width = config.num_experts, config.hidden_size, config.intermediate_size
        self.gate_up = PackedLinear("2F", (num_experts, 2 * expert_width, width), dtype=dtype, rngs=rngs)
        self.down = PackedLinear("D", (num_experts, width, expert_width), dtype=dtype, rngs=rngs)
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        self.order: type[PreparedExperts] | None = None  # that of a backend, once prepared

    @property
    def weights(self) -> ExpertWeights | PreparedExperts:
        """The parameters as the kernels take them: published, or after `prepare` in a backend's own order."""
        held = [
            parameter.get_value()
            for linear in (self.gate_up, self.down)
            for parameter in (linear.blocks, linear.scales, linear.bias)
        ]
        if self.order is not None:
            return self.order(*held)
        gate_up_blocks, gate_up_scales, gate_up_bias, down_blocks, down_scales, down_bias = held
        return ExpertWeights(
            gate_up=MXFP4(gate_up_blocks, gate_up_scales),
            gate_up_bias=gate_up_bias,
            down=MXFP4(down_blocks, down_scales),
            down_bias=down_bias,
        )

    def preparable(self, experts_per_token: int, impl: Impl) -> bool:
        """Whether the backend has an order of its own for these weights, and can take them."""
        weights = self.weights
        return isinstance(weights, ExpertWeights) and preparable(
            weights, experts_per_token=experts_per_token, impl=impl
        )

    def prepare(self, impl: Impl) -> None:
        """Put preparable weights in the order that the backend reads, in place: the published bytes are freed."""
        prepared = rearranged(functools.partial(_rearrange, impl=impl), self.weights)
        for linear, blocks, scales, bias in (
            (self.gate_up, prepared.gate_up_words, prepared.gate_up_scales, prepared.gate_up_bias),
            (self.down, prepared.down_words, prepared.down_scales, prepared.down_bias),
        ):
            linear.blocks.set_value(blocks)
            linear.scales.set_value(scales)
            linear.bias.set_value(bias)
        self.order = type(prepared)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        expert_ids: Int[Array, "B T A"],
        routing: Float[Array, "B T A"],
        *,
        residual: Float[Array, "B T D"],
        mailboxes: Mailboxes,
        impl: Impl,
    ) -> tuple[Float[Array, "B T D"], Mailboxes]:
        """The residual stream with what the chosen experts say about x added."""
        axes = expert_axes(self.order)["E"]

        def run(
            x: Array,
            weights: ExpertWeights | PreparedExperts,
            expert_ids: Array,
            routing: Array,
            residual: Array,
            mailboxes: Mailboxes,
        ) -> tuple[Array, Mailboxes]:
            count = jax.lax.axis_size(axes)
            first = (jax.lax.axis_index(axes) * weights.num_experts).reshape(1) if count > 1 else None
            parts = expert_parts(
                x.reshape(-1, x.shape[-1]),
                weights,
                expert_ids.reshape(-1, expert_ids.shape[-1]),
                routing.reshape(-1, routing.shape[-1]),
                alpha=self.alpha,
                limit=self.limit,
                first_expert=first,
                total_experts=weights.num_experts * count,
                impl=impl,
            )
            stream = residual.reshape(-1, residual.shape[-1])
            stream, mailboxes = add_parts(parts, stream, axes=MODEL_AXES, mailboxes=mailboxes)
            return stream.reshape(residual.shape), mailboxes

        rows = activation("B")
        return jax.shard_map(
            run,
            mesh=concrete_mesh(),
            in_specs=(rows, _placement(self.order), rows, rows, rows, DEVICES),
            out_specs=(rows, DEVICES),
            check_vma=False,
        )(x, self.weights, expert_ids, routing, residual, mailboxes)


def expert_axes(order: type[PreparedExperts] | None) -> Axes:
    """Which mesh axes split the experts (E), and the width of each (F).

    On Hopper `tensor` cuts every expert's width, so that a token keeps all devices along it equally busy; elsewhere
    experts are whole and both model axes share them out, as in a checkpoint.
    """
    return {"E": "expert", "F": "tensor"} if order is HopperExperts else WEIGHT_AXES


def _placement(order: type[PreparedExperts] | None) -> Any:
    """The PartitionSpecs of a layer's expert weights in a backend's order."""
    axes = expert_axes(order)
    if order is HopperExperts:
        return jax.tree.map(lambda dims: spec(dims, axes), HopperExperts.dims())
    return spec("E", axes)


@functools.partial(jax.jit, static_argnames="impl")
def _rearrange(weights: ExpertWeights, *, impl: Impl) -> Any:
    run = functools.partial(prepare, axis="tensor", impl=impl)
    order = prepared_order(impl=impl)
    return jax.shard_map(run, in_specs=(_placement(None),), out_specs=_placement(order), check_vma=False)(weights)
