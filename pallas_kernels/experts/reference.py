"""The expert layer in plain JAX, in float32: what every kernel is compared with, and what runs on a CPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.experts.weights import ExpertWeights
from pallas_kernels.mxfp4 import MXFP4, dequantize

_MAX_TILE_ROWS = 128


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
    expert and multiplies its rows; tiles left over are skipped, so absent experts cost nothing.
    """
    num_tokens, per_token = expert_ids.shape
    num_experts = weights.num_experts
    num_rows = num_tokens * per_token
    ids_M = expert_ids.reshape(-1)
    ids_M = jnp.where((ids_M >= 0) & (ids_M < num_experts), ids_M, num_experts)

    order_M = jnp.argsort(ids_M)
    group_sizes = jnp.bincount(ids_M, length=num_experts + 1)[:num_experts]
    group_starts = jnp.cumsum(group_sizes) - group_sizes
    tile_rows = min(_MAX_TILE_ROWS, max(1, num_tokens))
    tiles_per_expert = -(-group_sizes // tile_rows)
    tile_ends = jnp.cumsum(tiles_per_expert)

    def one_tile(tile: Int[Array, ""]) -> tuple[Int[Array, " m"], Float[Array, "m D"]]:
        expert = jnp.searchsorted(tile_ends, tile, side="right")
        tile_in_group = tile - (tile_ends[expert] - tiles_per_expert[expert])
        offset = tile_in_group * tile_rows + jnp.arange(tile_rows)
        sorted_row = jnp.minimum(group_starts[expert] + offset, num_rows - 1)
        row = jnp.where(offset < group_sizes[expert], order_M[sorted_row], num_rows)
        tokens = x[jnp.minimum(row, num_rows - 1) // per_token]
        return row, _one_expert(tokens, _take_expert(weights, expert), alpha=alpha, limit=limit)

    def skip_tile(tile: Int[Array, ""]) -> tuple[Int[Array, " m"], Float[Array, "m D"]]:
        return jnp.full(tile_rows, num_rows), jnp.zeros((tile_rows, x.shape[1]), jnp.float32)

    max_tiles = min(num_rows, num_experts + num_rows // tile_rows)
    rows, values = jax.lax.map(
        lambda tile: jax.lax.cond(tile < tile_ends[-1], one_tile, skip_tile, tile), jnp.arange(max_tiles)
    )
    y = jnp.zeros((num_rows, x.shape[1]), jnp.float32)
    y = y.at[rows.reshape(-1)].set(values.reshape(-1, x.shape[1]), mode="drop", unique_indices=False)
    weighted = y.reshape(num_tokens, per_token, -1) * routing.astype(jnp.float32)[..., None]
    return weighted.sum(axis=1).astype(x.dtype)


def swiglu(gate_up: Float[Array, "m 2F"], *, alpha: float, limit: float) -> Float[Array, "m F"]:
    """The clamped SwiGLU over interleaved gate and up (openai/gpt-oss gpt_oss/torch/model.py, swiglu).

    The gate is clamped from above only, and 1 is added to the up branch.

    Example:
        >>> swiglu(jnp.array([[1.0, 0.0], [10.0, 10.0]]), alpha=1.702, limit=7.0).round(4).tolist()
        [[0.8457999825477600], [55.9995994567871]]
    """
    gate = jnp.minimum(gate_up[..., 0::2], limit)
    up = jnp.clip(gate_up[..., 1::2], -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


def _take_expert(weights: ExpertWeights, expert: Int[Array, ""]) -> ExpertWeights:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, expert, keepdims=False), weights)


def _one_expert(x: Float[Array, "m D"], expert: ExpertWeights, *, alpha: float, limit: float) -> Float[Array, "m D"]:
    hidden = _multiply(x, expert.gate_up) + expert.gate_up_bias.astype(jnp.float32)
    activated = swiglu(hidden, alpha=alpha, limit=limit).astype(x.dtype)
    return _multiply(activated, expert.down) + expert.down_bias.astype(jnp.float32)


def _multiply(x: Float[Array, "m k"], matrix: MXFP4) -> Float[Array, "m n"]:
    return jnp.einsum(
        "mk,nk->mn", x.astype(jnp.float32), dequantize(matrix), precision=jax.lax.Precision.HIGHEST
    )
