"""The expert layer with gradients, in plain JAX: experts packed and frozen, or dense, with or without adapters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import Impl, Unsupported, choose, platform
from pallas_kernels.experts import hopper_trainable
from pallas_kernels.experts.hopper_layout import HopperExperts
from pallas_kernels.experts.reference import swiglu
from pallas_kernels.experts.weights import DenseExperts, ExpertAdapters, ExpertWeights
from pallas_kernels.mxfp4 import dequantize

_MAX_TILE_BYTES = 12 << 20
"""Of one expert's hidden activations at a time, in float32: 512 rows of the published width, enough to keep a GPU busy;
a narrow expert has more rows, and so fewer tiles to launch."""


def trainable_experts(
    x: Float[Array, "T D"],
    weights: ExpertWeights | HopperExperts | DenseExperts,
    expert_ids: Int[Array, "T A"],
    routing: Float[Array, "T A"],
    *,
    adapters: ExpertAdapters | None = None,
    alpha: float,
    limit: float,
    impl: Impl = "auto",
) -> Float[Array, "T D"]:
    """What `experts` computes, with gradients: of x, routing and adapters, and of all four arrays of dense weights.

    Packed weights and their biases are frozen. The backward pass computes again what it needs, so nothing is kept
    between the passes but the arguments, and neither holds more than one expert's matrices dequantized. Products are
    of x's dtype (float32: in full precision) and accumulate in float32, as does all else; a gradient has its
    argument's dtype. Local arrays: call inside shard_map, every argument varying over the same mesh axes.

    Raises Unsupported if the named implementation has no gradient or cannot run these arguments.

    Example:
        >>> bias = jnp.zeros((2, 64)), jnp.ones((2, 32))
        >>> weights = DenseExperts(jnp.ones((2, 64, 32)), bias[0], jnp.ones((2, 32, 32)), bias[1])
        >>> def total(routing):
        ...     ids = jnp.array([[1, 0], [2, 1]])  # there is no expert 2
        ...     return trainable_experts(jnp.zeros((2, 32)), weights, ids, routing, alpha=1.702, limit=7.0).sum()
        >>> jax.grad(total)(jnp.ones((2, 2))).tolist()
        [[32.0, 32.0], [0.0, 32.0]]
    """
    if expert_ids.size == 0:
        return jnp.zeros_like(x)
    if isinstance(weights, DenseExperts) and impl == "auto":
        impl = "reference"  # XLA's own products serve dense weights on every platform
    if isinstance(weights, HopperExperts):
        if impl not in ("auto", "hopper") or platform() != "hopper":
            raise Unsupported(f"trainable_experts: weights prepared for Hopper's kernels; {impl!r} on {platform()!r}")
        impl = "hopper"
    run = choose("trainable_experts", BACKENDS, impl)
    return run(x, weights, expert_ids, routing, adapters, alpha=alpha, limit=limit)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _experts(
    x: Float[Array, "T D"],
    weights: ExpertWeights | DenseExperts,
    expert_ids: Int[Array, "T A"],
    routing: Float[Array, "T A"],
    adapters: ExpertAdapters | None,
    alpha: float,
    limit: float,
) -> Float[Array, "T D"]:
    groups = _group(expert_ids, weights)

    def one_expert(index: Int[Array, ""], answers: Float[Array, "rows D"]) -> Float[Array, "rows D"]:
        expert, adapter = _one_expert(weights, adapters, index, x.dtype)

        def one_tile(tile: Int[Array, ""], answers: Float[Array, "rows D"]) -> Float[Array, "rows D"]:
            start, pairs = groups.tile(index, tile)
            hidden = _product(_rows(x, pairs // groups.per_token), expert.gate_up, _gate_up(adapter))
            activated = swiglu(hidden + expert.gate_up_bias, alpha=alpha, limit=limit).astype(x.dtype)
            answer = _product(activated, expert.down, _down(adapter)) + expert.down_bias
            return jax.lax.dynamic_update_slice(answers, answer, (start, 0))

        return jax.lax.fori_loop(0, groups.num_tiles[index], one_tile, answers)

    answers = jnp.zeros_like(x, shape=(groups.num_rows, x.shape[1]), dtype=jnp.float32)
    answers = jax.lax.fori_loop(0, weights.num_experts, one_expert, answers)
    return groups.add_up(answers, routing.astype(jnp.float32)).astype(x.dtype)


def _forward(*arguments):
    return _experts(*arguments), arguments[:5]


def _backward(alpha: float, limit: float, arguments, d_y: Float[Array, "T D"]):
    x, weights, expert_ids, routing, adapters = arguments
    groups = _group(expert_ids, weights)
    shares = routing.astype(jnp.float32).reshape(-1)
    dense = weights if isinstance(weights, DenseExperts) else None

    def one_expert(index: Int[Array, ""], carry):
        gradients, *d_pairs = carry
        expert, adapter = _one_expert(weights, adapters, index, x.dtype)

        def one_tile(tile: Int[Array, ""], carry):
            sums, d_rows, d_shares = carry
            start, pairs = groups.tile(index, tile)
            tokens = pairs // groups.per_token
            rows, d_answer = _rows(x, tokens), _rows(d_y, tokens)
            share = _rows(shares, pairs)[:, None]

            hidden = _product(rows, expert.gate_up, _gate_up(adapter)) + expert.gate_up_bias
            activated, swiglu_back = jax.vjp(functools.partial(swiglu, alpha=alpha, limit=limit), hidden)
            # The routing weight is left out of d_activated, which so gives the routing weight's own gradient too.
            weighted = (activated * share).astype(x.dtype)
            d_activated, d_down, d_down_a, d_down_b = _product_back(d_answer, weighted, expert.down, _down(adapter))
            d_answer = d_answer.astype(jnp.float32)
            answered = activated.astype(x.dtype).astype(jnp.float32)
            d_share = (answered * d_activated).sum(axis=1) + (d_answer * expert.down_bias).sum(axis=1)
            (d_hidden,) = swiglu_back(d_activated * share)
            d_row, d_gate_up, d_gate_up_a, d_gate_up_b = _product_back(
                d_hidden.astype(x.dtype), rows, expert.gate_up, _gate_up(adapter)
            )
            d_expert = DenseExperts(d_gate_up, d_hidden.sum(axis=0), d_down, (d_answer * share).sum(axis=0))
            d_adapter = ExpertAdapters(d_gate_up_a, d_gate_up_b, d_down_a, d_down_b)
            found = (dense and d_expert, adapter and d_adapter)
            return (
                jax.tree.map(jnp.add, sums, found),
                jax.lax.dynamic_update_slice(d_rows, d_row, (start, 0)),
                jax.lax.dynamic_update_slice(d_shares, d_share, (start,)),
            )

        sums = jax.tree.map(lambda all: jnp.zeros_like(all, shape=all.shape[1:], dtype=jnp.float32), gradients)
        sums, *d_pairs = jax.lax.fori_loop(0, groups.num_tiles[index], one_tile, (sums, *d_pairs))
        gradients = jax.tree.map(lambda all, one: all.at[index].set(one.astype(all.dtype)), gradients, sums)
        return gradients, *d_pairs

    gradients = jax.tree.map(jnp.zeros_like, (dense, adapters))
    d_rows = jnp.zeros_like(x, shape=(groups.num_rows, x.shape[1]), dtype=jnp.float32)
    d_shares = jnp.zeros_like(shares, shape=groups.num_rows)
    (d_weights, d_adapters), d_rows, d_shares = jax.lax.fori_loop(
        0, weights.num_experts, one_expert, (gradients, d_rows, d_shares)
    )
    d_x = groups.add_up(d_rows, jnp.ones_like(routing, dtype=jnp.float32)).astype(x.dtype)
    d_routing = jnp.where(groups.chosen, d_shares[groups.places], 0).astype(routing.dtype)
    return d_x, d_weights, None, d_routing, d_adapters


_experts.defvjp(_forward, _backward)
_reference = jax.jit(_experts, static_argnames=("alpha", "limit"))  # layers share one trace and one lowering
BACKENDS = {"reference": _reference, "cpu": _reference, "hopper": hopper_trainable.trainable_experts}


@dataclasses.dataclass(frozen=True)
class _Groups:
    """The (token, expert) pairs, one row each, sorted by expert; an expert's rows are cut into tiles.

    An expert's last tile may reach into the rows of the experts after it. As experts take their turns in order, what
    it writes there is overwritten; what it reads there is zero.
    """

    order: Int[Array, " rows"]
    """The pair of each row; past the last there is a tile of rows to spare."""
    places: Int[Array, "T A"]
    """The row of each pair."""
    chosen: Bool[Array, "T A"]
    """Whether the pair's expert is one of ours."""
    starts: Int[Array, " E"]
    sizes: Int[Array, " E"]
    tile_rows: int

    @property
    def num_rows(self) -> int:
        return self.order.shape[0]

    @property
    def per_token(self) -> int:
        return self.places.shape[1]

    @property
    def num_tiles(self) -> Int[Array, " E"]:
        return -(-self.sizes // self.tile_rows)

    def tile(self, expert: Int[Array, ""], tile: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, " m"]]:
        """The first row of an expert's tile, and its rows' pairs; there is no such pair past the expert's last."""
        offset = tile * self.tile_rows
        start = self.starts[expert] + offset
        pairs = jax.lax.dynamic_slice(self.order, (start,), (self.tile_rows,))
        inside = offset + jnp.arange(self.tile_rows) < self.sizes[expert]
        return start, jnp.where(inside, pairs, self.places.size)

    def add_up(self, rows: Float[Array, "rows D"], shares: Float[Array, "T A"]) -> Float[Array, "T D"]:
        """The weighted sum of each token's rows."""
        shares = jnp.where(self.chosen, shares, 0)
        return (rows[self.places] * shares[..., None]).sum(axis=1)


