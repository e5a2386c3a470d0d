"""The projections around a layer's attention and experts in plain JAX: what every kernel is compared with."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import platform
from pallas_kernels.exchange import AxisNames, Mailboxes, Parts, add_parts
from pallas_kernels.projections.weights import HeadWeights


def norm(x: Float[Array, "*rows D"], scale: Float[Array, " D"], *, eps: float) -> Float[Array, "*rows D"]:
    """Root-mean-square norm: in float32 throughout, the scale included, and rounded once at the end."""
    wide = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * inverse_rms * scale.astype(jnp.float32)).astype(x.dtype)


def multiply(x: Float[Array, "T in"], weight: Float[Array, "out in"]) -> Float[Array, "T out"]:
    """Activations times the transpose of a weight, accumulated and returned in float32."""
    einsum = functools.partial(jnp.einsum, "TI,OI->TO", preferred_element_type=jnp.float32, precision="highest")
    if platform() == "cpu" and x.dtype == jnp.bfloat16 and x.shape[0] == 1:
        # XLA on the CPU multiplies a lone bfloat16 row by converting the whole weight to float32 first: ten times
        # slower, and a gigabyte for the unembedding. Given two rows it reads the bfloat16 as it is.
        twice = jax.lax.optimization_barrier(jnp.concatenate([x, x]))
        return jax.lax.optimization_barrier(einsum(twice, weight))[:1]
    return einsum(x, weight)


def query_key_value(
    x: Float[Array, "T D"],
    norm_scale: Float[Array, " D"],
    heads: Sequence[HeadWeights],
    rotation: tuple[Float[Array, "T half"], Float[Array, "T half"]],
    *,
    num_kv_heads: int,
    eps: float,
) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
    """RMSNorm, then the three projections with their biases, queries and keys rotated."""
    normed = norm(x, norm_scale, eps=eps)

    def project(weight: Float[Array, "heads H D"], bias: Float[Array, "heads H"]) -> Float[Array, "T heads H"]:
        # As a matrix: XLA copies a weight of three dims into another order first.
        y = multiply(normed, weight.reshape(-1, weight.shape[-1])).reshape(-1, *bias.shape)
        return (y + bias.astype(jnp.float32)).astype(x.dtype)

    def rotate(heads: Float[Array, "T heads H"]) -> Float[Array, "T heads H"]:
        cos, sin = (table.astype(heads.dtype)[:, None, :] for table in rotation)
        one, two = jnp.split(heads, 2, axis=-1)
        return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)

    projected = jnp.concatenate([project(*part) for part in heads], axis=1)
    queries, keys, values = jnp.split(projected, [-2 * num_kv_heads, -num_kv_heads], axis=1)
    return rotate(queries), rotate(keys), values


def project_to_cache(
    x: Float[Array, "T D"],
    norm_scale: Float[Array, " D"],
    heads: Sequence[HeadWeights],
    rotation: tuple[Float[Array, "T half"], Float[Array, "T half"]],
    keys: Float[Array, "P K slots W"],
    values: Float[Array, "P K slots W"],
    pages: Int[Array, " T"],
    slots: Int[Array, " T"],
    *,
    eps: float,
) -> tuple[Float[Array, "T N H"], Float[Array, "P K slots W"], Float[Array, "P K slots W"]]:
    """See `pallas_kernels.projections.project_to_cache`."""
    queries, *new = query_key_value(x, norm_scale, heads, rotation, num_kv_heads=keys.shape[1], eps=eps)
    keys, values = (_write(pool, heads, pages, slots) for pool, heads in zip((keys, values), new, strict=True))
    return queries, keys, values


def _write(
    pool: Float[Array, "P K slots W"], heads: Float[Array, "T K H"], pages: Int[Array, " T"], slots: Int[Array, " T"]
) -> Float[Array, "P K slots W"]:
    """Write each token's heads, a row of the pool each.

    As rows of a matrix: a scatter into four dims has XLA for TPUs copy the pool into another order of dims and back.
    """
    num_pages, num_heads, num_slots, width = pool.shape
    pages = jnp.minimum(pages, num_pages)  # larger ones, all nowhere, could wrap round when multiplied
    rows = (pages[:, None] * num_heads + jnp.arange(num_heads, dtype=pages.dtype)) * num_slots + slots[:, None]
    padded = jnp.pad(heads.astype(pool.dtype), ((0, 0), (0, 0), (0, width - heads.shape[2])))
    return pool.reshape(-1, width).at[rows].set(padded, mode="drop").reshape(pool.shape)


def output(
    attended: Float[Array, "T N H"],
    weight: Float[Array, "D N H"],
    bias: Float[Array, " D"],
    residual: Float[Array, "T D"],
    *,
    axes: AxisNames,
    mailboxes: Mailboxes,
) -> tuple[Float[Array, "T D"], Mailboxes]:
    """See `pallas_kernels.projections.output`."""
    product = multiply(attended.reshape(attended.shape[0], -1), weight.reshape(weight.shape[0], -1))
    return add_parts(Parts(product[:, None]), residual, bias, axes=axes, mailboxes=mailboxes)


def route(
    x: Float[Array, "T D"],
    norm_scale: Float[Array, " D"],
    router_weight: Float[Array, "E D"],
    router_bias: Float[Array, " E"],
    *,
    eps: float,
    experts_per_token: int,
) -> tuple[Float[Array, "T D"], Int[Array, "T A"], Float[Array, "T A"]]:
    """See `pallas_kernels.projections.route`."""
    normed = norm(x, norm_scale, eps=eps)
    scores = multiply(normed, router_weight) + router_bias.astype(jnp.float32)
    chosen, expert_ids = jax.lax.top_k(scores, experts_per_token)
    return normed, expert_ids, jax.nn.softmax(chosen, axis=-1)


def unembed(
    x: Float[Array, "T D"], norm_scale: Float[Array, " D"], weight: Float[Array, "V D"], *, eps: float
) -> Float[Array, "T V"]:
    """See `pallas_kernels.projections.unembed`."""
    return multiply(norm(x, norm_scale, eps=eps), weight)
