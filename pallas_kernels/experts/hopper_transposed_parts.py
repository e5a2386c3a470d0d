"""What a warpgroup of the transposed product does with registers, and what stands in for it under the interpreter.

Two parts: multiply turns two tiles of weights, side by side, into wgmma's A fragment with the tiles' columns as its
rows, and multiplies gradients with it; finish rounds and transposes the result into shared memory.

Nothing is exchanged between threads: they read words of each other's. Row 64i + 16w + 8r + g of the fragment (warp w of
4, i and r of 2, g of 8) is, in mma order, column 32 * (w % 2) + 16i + 8r + g of tile w // 2; so a thread's four rows
are the four codes of one half of a word. Column 32c + 8j + 2t + p of the fragment is row 32c + 8t + 2j + p of the
tiles, which is mma order again: the halves of two words, of rows that follow each other, make four registers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper
from pallas_kernels.experts import hopper_prefill_parts
from pallas_kernels.experts.hopper_layout import TILE, TILE_SCALES, TILE_WORDS, dequantize, to_mma_order

PAIR = 2
"""Tiles, side by side, that a warpgroup takes at a time."""
ROW_WORDS = 32
"""A tile's words lie in shared memory as rows of 128 bytes, swizzled: so the 32 that a warp reads have a bank each."""
TILE_ROWS = TILE_WORDS // ROW_WORDS
GRADIENTS = hopper_prefill_parts.transforms(TILE)
WORDS = plgpu.TilingTransform((8, ROW_WORDS)), plgpu.SwizzleTransform(4 * ROW_WORDS)  # pyright: ignore[reportAbstractUsage]

_ROW_BYTES = 4 * ROW_WORDS


@dataclasses.dataclass(frozen=True)
class Parts:
    """The two parts; refs are those of one warpgroup."""

    multiply: Callable[..., None]
    """(accumulator, words, scales, rows of gradients, staging or None) -> nothing."""
    finish: Callable[..., None]
    """(accumulator's value, output of each tile) -> nothing."""
    staging: tuple[int, int] | None
    """The shape in shared memory that one warpgroup's multiply needs."""


def hardware() -> Parts:
    """The parts as inline PTX."""
    unpack = _unpack()

    def multiply(accumulator, words, scales, gradients, staging) -> None:
        del staging
        plgpu.wgmma(accumulator, unpack(words, scales), gradients.T)

    def finish(value, out) -> None:
        _finish(value.shape[1], out.shape[1])(value, out)

    return Parts(multiply, finish, staging=None)


def interpreted() -> Parts:
    """The parts as jax.numpy."""

    def multiply(accumulator, words, scales, gradients, staging) -> None:
        tiles = dequantize(words[...].reshape(PAIR, TILE_WORDS), scales[...], jnp.bfloat16)
        rows = to_mma_order(tiles.T).reshape(4, 2, 16, TILE)
        staging[...] = jnp.swapaxes(rows, 0, 1).reshape(PAIR * TILE, TILE)
        plgpu.commit_smem()
        plgpu.wgmma(accumulator, staging, gradients.T)

    def finish(value, out) -> None:
        columns = jnp.swapaxes(value.reshape(2, 4, 16, -1), 0, 1).reshape(PAIR, TILE, -1)
        out[:, : value.shape[1]] = jnp.swapaxes(columns, 1, 2).astype(jnp.bfloat16)

    return Parts(multiply, finish, staging=(PAIR * TILE, TILE))


