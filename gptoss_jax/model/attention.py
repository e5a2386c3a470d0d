"""Grouped-query attention over the cache's pages."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from gptoss_jax.config import ModelConfig
from gptoss_jax.model.cache import Step
from gptoss_jax.model.layers import HeadProjection, OutputProjection, parameter
from gptoss_jax.model.rope import rotate
from gptoss_jax.sharding import WEIGHT_AXES, activation, spec
from pallas_kernels.attention import attention
from pallas_kernels.dispatch import Impl


class Attention(nnx.Module):
    """Project, rotate, write keys and values to the cache, attend with a learned sink per head, project back."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        width, head_dim = config.hidden_size, config.head_dim
        self.query = HeadProjection("N", config.num_heads, head_dim, width, dtype=dtype, rngs=rngs)
        self.key = HeadProjection("K", config.num_kv_heads, head_dim, width, dtype=dtype, rngs=rngs)
        self.value = HeadProjection("K", config.num_kv_heads, head_dim, width, dtype=dtype, rngs=rngs)
        self.sinks = parameter(rngs, "N", (config.num_heads,), dtype=dtype)
        self.output = OutputProjection(width, config.num_heads, head_dim, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
        *,
        keys: Float[Array, "P K slots H"],
        values: Float[Array, "P K slots H"],
        step: Step,
        impl: Impl,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "P K slots H"], Float[Array, "P K slots H"]]:
        """The layer's output and its pools with the new keys and values in them."""
        heads, pool, rows = activation("B T N H"), activation("P K S H"), activation("B T")
        attended, keys, values = jax.shard_map(
            lambda *args: _write_and_attend(*args, impl=impl),
            in_specs=(heads, heads, heads, pool, pool, rows, spec("N", WEIGHT_AXES)),
            out_specs=(heads, pool, pool),
            check_vma=False,
        )(
            rotate(self.query(x), *rotation),
            rotate(self.key(x), *rotation),
            self.value(x),
            keys,
            values,
            step,
            self.sinks[...],
        )
        return self.output(attended), keys, values


def _write_and_attend(
    queries: Float[Array, "B T N H"],
    new_keys: Float[Array, "B T K H"],
    new_values: Float[Array, "B T K H"],
    keys: Float[Array, "P K slots H"],
    values: Float[Array, "P K slots H"],
    step: Step,
    sinks: Float[Array, " N"],
    *,
    impl: Impl,
) -> tuple[Float[Array, "B T N H"], Float[Array, "P K slots H"], Float[Array, "P K slots H"]]:
    keys = keys.at[step.pages, :, step.slots].set(new_keys.astype(keys.dtype), mode="drop")
    values = values.at[step.pages, :, step.slots].set(new_values.astype(values.dtype), mode="drop")
    attended = attention(queries, keys, values, step.table, step.first, step.last, sinks, impl=impl)
    return attended, keys, values
