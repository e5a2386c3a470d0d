"""The products of the gradients' kernels on Hopper, what stands in for them under the interpreter, and the softmax.

On the hardware the two products of a step are in the tensor cores at once, as are the one or two that follow from them;
their left operands come from shared memory or, where they were computed, from registers. The interpreter does not know
the latter; there products are jax.numpy.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper_card import LOG2_E

WIDTH = 64
"""Of a head."""
TILE = 64
"""Rows, or keys, of a tile: what a warpgroup holds, and what a step brings."""
SCALE = WIDTH**-0.5
"""Of scores."""
_WGMMA = plgpu.Layout.WGMMA
Ref = Any


@dataclasses.dataclass(frozen=True)
class Softmax:
    """Makes weights of a tile of scores, and from the weights' gradients the scores'.

    All fields are of the scores' shape. The facts of a row, `log_sum` to `last`, are in this order in the kernels'
    arrays of facts.
    """

    key: Int[Array, "64 64"]
    """Its position."""
    log_sum: Float[Array, "64 64"]
    """The base-2 logarithm of the softmax's denominator."""
    slope: Float[Array, "64 64"]
    """The inner product of the row's answer and the answer's gradient."""
    first: Float[Array, "64 64"]
    """The first key that the row sees,"""
    last: Float[Array, "64 64"]
    """and the last."""

    @classmethod
    def of_columns(cls, first_key: Int[Array, ""], facts: Ref) -> "Softmax":
        """Of a tile with a column for each row of `facts`, in shared memory."""
        return cls(first_key + _iota(0), *_each(facts, 1, layout=_WGMMA.reduce(0)))

    @classmethod
    def of_rows(cls, facts: Ref) -> Callable[[Int[Array, ""]], "Softmax"]:
        """Of tiles with the rows of `facts`, in global memory; of each tile's first key."""
        rows, column = _each(facts, 0, layout=_WGMMA.reduce(1), optimized=False), _iota(1)
        return lambda first_key: cls(first_key + column, *rows)

    def weights(self, scores: Float[Array, "64 64"]) -> Float[Array, "64 64"]:
        """Zero where a row does not see the key."""
        key = self.key.astype(jnp.float32)
        weights = jnp.exp2(scores * (SCALE * LOG2_E) - self.log_sum)
        return jnp.where((key >= self.first) & (key <= self.last), weights, 0.0)

    def d_scores(self, weights: Float[Array, "64 64"], d_weights: Float[Array, "64 64"]) -> Float[Array, "64 64"]:
        """Of the scores times `SCALE`."""
        return weights * (d_weights - self.slope)


@dataclasses.dataclass(frozen=True)
class Parts:
    """The products of one warpgroup."""

    weights: Callable[[Any, Ref, Any, Ref, Softmax], tuple[Array, Array]]
    """(left, right, d_left, d_right, softmax) -> weights and gradients of scores, in bfloat16.

    The scores are left @ right.T, the gradients of the weights d_left @ d_right.T.
    """
    add: Callable[[tuple[Array, ...], tuple[Array, ...], tuple[Ref, ...]], tuple[Array, ...]]
    """(sums, lefts, rights) -> each sum + left @ right."""


def hardware() -> Parts:
    """The products as wgmma."""

    def weights(left: Ref, right: Ref, d_left: Ref, d_right: Ref, softmax: Softmax) -> tuple[Array, Array]:
        def multiply(scores: Ref, d_weights: Ref) -> tuple[Array, Array]:
            plgpu.wgmma(scores, left, right.T)
            plgpu.wgmma(d_weights, d_left, d_right.T)
            weights = softmax.weights(plgpu.wgmma_accumulator_load(scores, wait_n=1))
            d_scores = softmax.d_scores(weights, plgpu.wgmma_accumulator_load(d_weights, wait_n=0))
            return weights.astype(jnp.bfloat16), d_scores.astype(jnp.bfloat16)

        return pl.run_scoped(multiply, *[plgpu.WGMMAAccumulatorRef((TILE, TILE))] * 2)

    def add(sums: tuple[Array, ...], lefts: tuple[Array, ...], rights: tuple[Ref, ...]) -> tuple[Array, ...]:
        def multiply(*totals: Ref) -> tuple[Array, ...]:
            for total, given, left, right in zip(totals, sums, lefts, rights, strict=True):
                total[...] = given
                plgpu.wgmma(total, left, right)
            return tuple(plgpu.wgmma_accumulator_load(total, wait_n=0) for total in totals)

        return pl.run_scoped(multiply, *[plgpu.WGMMAAccumulatorRef((TILE, WIDTH))] * len(sums))

    return Parts(weights, add)


def interpreted() -> Parts:
    """The products as jax.numpy."""

    def dot(left: Array, right: Array) -> Float[Array, "64 64"]:
        return jnp.dot(left, right, preferred_element_type=jnp.float32)

    def weights(left: Ref, right: Ref, d_left: Ref, d_right: Ref, softmax: Softmax) -> tuple[Array, Array]:
        weights = softmax.weights(dot(left[...], right[...].T))
        d_scores = softmax.d_scores(weights, dot(d_left[...], d_right[...].T))
        return weights.astype(jnp.bfloat16), d_scores.astype(jnp.bfloat16)

    def add(sums: tuple[Array, ...], lefts: tuple[Array, ...], rights: tuple[Ref, ...]) -> tuple[Array, ...]:
        return tuple(given + dot(left, right[...]) for given, left, right in zip(sums, lefts, rights, strict=True))

    return Parts(weights, add)


def zeros() -> Float[Array, "64 64"]:
    """What sums begin from."""
    return plgpu.layout_cast(jnp.zeros((TILE, WIDTH), jnp.float32), _WGMMA)


def _iota(dim: int) -> Int[Array, "64 64"]:
    return plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), dim, layout=_WGMMA)


def _each(facts: Ref, dim: int, **how: Any) -> list[Float[Array, "64 64"]]:
    """Each fact's 64 numbers along `dim` of a tile."""
    return [lax.broadcast_in_dim(plgpu.load(facts.at[i], **how), (TILE, TILE), [dim]) for i in range(facts.shape[0])]
