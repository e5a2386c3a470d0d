"""The small parts: parameters that know their dims, RMSNorm, linear layers, embedding and unembedding."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from gptoss_jax.sharding import MODEL_AXES, REPLICATED, WEIGHT_AXES, Axes, activation, spec
from pallas_kernels.dispatch import platform

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


def multiply(
    x: Float[Array, "B T in"], weight: Float[Array, "out in"], *, out_sharding: P | None = None
) -> Float[Array, "B T out"]:
    """Activations times the transpose of a weight, accumulated and returned in float32."""
    einsum = functools.partial(
        jnp.einsum, "BTI,OI->BTO", preferred_element_type=jnp.float32, out_sharding=out_sharding, precision="highest"
    )
    if platform() == "cpu" and x.dtype == jnp.bfloat16 and x.shape[0] * x.shape[1] == 1:
        # XLA on the CPU multiplies a lone bfloat16 row by converting the whole weight to float32 first: ten times
        # slower, and a gigabyte for the unembedding. Given two rows it reads the bfloat16 as it is.
        twice = jax.lax.optimization_barrier(jnp.concatenate([x, x], axis=1))
        return jax.lax.optimization_barrier(einsum(twice, weight))[:, :1]
    return einsum(x, weight)


class RMSNorm(nnx.Module):
    """Root-mean-square norm: in float32 throughout, the scale included, and rounded once at the end."""

    def __init__(self, width: int, *, eps: float, dtype: Any) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, dtype), out_sharding=P(None))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        wide = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * inverse_rms * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class HeadProjection(nnx.Module):
    """Model width to heads, with bias; stored [out, in] as published, out split into heads."""

    def __init__(self, heads: str, num_heads: int, head_dim: int, width: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.weight = parameter(rngs, f"{heads} H D", (num_heads, head_dim, width), dtype=dtype)
        self.bias = parameter(rngs, f"{heads} H", (num_heads, head_dim), dtype=dtype)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        # As a matrix: XLA copies a weight of three dims into another order first, at every call.
        matrix = self.weight[...].reshape(-1, x.shape[-1], out_sharding=spec(f"{self.heads} D", WEIGHT_AXES))
        dims = f"B T {self.heads} H"
        y = multiply(x, matrix).reshape(*x.shape[:2], *self.bias.shape, out_sharding=activation(dims))
        return (y + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class OutputProjection(nnx.Module):
    """Heads back to model width, with bias; sums over the devices that hold the heads."""

    def __init__(self, width: int, num_heads: int, head_dim: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.weight = parameter(rngs, "D N H", (width, num_heads, head_dim), dtype=dtype)
        self.bias = parameter(rngs, "D", (width,), dtype=dtype)

    def __call__(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        matrix = self.weight[...].reshape(self.weight.shape[0], -1, out_sharding=spec("D N", WEIGHT_AXES))
        joined = x.reshape(*x.shape[:2], -1, out_sharding=activation("B T N"))
        y = multiply(joined, matrix, out_sharding=activation("B T D"))
        return (y + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class Router(nnx.Module):
    """Scores of every expert for every token, in float32; every device holds all of it."""

    def __init__(self, num_experts: int, width: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.weight = parameter(rngs, "E D", (num_experts, width), dtype=dtype, axes=REPLICATED)
        self.bias = parameter(rngs, "E", (num_experts,), dtype=dtype, axes=REPLICATED)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        scores = multiply(x, self.weight[...])
        return scores + self.bias[...].astype(jnp.float32)


class Embedding(nnx.Module):
    """A row per vocabulary entry, split by row; not scaled and not shared with the unembedding."""

    def __init__(self, vocab_size: int, width: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.weight = parameter(rngs, "V D", (vocab_size, width), dtype=dtype, scale=1.0)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        def look_up(tokens: Int[Array, "B T"], rows: Float[Array, "V D"]) -> Float[Array, "B T D"]:
            local = tokens - jax.lax.axis_index(MODEL_AXES) * rows.shape[0]
            here = (local >= 0) & (local < rows.shape[0])
            found = jnp.where(here[..., None], rows[jnp.where(here, local, 0)], 0)
            return jax.lax.psum(found, MODEL_AXES)

        return jax.shard_map(
            look_up,
            in_specs=(activation("B T"), spec("V D", WEIGHT_AXES)),
            out_specs=activation("B T D"),
            check_vma=False,
        )(tokens, self.weight[...])


class Unembedding(nnx.Module):
    """Logits in float32, split over the vocabulary; no bias."""

    def __init__(self, vocab_size: int, width: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.weight = parameter(rngs, "V D", (vocab_size, width), dtype=dtype)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return multiply(x, self.weight[...])
