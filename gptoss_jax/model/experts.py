"""The mixture of experts: route each token to a few packed experts and add up their answers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gptoss_jax.config import ModelConfig
from gptoss_jax.model.layers import parameter
from gptoss_jax.sharding import MODEL_AXES, WEIGHT_AXES, activation, spec
from pallas_kernels.dispatch import Impl
from pallas_kernels.experts import ExpertWeights, experts
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

    @property
    def packed(self) -> MXFP4:
        """The matrices as one packed array `E out in`."""
        return MXFP4(self.blocks[...], self.scales[...])


class Experts(nnx.Module):
    """All experts of a layer, split over the mesh's model axes."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        num_experts, width, expert_width = config.num_experts, config.hidden_size, config.intermediate_size
        self.gate_up = PackedLinear("2F", (num_experts, 2 * expert_width, width), dtype=dtype, rngs=rngs)
        self.down = PackedLinear("D", (num_experts, width, expert_width), dtype=dtype, rngs=rngs)
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit

    def __call__(
        self, x: Float[Array, "B T D"], expert_ids: Int[Array, "B T A"], routing: Float[Array, "B T A"], *, impl: Impl
    ) -> Float[Array, "B T D"]:
        def run(x: Array, weights: ExpertWeights, expert_ids: Array, routing: Array) -> Array:
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

        weights = ExpertWeights(
            gate_up=self.gate_up.packed,
            gate_up_bias=self.gate_up.bias[...],
            down=self.down.packed,
            down_bias=self.down.bias[...],
        )
        rows = activation("B")
        return jax.shard_map(run, in_specs=(rows, spec("E", WEIGHT_AXES), rows, rows), out_specs=rows, check_vma=False)(
            x, weights, expert_ids, routing
        )


def route(scores: Float[Array, "B T E"], experts_per_token: int) -> tuple[Int[Array, "B T A"], Float[Array, "B T A"]]:
    """The chosen experts, best first, and the softmax over the chosen scores only (openai/gpt-oss MLPBlock)."""
    chosen, expert_ids = jax.lax.top_k(scores, experts_per_token)
    return expert_ids, jax.nn.softmax(chosen, axis=-1)
