"""The mixture of experts: route each token to a few packed experts and add up their answers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gptoss_jax.config import ModelConfig
from gptoss_jax.model.layers import exchange, parameter
from gptoss_jax.sharding import MODEL_AXES, WEIGHT_AXES, activation, spec
from pallas_kernels.dispatch import Impl
from pallas_kernels.experts import ExpertWeights, PreparedExperts, experts, preparable, prepare
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
        prepared = exchange(functools.partial(_rearrange, impl=impl), self.weights)
        for linear, blocks, scales, bias in (
            (self.gate_up, prepared.gate_up_words, prepared.gate_up_scales, prepared.gate_up_bias),
            (self.down, prepared.down_words, prepared.down_scales, prepared.down_bias),
        ):
            linear.blocks.set_value(blocks)
            linear.scales.set_value(scales)
            linear.bias.set_value(bias)
        self.order = type(prepared)

    def __call__(
        self, x: Float[Array, "B T D"], expert_ids: Int[Array, "B T A"], routing: Float[Array, "B T A"], *, impl: Impl
    ) -> Float[Array, "B T D"]:
        def run(x: Array, weights: ExpertWeights | PreparedExperts, expert_ids: Array, routing: Array) -> Array:
            local_ids = expert_ids - jax.lax.axis_index(MODEL_AXES) * weights.num_experts
            y = experts(
                x.reshape(-1, x.shape[-1]),
                weights,
                local_ids.reshape(-1, local_ids.shape[-1]),
                routing.reshape(-1, routing.shape[-1]),
                alpha=self.alpha,
                limit=self.limit,
                impl=impl,
            )
            return jax.lax.psum(y, MODEL_AXES).reshape(x.shape)

        rows = activation("B")
        return jax.shard_map(run, in_specs=(rows, spec("E", WEIGHT_AXES), rows, rows), out_specs=rows, check_vma=False)(
            x, self.weights, expert_ids, routing
        )


@functools.partial(jax.jit, static_argnames="impl")
def _rearrange(weights: ExpertWeights, *, impl: Impl) -> Any:
    split = spec("E", WEIGHT_AXES)
    run = functools.partial(prepare, impl=impl)
    return jax.shard_map(run, in_specs=(split,), out_specs=split, check_vma=False)(weights)