def _group(expert_ids: Int[Array, "T A"], weights: ExpertWeights | DenseExperts) -> _Groups:
    num_pairs, num_experts = expert_ids.size, weights.num_experts
    most = 1 << (_MAX_TILE_BYTES // (4 * weights.gate_up_bias.shape[1])).bit_length() - 1
    # Above the mean, so that most experts take one tile if there are tokens for so many.
    tile_rows = min(most, max(8, 1 << (num_pairs // num_experts).bit_length()))
    chosen = (expert_ids >= 0) & (expert_ids < num_experts)
    ids_M = jnp.where(chosen, expert_ids, num_experts).reshape(-1)
    order_M = jnp.argsort(ids_M)
    places_M = jnp.zeros_like(order_M).at[order_M].set(jnp.arange(num_pairs))
    sizes = jnp.bincount(ids_M, length=num_experts + 1)[:num_experts]
    return _Groups(
        order=jnp.pad(order_M, (0, tile_rows)),
        places=places_M.reshape(expert_ids.shape),
        chosen=chosen,
        starts=jnp.cumsum(sizes) - sizes,
        sizes=sizes,
        tile_rows=tile_rows,
    )


def _rows(array: Float[Array, " rows *dims"], places: Int[Array, " m"]) -> Float[Array, " m *dims"]:
    """The rows at these places, zero where there is none."""
    return array.at[places].get(mode="fill", fill_value=0)


def _one_expert(
    weights: ExpertWeights | DenseExperts, adapters: ExpertAdapters | None, index: Int[Array, ""], dtype: jnp.dtype
) -> tuple[DenseExperts, ExpertAdapters | None]:
    """One expert's arrays, without the dim E: matrices in the dtype of the products, biases in float32."""
    expert, adapter = jax.tree.map(
        lambda all: jax.lax.dynamic_index_in_dim(all, index, keepdims=False), (weights, adapters)
    )
    gate_up, down = expert.gate_up, expert.down
    if isinstance(weights, ExpertWeights):
        gate_up, down = dequantize(gate_up, dtype), dequantize(down, dtype)
    expert = DenseExperts(
        gate_up.astype(dtype),
        expert.gate_up_bias.astype(jnp.float32),
        down.astype(dtype),
        expert.down_bias.astype(jnp.float32),
    )
    return expert, jax.tree.map(lambda one: one.astype(dtype), adapter)


LowRank = tuple[Float[Array, "r k"], Float[Array, "n r"]]


def _gate_up(adapter: ExpertAdapters | None) -> LowRank | None:
    return adapter and (adapter.gate_up_a, adapter.gate_up_b)


def _down(adapter: ExpertAdapters | None) -> LowRank | None:
    return adapter and (adapter.down_a, adapter.down_b)


def _product(rows: Float[Array, "m k"], matrix: Float[Array, "n k"], low_rank: LowRank | None) -> Float[Array, "m n"]:
    """rows @ (matrix + b @ a).T in float32."""
    answer = _dot(rows, matrix, (1, 1))
    if low_rank is None:
        return answer
    a, b = low_rank
    return answer + _dot(_dot(rows, a, (1, 1)).astype(rows.dtype), b, (1, 1))


def _product_back(
    d_answer: Float[Array, "m n"], rows: Float[Array, "m k"], matrix: Float[Array, "n k"], low_rank: LowRank | None
) -> tuple[Array, Array, Array | None, Array | None]:
    """The gradients of rows, matrix, a and b, in float32. What nobody uses, XLA removes."""
    d_rows, d_matrix = _dot(d_answer, matrix, (1, 0)), _dot(d_answer, rows, (0, 0))
    if low_rank is None:
        return d_rows, d_matrix, None, None
    a, b = low_rank
    inner = _dot(rows, a, (1, 1)).astype(rows.dtype)
    d_inner = _dot(d_answer, b, (1, 0)).astype(rows.dtype)
    return d_rows + _dot(d_inner, a, (1, 0)), d_matrix, _dot(d_inner, rows, (0, 0)), _dot(d_answer, inner, (0, 0))


def _dot(left: Array, right: Array, contracted: tuple[int, int]) -> Array:
    """The product of two matrices over these dims of theirs, in float32."""
    return jax.lax.dot_general(
        left,
        right,
        (((contracted[0],), (contracted[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
