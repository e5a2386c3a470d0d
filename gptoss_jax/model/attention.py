"""Grouped-query attention over the cache's pages."""

import functools
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from gptoss_jax.config import ModelConfig
from gptoss_jax.model.cache import Step
from gptoss_jax.model.layers import HeadProjection, OutputProjection, RMSNorm, parameter
from gptoss_jax.sharding import WEIGHT_AXES, activation, spec
from pallas_kernels.attention import attention
from pallas_kernels.dispatch import Impl
from pallas_kernels.projections import project_to_cache


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
        norm: RMSNorm,
        rotation: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
        *,
        keys: Float[Array, "P K slots W"],
        values: Float[Array, "P K slots W"],
        step: Step,
        impl: Impl,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "P K slots W"], Float[Array, "P K slots W"]]:
        """x with attention over its norm added, and the layer's pools with the new keys and values in them."""
        rows, pool = activation("B"), activation("P K S H")
        projections = (self.query, self.key, self.value)
        attended, keys, values = jax.shard_map(
            functools.partial(_project_write_attend, eps=norm.eps, impl=impl),
            in_specs=(
                rows,
                spec("D", WEIGHT_AXES),
                tuple(spec(projection.heads, WEIGHT_AXES) for projection in projections),
                rows,
                pool,
                pool,
                rows,
                spec("N", WEIGHT_AXES),
            ),
            out_specs=(activation("B T N H"), pool, pool),
            check_vma=False,
        )(
            x,
            norm.scale[...],
            tuple((projection.weight[...], projection.bias[...]) for projection in projections),
            rotation,
            keys,
            values,
            step,
            self.sinks[...],
        )
        return self.output(attended, residual=x, impl=impl), keys, values


def _project_write_attend(
    x: Float[Array, "B T D"],
    norm_scale: Float[Array, " D"],
    projections: tuple[tuple[Array, Array], ...],
    rotation: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
    keys: Float[Array, "P K slots W"],
    values: Float[Array, "P K slots W"],
    step: Step,
    sinks: Float[Array, " N"],
    *,
    eps: float,
    impl: Impl,
) -> tuple[Float[Array, "B T N H"], Float[Array, "P K slots W"], Float[Array, "P K slots W"]]:
    (query, query_bias), (key, key_bias), (value, value_bias) = projections
    batch, num_tokens, width = x.shape
    cos, sin = (table.reshape(batch * num_tokens, -1) for table in rotation)
    queries, keys, values = project_to_cache(
        x.reshape(-1, width), norm_scale, query, query_bias, key, key_bias, value, value_bias, cos, sin,
        keys, values, step.pages.reshape(-1), step.slots.reshape(-1), eps=eps, impl=impl,
    )  # fmt: skip
    queries = queries.reshape(batch, num_tokens, *queries.shape[1:])
    attended = attention(queries, keys, values, step.table, step.first, step.last, sinks, window=step.window, impl=impl)
    return attended, keys, values
