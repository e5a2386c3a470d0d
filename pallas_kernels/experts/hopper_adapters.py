"""Adapters of the experts, beside the Hopper kernels' grouped products: plain JAX over the same rows.

Rows are grouped by expert in tiles, so they can be cut into chunks of one expert each: as many products as chunks, in
one batch, each with its expert's adapter.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.experts.hopper_layout import from_mma_order, gate_up_rows, to_mma_order
from pallas_kernels.experts.hopper_routing import Grouping
from pallas_kernels.experts.weights import ExpertAdapters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arranged:
    """Adapters as the grouped rows need them: the last dim in mma order, of gate and up that of the packed rows."""

    gate_up_a: Float[Array, "E r D"]
    gate_up_b: Float[Array, "E r F2"]
    down_a: Float[Array, "E r F"]
    down_b: Float[Array, "E r D"]


def arrange(adapters: ExpertAdapters) -> Arranged:
    """Bring adapters into the order of the rows; linear, so that its transposition brings their gradients back.

    Example:
        >>> shapes = (4, 64), (128, 4), (4, 64), (64, 4)
        >>> arranged = arrange(ExpertAdapters(*(jnp.ones((2, *shape)) for shape in shapes)))
        >>> arranged.gate_up_b.shape, arranged.down_b.shape
        ((2, 4, 128), (2, 4, 64))
    """
    # Without the barrier XLA's CPU compiler never ends on the transposition of both orders in one (0.11.2).
    packed = jax.lax.optimization_barrier(gate_up_rows(adapters.gate_up_b).reshape(adapters.gate_up_b.shape))
    return Arranged(
        to_mma_order(adapters.gate_up_a),
        to_mma_order(jnp.swapaxes(packed, 1, 2)),
        to_mma_order(adapters.down_a),
        to_mma_order(jnp.swapaxes(adapters.down_b, 1, 2)),
    )


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Rows in chunks of one expert each."""

    experts: Int[Array, " chunks"]
    """Arbitrary where no row of the chunk is used."""
    used: Bool[Array, "rows 1"]
    """Other rows are arbitrary where a kernel wrote them, or did not, and may hold NaN."""
    num_experts: int

    @classmethod
    def of(
        cls, grouping: Grouping, expert_ids: Int[Array, "T A"], widths: tuple[int, ...], num_rows: int, num_experts: int
    ) -> "Chunks":
        """Chunks as long as divides every tile; what is left of the rows no tile reaches."""
        length = math.gcd(*widths)
        num_chunks = num_rows // length
        experts = jnp.zeros(num_chunks, jnp.int32).at[grouping.places // length].set(expert_ids, mode="drop")
        used = jnp.zeros((num_chunks * length, 1), bool).at[grouping.places].set(True, mode="drop")
        return cls(experts, used, num_experts)

    def only_used(self, rows: Float[Array, "all_rows k"]) -> Float[Array, "rows k"]:
        """The chunks' rows, zero where they are not used."""
        return jnp.where(self.used, rows[: self.used.shape[0]], 0)

    def into(self, rows: Float[Array, "all_rows k"], a: Float[Array, "E r k"]) -> Float[Array, "rows r"]:
        """Each row times its expert's `a`, transposed."""
        return self._product("cmk,crk->cmr", rows, a)

    def plus(
        self, product: Float[Array, "all_rows n"], inner: Float[Array, "rows r"], b: Float[Array, "E r n"]
    ) -> Float[Array, "rows n"]:
        """A product of the frozen weights and, of the chunks' rows, each row times its expert's `b`."""
        low_rank = self._product("cmr,crn->cmn", inner, b)
        total = product[: self.used.shape[0]].astype(jnp.float32) + low_rank.astype(jnp.float32)
        return total.astype(product.dtype)

    def sums(self, inner: Float[Array, "rows r"], rows: Float[Array, "rows k"]) -> Float[Array, "E r k"]:
        """For each expert the sum of its rows' outer products, in float32; every row must be a number."""
        by_chunk = jnp.einsum("cmr,cmk->crk", self._cut(inner), self._cut(rows), preferred_element_type=jnp.float32)
        of_expert = jax.nn.one_hot(self.experts, self.num_experts, axis=0)
        return jnp.einsum("ec,crk->erk", of_expert, by_chunk, precision=jax.lax.Precision.HIGHEST)

    def _product(self, dims: str, rows: Array, matrices: Array) -> Array:
        chosen = matrices.astype(rows.dtype)[self.experts]
        product = jnp.einsum(dims, self._cut(rows), chosen, preferred_element_type=rows.dtype)
        return product.reshape(self.used.shape[0], -1)

    def _cut(self, rows: Array) -> Array:
        return rows[: self.used.shape[0]].reshape(self.experts.shape[0], -1, rows.shape[-1])


class AdaptedRows:
    """What adapters add to the rows of the backward pass; rows and gradients of answers are in mma order."""

    def __init__(
        self,
        adapters: ExpertAdapters,
        chunks: Chunks,
        rows: Float[Array, "all_rows D"],
        d_answers: Float[Array, "all_rows D"],
    ):
        self._low_rank, self._back = jax.vjp(arrange, adapters)
        self._chunks = chunks
        self._rows, self._d_answers = chunks.only_used(rows), chunks.only_used(d_answers)
        self._inner = chunks.into(self._rows, self._low_rank.gate_up_a)
        self._d_inner = chunks.into(self._d_answers, self._low_rank.down_b)

    def hidden(self, product: Float[Array, "all_rows F2"]) -> Float[Array, "rows F2"]:
        """The hidden values, in the order of the packed rows."""
        gate_up_b = from_mma_order(self._low_rank.gate_up_b)
        return self._chunks.only_used(self._chunks.plus(product, self._inner, gate_up_b))

    def d_activated(self, product: Float[Array, "all_rows F"]) -> Float[Array, "rows F"]:
        """The gradients of the activations, without the rows' shares."""
        return self._chunks.only_used(self._chunks.plus(product, self._d_inner, self._low_rank.down_a))

    def d_rows(self, product: Float[Array, "all_rows D"], d_hidden: Float[Array, "rows F2"]) -> Float[Array, "rows D"]:
        """The gradients of the rows."""
        return self._chunks.plus(product, self._d_hidden_inner(d_hidden), self._low_rank.gate_up_a)

    def gradients(self, d_hidden: Float[Array, "rows F2"], weighted: Float[Array, "rows F"]) -> ExpertAdapters:
        """Of the adapters; `weighted` are the activations times their rows' shares."""
        low_rank, chunks = self._low_rank, self._chunks
        found = Arranged(
            gate_up_a=chunks.sums(self._d_hidden_inner(d_hidden), self._rows),
            gate_up_b=chunks.sums(self._inner, d_hidden),
            down_a=chunks.sums(self._d_inner, weighted),
            down_b=chunks.sums(chunks.into(weighted, low_rank.down_a), self._d_answers),
        )
        (d_adapters,) = self._back(jax.tree.map(lambda one, like: one.astype(like.dtype), found, low_rank))
        return d_adapters

    def _d_hidden_inner(self, d_hidden: Float[Array, "rows F2"]) -> Float[Array, "rows r"]:
        return self._chunks.into(d_hidden, self._low_rank.gate_up_b)
