"""The expert layer in plain JAX, in float32: what every kernel is compared with, and what runs on a CPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.experts.weights import ExpertWeights
from pallas_kernels.mxfp4 import BLOCK_BYTES, MXFP4, code_to_float, scale_to_float

_MAX_TILE_TOKENS = 128
_MAX_TILE_ROWS = 512
"""Matrix rows dequantized at a time: 6 MB for the published widths, which stays in a CPU's cache."""


def experts(
    x: Float[Array, "T D"],
    weights: ExpertWeights,
    expert_ids: Int[Array, "T A"],
    routing: Float[Array, "T A"],
    *,
    alpha: float,
    limit: float,
) -> Float[Array, "T D"]:
    """See `pallas_kernels.experts.experts`.

    The (token, expert) pairs are sorted by expert and cut into tiles of one expert each. A tile dequantizes its
    expert, a few rows at a time, and multiplies its tokens; tiles left over are skipped, so absent experts cost
    nothing.
    """
    if not isinstance(weights, ExpertWeights):
        raise Unsupported(f"experts: the reference reads weights as published, these are {type(weights).__name__}")
    num_tokens, per_token = expert_ids.shape
    if num_tokens == 0:
        return x
    num_experts = weights.num_experts
    num_pairs = num_tokens * per_token
    ids_M = expert_ids.reshape(-1)
    ids_M = jnp.where((ids_M >= 0) & (ids_M < num_experts), ids_M, num_experts)

    order_M = jnp.argsort(ids_M)
    group_sizes = jnp.bincount(ids_M, length=num_experts + 1)[:num_experts]
    group_starts = jnp.cumsum(group_sizes) - group_sizes
    tile_tokens = min(_MAX_TILE_TOKENS, num_tokens)
    tiles_per_expert = -(-group_sizes // tile_tokens)
    tile_ends = jnp.cumsum(tiles_per_expert)

    def one_tile(tile: Int[Array, ""]) -> tuple[Int[Array, " m"], Float[Array, "m D"]]:
        expert = jnp.searchsorted(tile_ends, tile, side="right")
        tile_of_expert = tile - (tile_ends[expert] - tiles_per_expert[expert])
        offset = tile_of_expert * tile_tokens + jnp.arange(tile_tokens)
        place = jnp.minimum(group_starts[expert] + offset, num_pairs - 1)
        pair = jnp.where(offset < group_sizes[expert], order_M[place], num_pairs)
        tokens = x[jnp.minimum(pair, num_pairs - 1) // per_token]
        return pair, _one_expert(tokens, weights, expert, alpha=alpha, limit=limit)

    def no_tile(tile: Int[Array, ""]) -> tuple[Int[Array, " m"], Float[Array, "m D"]]:
        return jnp.full(tile_tokens, num_pairs), jnp.zeros((tile_tokens, x.shape[1]), jnp.float32)

    max_tiles = min(num_pairs, num_experts + num_pairs // tile_tokens)
    pairs, values = jax.lax.map(
        lambda tile: jax.lax.cond(tile < tile_ends[-1], one_tile, no_tile, tile), jnp.arange(max_tiles)
    )
    y = jnp.zeros((num_pairs, x.shape[1]), jnp.float32)
    y = y.at[pairs.reshape(-1)].set(values.reshape(-1, x.shape[1]), mode="drop")
    weighted = y.reshape(num_tokens, per_token, -1) * routing.astype(jnp.float32)[..., None]
    return weighted.sum(axis=1).astype(x.dtype)


def swiglu(gate_up: Float[Array, "m pairs"], *, alpha: float, limit: float) -> Float[Array, "m F"]:
    """The clamped SwiGLU over interleaved gate and up (openai/gpt-oss gpt_oss/torch/model.py, swiglu).

    The gate is clamped from above only, and 1 is added to the up branch.

    Example:
        >>> activated = swiglu(jnp.array([[1.0, 0.0, 10.0, 10.0]]), alpha=1.702, limit=7.0)
        >>> [round(value, 3) for value in activated[0].tolist()]
        [0.846, 56.0]
    """
    gate = jnp.minimum(gate_up[..., 0::2], limit)
    up = jnp.clip(gate_up[..., 1::2], -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


def _one_expert(
    x: Float[Array, "m D"], weights: ExpertWeights, expert: Int[Array, ""], *, alpha: float, limit: float
) -> Float[Array, "m D"]:
    hidden = _multiply(x, weights.gate_up, expert) + weights.gate_up_bias[expert].astype(jnp.float32)
    activated = swiglu(hidden, alpha=alpha, limit=limit).astype(x.dtype)
    return _multiply(activated, weights.down, expert) + weights.down_bias[expert].astype(jnp.float32)


def _multiply(x: Float[Array, "m k"], matrices: MXFP4, expert: Int[Array, ""]) -> Float[Array, "m n"]:
    """Multiply by one expert's matrix, a tile of its rows at a time.

    The values in the low nibbles meet the even columns of x, those in the high nibbles the odd ones: so the decoded
    halves need no interleaving, and XLA vectorizes the decoding over the long minor dim.
    """
    num_rows, num_blocks = matrices.scales.shape[1:]
    num_bytes = num_blocks * BLOCK_BYTES
    tile_rows = next(rows for rows in range(min(_MAX_TILE_ROWS, num_rows), 0, -1) if num_rows % rows == 0)
    blocks = matrices.blocks.reshape(-1, num_rows, num_bytes)
    # The barrier keeps the strided slices out of the products: XLA's GPU compiler aborts on fusing them in (0.11.2).
    even, odd = jax.lax.optimization_barrier(tuple(x.astype(jnp.float32)[:, parity::2].T for parity in (0, 1)))

    def one_tile(tile: Int[Array, ""]) -> Float[Array, "rows m"]:
        start = (expert, tile * tile_rows, 0)
        codes = jax.lax.dynamic_slice(blocks, start, (1, tile_rows, num_bytes))[0]
        scales = jax.lax.dynamic_slice(matrices.scales, start, (1, tile_rows, num_blocks))[0]
        scale = jnp.repeat(scale_to_float(scales), BLOCK_BYTES, axis=1)
        return _dot(codes & 15, scale, even) + _dot(codes >> 4, scale, odd)

    return jax.lax.map(one_tile, jnp.arange(num_rows // tile_rows)).reshape(num_rows, -1).T


def _dot(
    codes: UInt8[Array, "rows half"], scale: Float[Array, "rows half"], x: Float[Array, "half m"]
) -> Float[Array, "rows m"]:
    return jnp.dot(code_to_float(codes) * scale, x, precision=jax.lax.Precision.HIGHEST)
