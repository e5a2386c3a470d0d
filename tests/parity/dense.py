"""Our model with weights of any float32 values, the experts' too, which it otherwise holds in MXFP4."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

import gptoss_jax
from gptoss_jax.model.experts import Experts
from gptoss_jax.model.transformer import Transformer, fill, leaves
from gptoss_jax.sharding import activation, concrete_mesh

MATRICES = ("gate_up", "down")


class WrittenOut(nnx.Module):
    """Stands for the experts of one layer."""

    def __init__(self, packed: Experts, gate_up: np.ndarray, down: np.ndarray) -> None:
        self.packed = packed
        self.gate_up = nnx.Param(jnp.asarray(gate_up))
        self.down = nnx.Param(jnp.asarray(down))

    def __call__(
        self, x: Array, expert_ids: Array, routing: Array, *, residual: Array, mailboxes: Any, impl: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        alpha, limit = self.packed.alpha, self.packed.limit

        def run(x: Array, expert_ids: Array, routing: Array, *weights: Array) -> Array:
            gate_up, gate_up_bias, down, down_bias = weights
            hidden = jnp.einsum("BTD,EFD->BTEF", x, gate_up) + gate_up_bias
            gate, up = jnp.minimum(hidden[..., ::2], limit), jnp.clip(hidden[..., 1::2], -limit, limit)
            said = jnp.einsum("BTEF,EDF->BTED", gate * jax.nn.sigmoid(alpha * gate) * (up + 1), down) + down_bias
            share = (jax.nn.one_hot(expert_ids, down.shape[0]) * routing[..., None]).sum(2)
            return jnp.einsum("BTED,BTE->BTD", said, share)

        weights = (self.gate_up[...], self.packed.gate_up.bias[...], self.down[...], self.packed.down.bias[...])
        said = jax.shard_map(run, mesh=concrete_mesh(), out_specs=activation("B"), check_vma=False)(
            x, expert_ids, routing, *weights
        )
        return residual + said, mailboxes


def dense_model(checkpoint: Path, weights: Mapping[str, np.ndarray]) -> Transformer:
    """The model of a converted checkpoint with these weights, by path, the experts' as `PATH.weight`."""
    model = gptoss_jax.load(checkpoint, dtype=jnp.float32)
    held = nnx.to_flat_state(nnx.state(model))
    arrays = {".".join(map(str, path)): leaf.get_value() for path, leaf in held}
    shapes = leaves(model)
    arrays |= {path: jax.device_put(weights[path], shapes[path].sharding) for path in arrays if path in weights}
    model = fill(model, arrays)
    for index, layer in enumerate(model.layers):
        matrices = (weights[f"layers.{index}.experts.{matrix}.weight"] for matrix in MATRICES)
        layer.experts = WrittenOut(layer.experts, *matrices)
    return model