def _unpack() -> Callable[..., Any]:
    """Two tiles of words and scales in shared memory to the fragment."""
    shape = (PAIR * TILE, TILE)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(WORDS), plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )
    def unpack(_, words, scales):
        lane = _Lane()
        rows = arith.shli(lane.t_high, hopper.constant(2))  # of eight, which are swizzled each its own way
        piece = arith.xori(arith.shrui(lane.g, hopper.constant(1)), rows)
        first = _sum(
            hopper.shared_address(words),
            _scaled(lane.tile, 4 * TILE_WORDS),
            _scaled(rows, _ROW_BYTES),
            _scaled(piece, 16),
            _scaled(lane.half, 8),
            _scaled(lane.t_low, 4),
        )
        first_scale = _sum(hopper.shared_address(scales), _scaled(lane.tile, 4 * TILE_SCALES), _scaled(lane.t_high, 32))
        scale_byte = _sum(_scaled(lane.half, 0x2222), _scaled(lane.t_low, 0x1111), hopper.constant(0x4400))
        own, other = _halves(lane.g)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        registers: list[list[ir.Value]] = [[], []]
        for c in range(2):
            for j in range(4):
                low, high = (
                    _load(arith.xori(first, hopper.constant(16 * (4 * p + j))), _ROW_BYTES * (8 * c + j))
                    for p in range(2)
                )
                codes = _codes(_permuted(low, high, own), _permuted(low, high, other))
                scale = _scale_pair(first_scale, 64 * c + 8 * j, scale_byte)
                for index, code in enumerate(codes):
                    registers[index // 2].append(mgpu.utils.bitcast(hopper.scaled(code, scale), pair))
        return hopper_prefill_parts.fragment([*registers[0], *registers[1]], shape)

    return unpack


class _Lane:
    """Where a thread of the warpgroup stands: see the module."""

    def __init__(self):
        thread = arith.remui(mgpu.utils.thread_idx(), hopper.constant(128))
        self.tile = arith.shrui(thread, hopper.constant(6))
        self.half = _bits(thread, 5, 1)
        """Which 32 of the tile's columns."""
        self.g = _bits(thread, 2, 3)
        self.t_high = _bits(thread, 1, 1)
        self.t_low = _bits(thread, 0, 1)
        self.lane = _bits(thread, 0, 5)


def _codes(own: ir.Value, other: ir.Value) -> list[ir.Value]:
    """`hopper.codes` of one half of two words: `own` has those halves, `other` has the other halves.

    Each result has one code of both words. The magnitude of the third code lies in the other half.
    """

    def masked(value: ir.Value, shift: int, mask: int) -> ir.Value:
        move = arith.shli if shift > 0 else arith.shrui
        return arith.andi(move(value, hopper.constant(abs(shift))), hopper.constant(mask))

    first = arith.andi(own, hopper.constant(hopper.PACKED_MASK))
    second = masked(own, 6, hopper.PACKED_MASK)
    third = arith.ori(masked(own, 12, 0x80008000), masked(other, -4, 0x01C001C0))
    last = arith.ori(masked(own, 2, 0x80C080C0), masked(own, -6, 0x01000100))
    return [first, second, third, last]


def _scale_pair(pointer: ir.Value, offset: int, byte: ir.Value) -> ir.Value:
    """The selected byte of two words in shared memory as the exponents of two bfloat16 powers of two."""
    code = f"ld.shared.v2.u32 {{$0,$1}}, [$2+{offset}];"
    low, high = hopper.assembly([hopper.i32()] * 2, [pointer], code, "=r,=r,r", effect=True)
    both = arith.shli(_permuted(low, high, byte), hopper.constant(7))
    return arith.andi(both, hopper.constant(0x7F807F80))


def _halves(g: ir.Value) -> tuple[ir.Value, ir.Value]:
    """How to take from two words the halves that have the thread's rows, which are odd or even, and the others."""
    odd = _scaled(arith.andi(g, hopper.constant(1)), 0x2222)
    return _sum(odd, hopper.constant(0x5410)), arith.subi(hopper.constant(0x7632), odd)


def _finish(width: int, most: int) -> Callable[..., Any]:
    """A 128 x width accumulator to the first rows, of `most`, of 64 bfloat16 for each of two tiles."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(GRADIENTS)))
    def finish(_, value, out):
        lane = _Lane()
        sums = value.registers.reshape(2, width // 8, 2)
        row = _bits(lane.lane, 0, 3)
        piece = arith.xori(_sum(_scaled(lane.half, 4), _bits(lane.lane, 3, 2)), row)
        pointer = _sum(
            hopper.shared_address(out),
            _scaled(lane.tile, most * 2 * TILE),
            _scaled(row, 2 * TILE),
            _scaled(piece, 16),
        )
        for block in range(width // 8):
            registers = [sums[i, block, r] for i in range(2) for r in range(2)]
            matrices = [hopper.bfloat16_pair(*hopper_prefill_parts.scalars(register, 2)) for register in registers]
            hopper_prefill_parts.store_matrices(pointer, block * 16 * TILE, matrices)

    return finish


def _load(pointer: ir.Value, offset: int) -> ir.Value:
    return hopper.assembly([hopper.i32()], [pointer], f"ld.shared.u32 $0, [$1+{offset}];", "=r,r", effect=True)[0]


def _permuted(low: ir.Value, high: ir.Value, selector: ir.Value) -> ir.Value:
    code = "prmt.b32 $0, $1, $2, $3;"
    return hopper.assembly([hopper.i32()], [low, high, selector], code, "=r,r,r,r", effect=False)[0]


def _bits(value: ir.Value, first: int, count: int) -> ir.Value:
    return arith.andi(arith.shrui(value, hopper.constant(first)), hopper.constant((1 << count) - 1))


def _scaled(value: ir.Value, factor: int) -> ir.Value:
    return arith.muli(value, hopper.constant(factor))


def _sum(*values: ir.Value) -> ir.Value:
    total, *rest = values
    for value in rest:
        total = arith.addi(total, value)
    return total
