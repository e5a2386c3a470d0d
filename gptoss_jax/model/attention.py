"""Grouped-query attention over the cache's pages."""

import functools
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from gptoss_jax.config import ModelConfig
from gptoss_jax.model.cache import Step
from gptoss_jax.model.layers import HeadProjection, OutputProjection, RMSNorm, parameter, rearranged
from gptoss_jax.sharding import AxisNames, activation, head_axes
from pallas_kernels.attention import attention
from pallas_kernels.dispatch import Impl
from pallas_kernels.exchange import Mailboxes
from pallas_kernels.projections import HeadWeights, joined, joins, project_to_cache


class Attention(nnx.Module):
    """Project, rotate, write keys and values to the cache, attend with a learned sink per head, project back."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        width, head_dim = config.hidden_size, config.head_dim
        axes = self.axes = head_axes(config.num_kv_heads, jax.sharding.get_abstract_mesh())
        self.query = HeadProjection(config.num_heads, head_dim, width, axes=axes, dtype=dtype, rngs=rngs)
        self.key = HeadProjection(config.num_kv_heads, head_dim, width, axes=axes, dtype=dtype, rngs=rngs)
        self.value = HeadProjection(config.num_kv_heads, head_dim, width, axes=axes, dtype=dtype, rngs=rngs)
        self.sinks = parameter(rngs, "N", (config.num_heads,), dtype=dtype, axes={"N": axes})
        self.output = OutputProjection(width, config.num_heads, head_dim, axes=axes, dtype=dtype, rngs=rngs)

    @property
    def heads(self) -> tuple[HeadWeights, ...]:
        """The weights of query, key and value heads as the kernels take them: three parts, or one after `prepare`."""
        parts = (self.joined,) if hasattr(self, "joined") else (self.query, self.key, self.value)
        return tuple(HeadWeights(part.weight.get_value(), part.bias.get_value()) for part in parts)

    def prepare(self, impl: Impl) -> None:
        """Join the parts if the backend reads them as one, in place: the parts are freed."""
        published = self.heads
        if len(published) == 1 or not joins(impl=impl):
            return
        weights = rearranged(functools.partial(_joined, axes=self.axes), *published)
        self.joined = self.query
        self.joined.weight.set_value(weights.weight)
        self.joined.bias.set_value(weights.bias)
        del self.query, self.key, self.value

    def __call__(
        self,
        x: Float[Array, "B T D"],
        norm: RMSNorm,
        rotation: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
        *,
        keys: Float[Array, "P K slots W"],
        values: Float[Array, "P K slots W"],
        step: Step,
        mailboxes: Mailboxes,
        impl: Impl,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "P K slots W"], Float[Array, "P K slots W"], Mailboxes]:
        """x with attention over its norm added, and the layer's pools with the new keys and values in them."""
        rows, pool, heads = activation("B"), activation("P K S H", self.axes), P(self.axes)
        attended, keys, values = jax.shard_map(
            functools.partial(_project_write_attend, eps=norm.eps, impl=impl),
            in_specs=(
                rows,
                P(),
                heads,
                rows,
                pool,
                pool,
                rows,
                heads,
            ),
            out_specs=(activation("B T N H", self.axes), pool, pool),
            check_vma=False,
        )(
            x,
            norm.scale[...],
            self.heads,
            rotation,
            keys,
            values,
            step,
            self.sinks[...],
        )
        x, mailboxes = self.output(attended, residual=x, mailboxes=mailboxes, impl=impl)
        return x, keys, values, mailboxes


def _project_write_attend(
    x: Float[Array, "B T D"],
    norm_scale: Float[Array, " D"],
    heads: tuple[HeadWeights, ...],
    rotation: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
    keys: Float[Array, "P K slots W"],
    values: Float[Array, "P K slots W"],
    step: Step,
    sinks: Float[Array, " N"],
    *,
    eps: float,
    impl: Impl,
) -> tuple[Float[Array, "B T N H"], Float[Array, "P K slots W"], Float[Array, "P K slots W"]]:
    batch, num_tokens, width = x.shape
    cos, sin = (table.reshape(batch * num_tokens, -1) for table in rotation)
    queries, keys, values = project_to_cache(
        x.reshape(-1, width),
        norm_scale,
        heads,
        (cos, sin),
        keys,
        values,
        step.pages.reshape(-1),
        step.slots.reshape(-1),
        eps=eps,
        impl=impl,
    )
    queries = queries.reshape(batch, num_tokens, *queries.shape[1:])
    attended = attention(queries, keys, values, step.table, step.first, step.last, sinks, window=step.window, impl=impl)
    return attended, keys, values


@functools.partial(jax.jit, static_argnames="axes")
def _joined(*parts: HeadWeights, axes: AxisNames) -> HeadWeights:
    """One part of all heads; each device joins its own, so that they stay where they are."""
    heads = P(axes)
    return jax.shard_map(joined, in_specs=heads, out_specs=heads, check_vma=False)(*parts)
