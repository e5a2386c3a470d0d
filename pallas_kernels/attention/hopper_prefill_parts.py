"""The products of the prefill kernel, and what stands in for them under the interpreter.

On the hardware a step's scores and the previous step's weighted values are in the tensor cores at once; queries come
from shared memory, weights from registers. The interpreter knows neither; there both are jax.numpy.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from pallas_kernels import hopper

WIDTH = 64
ROWS = plgpu.Layout.WGMMA.reduce(1)

Softmax = Callable[[Any], tuple[Any, ...]]
"""Scores to the weights and the denominators, which depend on every weight, and whatever else the caller carries."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """The products of one warpgroup; keys and values are refs of one step's pages in shared memory."""

    first: Callable[..., Any]
    """(queries, keys, release keys) -> scores."""
    next: Callable[..., Any]
    """(queries, keys, release keys, weights, values, accumulator, softmax, zero) -> what softmax gave, accumulator.

    `zero` is one that the compiler does not know to be one.
    """
    last: Callable[..., Any]
    """(weights, values, accumulator) -> accumulator."""


def hardware() -> Parts:
    """The products as wgmma."""
    finish_before_waiting = _finish_before_waiting()

    def first(queries, keys, release_keys):
        def multiply(scores):
            plgpu.wgmma(scores, queries, keys.T)
            return scores[...]

        scores = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((64, keys.shape[0])))
        release_keys()
        return scores

    def following(queries, keys, release_keys, weights, values, accumulator, softmax: Softmax, zero):
        def overlap(scores, weighted):
            weighted[...] = accumulator
            plgpu.wgmma(scores, queries, keys.T)
            plgpu.wgmma(weighted, weights, values)
            score_values = plgpu.wgmma_accumulator_load(scores, wait_n=1)
            release_keys()
            results = softmax(score_values)
            finish_before_waiting(results[1])
            return results, plgpu.wgmma_accumulator_load(weighted, wait_n=0)

        results, weighted = pl.run_scoped(
            overlap, plgpu.WGMMAAccumulatorRef((64, keys.shape[0])), plgpu.WGMMAAccumulatorRef((64, WIDTH))
        )
        # The weights' registers may be those of the product's left operand: only now is it done with them.
        new_weights, weighted = lax.optimization_barrier((results[0], weighted))
        return (_copied(new_weights.shape)(new_weights, zero), *results[1:]), weighted

    def last(weights, values, accumulator):
        def multiply(weighted):
            weighted[...] = accumulator
            plgpu.wgmma(weighted, weights, values)
            return weighted[...]

        return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((64, WIDTH)))

    return Parts(first, following, last)


def interpreted() -> Parts:
    """The products as jax.numpy."""

    def multiply(a, b):
        return jnp.dot(a, b, preferred_element_type=jnp.float32)

    def first(queries, keys, release_keys):
        scores = multiply(queries[...], keys[...].T)
        release_keys()
        return scores

    def following(queries, keys, release_keys, weights, values, accumulator, softmax: Softmax, zero):
        del zero
        results = softmax(first(queries, keys, release_keys))
        return results, accumulator + multiply(weights, values[...])

    def last(weights, values, accumulator):
        return accumulator + multiply(weights, values[...])

    return Parts(first, following, last)


def _finish_before_waiting() -> Callable[..., None]:
    """Of denominators: keeps ptxas from moving the softmax behind the wait for the product that it is to overlap.

    It does so freely, since nothing ties the two together: so a sleep that never happens depends on the softmax.
    """

    @plgpu.inline_mgpu(arg_types=(ROWS,))
    def finish_before_waiting(_, denominators):
        code = "{ .reg .pred p; setp.lt.f32 p, $0, 0fBF800000; @p nanosleep.u32 1; }"  # below -1: never
        for register in denominators.registers.flat:
            value = vector.extract(register, [], [0]) if isinstance(register.type, ir.VectorType) else register
            hopper.assembly([], [value], code, "f", effect=True)

    return finish_before_waiting


def _copied(shape: tuple[int, ...]) -> Callable[..., Any]:
    """Of weights and a zero: the weights in other registers, by a sum that ptxas cannot see through.

    It would otherwise write them to those of the product in flight, find that it must not, and let every product wait
    for the one before (its message C7513).
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT(())),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )
    def copied(_, weights, zero):
        copies = np.empty_like(weights.registers)
        for index, pair in np.ndenumerate(weights.registers):
            words = vector.bitcast(ir.VectorType.get((1,), hopper.i32()), pair)
            word = vector.extract(words, [], [0])
            code = "add.u32 $0, $1, $2;"
            word = hopper.assembly([hopper.i32()], [word, zero.registers.item()], code, "=r,r,r", effect=True)[0]
            words = vector.from_elements(ir.VectorType.get((1,), hopper.i32()), [word])
            copies[index] = vector.bitcast(pair.type, words)
        return mgpu.FragmentedArray(_registers=copies, _layout=weights.layout, _is_signed=None)

    return copied
