"""The small parts: parameters that know their dims, norms, projections, router, embedding and unembedding."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from gptoss_jax.sharding import (
    DEVICES,
    MODEL_AXES,
    REPLICATED,
    WEIGHT_AXES,
    Axes,
    AxisNames,
    activation,
    concrete_mesh,
    spec,
)
from pallas_kernels.dispatch import Impl
from pallas_kernels.exchange import Mailboxes, Parts, add_parts
from pallas_kernels.projections import output, route, unembed

_INIT_SCALE = 0.02


def parameter(
    rngs: nnx.Rngs,
    dims: str,
    shape: tuple[int, ...],
    *,
    dtype: Any,
    scale: float = _INIT_SCALE,
    axes: Axes = WEIGHT_AXES,
) -> nnx.Param:
    """A parameter of normal random values, placed by its dims."""
    value = jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(scale, dtype)
    return nnx.Param(value, out_sharding=spec(dims, axes))


def rearranged[T](rearrange: Callable[..., T], *published: Any) -> T:
    """What a jitted function makes of parameters, which are freed once it is there; of shapes, the shapes."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(published)):
        return jax.eval_shape(rearrange, *published)
    made = jax.block_until_ready(rearrange(*published))
    for leaf in jax.tree.leaves(published):
        leaf.delete()
    return made


class RMSNorm(nnx.Module):
    """The scale of a root-mean-square norm; the projection that follows applies it (`pallas_kernels.projections`)."""

    def __init__(self, width: int, *, eps: float, dtype: Any) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, dtype), out_sharding=P(None))


class HeadProjection(nnx.Module):
    """Weight and bias from model width to heads, stored [out, in] as published, out split into heads."""

    def __init__(
        self, num_heads: int, head_dim: int, width: int, *, axes: AxisNames, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        split = {"N": axes}
        self.weight = parameter(rngs, "N H D", (num_heads, head_dim, width), dtype=dtype, axes=split)
        self.bias = parameter(rngs, "N H", (num_heads, head_dim), dtype=dtype, axes=split)


class OutputProjection(nnx.Module):
    """Heads back to model width, with bias; sums over the devices that hold the heads."""

    def __init__(
        self, width: int, num_heads: int, head_dim: int, *, axes: AxisNames, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self.axes = axes
        self.weight = parameter(rngs, "D N H", (width, num_heads, head_dim), dtype=dtype, axes={"N": axes})
        self.bias = parameter(rngs, "D", (width,), dtype=dtype)

    def __call__(
        self, x: Float[Array, "B T N H"], *, residual: Float[Array, "B T D"], mailboxes: Mailboxes, impl: Impl
    ) -> tuple[Float[Array, "B T D"], Mailboxes]:
        """The residual stream with the projection of x added."""

        def run(x: Array, weight: Array, bias: Array, residual: Array, mailboxes: Mailboxes) -> tuple[Array, Mailboxes]:
            rows, stream = x.reshape(-1, *x.shape[2:]), residual.reshape(-1, residual.shape[-1])
            stream, mailboxes = output(rows, weight, bias, stream, axes=self.axes, mailboxes=mailboxes, impl=impl)
            return stream.reshape(residual.shape), mailboxes

        rows = activation("B")
        return jax.shard_map(
            run,
            mesh=concrete_mesh(),
            in_specs=(activation("B T N H", self.axes), spec("D N H", {"N": self.axes}), P(), rows, DEVICES),
            out_specs=(rows, DEVICES),
            check_vma=False,
        )(x, self.weight[...], self.bias[...], residual, mailboxes)


class Router(nnx.Module):
    """Chooses each token's experts; every device holds all of it."""

    def __init__(self, num_experts: int, width: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.weight = parameter(rngs, "E D", (num_experts, width), dtype=dtype, axes=REPLICATED)
        self.bias = parameter(rngs, "E", (num_experts,), dtype=dtype, axes=REPLICATED)

    def __call__(
        self, x: Float[Array, "B T D"], norm: RMSNorm, *, experts_per_token: int, impl: Impl
    ) -> tuple[Float[Array, "B T D"], Int[Array, "B T A"], Float[Array, "B T A"]]:
        """The normed rows, the chosen experts, best first, and their shares (`pallas_kernels.projections.route`)."""

        def run(x: Array, *parameters: Array) -> tuple[Array, ...]:
            rows = x.reshape(-1, x.shape[-1])
            found = route(rows, *parameters, eps=norm.eps, experts_per_token=experts_per_token, impl=impl)
            return tuple(part.reshape(*x.shape[:2], -1) for part in found)

        rows = activation("B")
        normed, expert_ids, routing = jax.shard_map(
            run, in_specs=(rows, P(), P(), P()), out_specs=(rows, rows, rows), check_vma=False
        )(x, norm.scale[...], self.weight[...], self.bias[...])
        return normed, expert_ids, routing


class Embedding(nnx.Module):
    """A row per vocabulary entry, split by row; not scaled and not shared with the unembedding."""

    def __init__(self, vocab_size: int, width: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.weight = parameter(rngs, "V D", (vocab_size, width), dtype=dtype, scale=1.0)

    def prepare(self) -> None:
        """Have each row in one piece in memory, in place.

        XLA for TPUs would have the vocabulary as the last dim, which leaves fewer gaps, and copy the whole weight
        each time that rows are looked up.
        """
        weight = self.weight.get_value()
        rows = Format(Layout(major_to_minor=(0, 1)), weight.sharding)
        if isinstance(weight, jax.ShapeDtypeStruct):
            self.weight.set_value(jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=rows))
        else:
            self.weight.set_value(jax.device_put(weight, rows, donate=True))

    def __call__(self, tokens: Int[Array, "B T"], *, mailboxes: Mailboxes) -> tuple[Float[Array, "B T D"], Mailboxes]:
        """The tokens' rows, each from the device that has it."""

        def look_up(tokens: Array, rows: Array, mailboxes: Mailboxes) -> tuple[Array, Mailboxes]:
            local = tokens.reshape(-1) - jax.lax.axis_index(MODEL_AXES) * rows.shape[0]
            here = (local >= 0) & (local < rows.shape[0])
            found = jnp.where(here[:, None], rows[jnp.where(here, local, 0)], 0)
            x, mailboxes = add_parts(Parts(found[:, None]), jnp.zeros_like(found), axes=MODEL_AXES, mailboxes=mailboxes)
            return x.reshape(*tokens.shape, -1), mailboxes

        rows = activation("B")
        return jax.shard_map(
            look_up,
            mesh=concrete_mesh(),
            in_specs=(rows, spec("V D", WEIGHT_AXES), DEVICES),
            out_specs=(rows, DEVICES),
            check_vma=False,
        )(tokens, self.weight[...], mailboxes)


class Unembedding(nnx.Module):
    """Logits in float32, split over the vocabulary; no bias."""

    def __init__(self, vocab_size: int, width: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.weight = parameter(rngs, "V D", (vocab_size, width), dtype=dtype)

    def __call__(self, x: Float[Array, "B T D"], norm: RMSNorm, *, impl: Impl) -> Float[Array, "B T V"]:
        """The logits of the normed rows."""

        def run(x: Array, scale: Array, weight: Array) -> Array:
            logits = unembed(x.reshape(-1, x.shape[-1]), scale, weight, eps=norm.eps, impl=impl)
            return logits.reshape(*x.shape[:2], -1)

        return jax.shard_map(
            run,
            in_specs=(activation("B"), P(), spec("V D", WEIGHT_AXES)),
            out_specs=activation("B T V"),
            check_vma=False,
        )(x, norm.scale[...], self.weight[...])
