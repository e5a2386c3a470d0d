"""What a warpgroup of the grouped product does with registers, and what stands in for it under the interpreter.

Two parts: multiply unpacks a tile of weights into wgmma's A fragment and multiplies tokens with it; finish adds the
bias, applies SwiGLU where asked, rounds, and transposes the result into shared memory. The interpreter knows neither
fragments nor PTX: there the weights pass through shared memory and both parts are jax.numpy.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from pallas_kernels import hopper
from pallas_kernels.experts.hopper_layout import TILE, dequantize

THREAD_WORDS = 4


@dataclasses.dataclass(frozen=True)
class SwiGLU:
    """The activation's two constants."""

    alpha: float
    limit: float


@dataclasses.dataclass(frozen=True)
class Parts:
    """The two parts; refs are those of one warpgroup."""

    multiply: Callable[..., None]
    """(accumulator, words, scales, rows of tokens, staging or None) -> nothing."""
    finish: Callable[..., None]
    """(accumulator's value, bias, output) -> nothing."""
    staging: tuple[int, int] | None
    """The shape in shared memory that one warpgroup's multiply needs."""


def out_columns(activation: SwiGLU | None) -> int:
    """Columns of output that a tile's 64 rows give."""
    return TILE if activation is None else TILE // 2


def transforms(columns: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """How rows of so many bfloat16 lie in shared memory: swizzled by their length in bytes."""
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)  # pyright: ignore[reportAbstractUsage]


def hardware(k_tiles: int, activation: SwiGLU | None) -> Parts:
    """The parts as inline PTX."""
    unpack_tiles = _unpack_tiles(k_tiles)

    def multiply(accumulator, words, scales, tokens, staging) -> None:
        del staging
        plgpu.wgmma(accumulator, unpack_tiles(words, scales), tokens.T)

    def finish(value, bias, out) -> None:
        _finish(value.shape[1], activation)(value, bias, out)

    return Parts(multiply, finish, staging=None)


def interpreted(k_tiles: int, activation: SwiGLU | None) -> Parts:
    """The parts as jax.numpy."""

    def multiply(accumulator, words, scales, tokens, staging) -> None:
        staging[...] = dequantize(words[...].reshape(k_tiles, -1), scales[...], jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.wgmma(accumulator, staging, tokens.T)

    def finish(value, bias, out) -> None:
        result = value + bias[:, None]
        if activation is not None:
            gate, up = jnp.moveaxis(result.reshape(4, 2, 8, -1), 1, 0).reshape(2, TILE // 2, -1)
            gate = jnp.minimum(gate, activation.limit)
            up = jnp.clip(up, -activation.limit, activation.limit)
            result = gate * jax.nn.sigmoid(activation.alpha * gate) * (up + 1)
        out[...] = result.astype(jnp.bfloat16).T

    return Parts(multiply, finish, staging=(TILE, TILE * k_tiles))


def _unpack_tiles(k_tiles: int) -> Callable[..., Any]:
    """Words `k_tiles 2 256` and scales `k_tiles 32` in shared memory to the fragment of a 64 x 64 * k_tiles A."""
    shape = (TILE, TILE * k_tiles)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )
    def unpack_tiles(_, words, scales):
        index = ir.IndexType.get()
        thread = arith.remui(mgpu.utils.thread_idx(), hopper.constant(128))
        half = arith.index_cast(index, arith.shrui(thread, hopper.constant(6)))
        first = arith.shli(arith.andi(thread, hopper.constant(63)), hopper.constant(2))
        quad = arith.index_cast(index, arith.shrui(thread, hopper.constant(2)))
        first = arith.index_cast(index, first)
        four_words = ir.VectorType.get((THREAD_WORDS,), hopper.i32())
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        registers = []
        for k in range(k_tiles):
            tile = mgpu.c(k, index)
            loaded = vector.load(four_words, words, [tile, half, first])
            scale_word = memref.load(scales, [tile, quad])
            for c in range(2):
                by_row = []
                for r in range(2):
                    place = 2 * c + r
                    word = vector.extract(loaded, [], [place])
                    by_row.append(hopper.unpack(word, hopper.scale_pair(scale_word, place)))
                registers += [mgpu.utils.bitcast(by_row[r][j], pair) for j in range(4) for r in range(2)]
        return fragment(registers, shape)

    return unpack_tiles


def _finish(width: int, activation: SwiGLU | None) -> Callable[..., None]:
    """A 64 x width accumulator to width rows of bfloat16 in shared memory."""
    columns = out_columns(activation)
    blocks = width // 8

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.RefType(transforms(columns))))
    def finish(_, value, bias, out):
        sums = value.registers.reshape(blocks, 2)
        offsets = [scalars(register, 1)[0] for register in bias.registers.flat]
        matrices = []
        for block in range(blocks):
            rows = [[arith.addf(item, offsets[r]) for item in scalars(sums[block, r], 2)] for r in range(2)]
            if activation is None:
                matrices += [_pack_pair(*rows[0]), _pack_pair(*rows[1])]
            else:
                matrices.append(_pack_pair(*(_swiglu(gate, up, activation) for gate, up in zip(*rows, strict=True))))
        _store_transposed(matrices, out, columns)

    return finish


def _store_transposed(matrices: list[ir.Value], out: ir.Value, columns: int) -> None:
    """Write the warp's 8 x 8 matrices, in order of tokens, then of rows, as rows of tokens.

    A row of tokens has `columns` bfloat16, 8 of each of the four warps for one matrix per eight tokens or 16 for two,
    and its 16-byte pieces are swizzled as TMA expects: exclusive or of the address's bits 4 up with its bits 7 up.
    """
    per_block = columns // 32
    thread = arith.remui(mgpu.utils.thread_idx(), hopper.constant(128))
    warp = arith.shrui(thread, hopper.constant(5))
    row = arith.andi(thread, hopper.constant(7))
    matrix = arith.andi(arith.shrui(thread, hopper.constant(3)), hopper.constant(3))
    if per_block == 1:
        token = arith.addi(arith.shli(matrix, hopper.constant(3)), row)
        piece = warp
    else:
        token = arith.addi(arith.shli(arith.shrui(matrix, hopper.constant(1)), hopper.constant(3)), row)
        piece = arith.addi(arith.shli(warp, hopper.constant(1)), arith.andi(matrix, hopper.constant(1)))
    row_bytes = 2 * columns
    start = arith.muli(token, hopper.constant(row_bytes))
    swizzled = arith.xori(
        piece, arith.andi(arith.shrui(start, hopper.constant(7)), hopper.constant(row_bytes // 16 - 1))
    )
    start = arith.addi(start, arith.shli(swizzled, hopper.constant(4)))
    base = llvm.ptrtoint(hopper.i32(), mgpu.utils.memref_ptr(out))
    pointer = arith.addi(base, start)
    done = 0
    while done < len(matrices):
        count = 1 << min(2, int(math.log2(len(matrices) - done)))
        offset = done // per_block * 8 * row_bytes
        store_matrices(pointer, offset, matrices[done : done + count])
        done += count


def store_matrices(pointer: ir.Value, offset: int, matrices: list[ir.Value]) -> None:
    """Write one, two or four 8 x 8 matrices of a warp transposed; every eight lanes point to the rows of one."""
    names = ", ".join(f"${1 + index}" for index in range(len(matrices)))
    code = f"stmatrix.sync.aligned.m8n8.x{len(matrices)}.trans.shared.b16 [$0+{offset}], {{{names}}};"
    constraints = ",".join(["r"] * (1 + len(matrices)))
    hopper.assembly([], [pointer, *matrices], code, constraints, effect=True)


def _swiglu(gate: ir.Value, up: ir.Value, activation: SwiGLU) -> ir.Value:
    """gate * sigmoid(alpha * gate) * (up + 1), the gate clamped from above and up from both sides."""
    f32 = ir.F32Type.get()
    limit = mgpu.c(activation.limit, f32)
    gate = arith.minimumf(gate, limit)
    up = arith.maximumf(arith.minimumf(up, limit), mgpu.c(-activation.limit, f32))
    power = arith.mulf(gate, mgpu.c(-activation.alpha * math.log2(math.e), f32))
    (exponential,) = hopper.assembly([f32], [power], "ex2.approx.ftz.f32 $0, $1;", "=f,f", effect=False)
    denominator = arith.addf(exponential, mgpu.c(1.0, f32))
    (sigmoid,) = hopper.assembly([f32], [denominator], "rcp.approx.ftz.f32 $0, $1;", "=f,f", effect=False)
    gated = arith.mulf(gate, sigmoid)
    return arith.addf(arith.mulf(gated, up), gated)


def _pack_pair(low: ir.Value, high: ir.Value) -> ir.Value:
    """Two float32 rounded to bfloat16 in one register."""
    return hopper.assembly([hopper.i32()], [low, high], "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", effect=False)[0]


def scalars(register: ir.Value, count: int) -> list[ir.Value]:
    """The numbers that one of a fragment's registers holds."""
    if not isinstance(register.type, ir.VectorType):
        return [register]
    return [vector.extract(register, [], [index]) for index in range(count)]


def fragment(registers: list[ir.Value], shape: tuple[int, int]) -> mgpu.FragmentedArray:
    """An A operand of wgmma, from pairs of bfloat16: by 64 rows, then by 8 columns, then by 8 rows."""
    layout = plgpu.Layout.WGMMA.to_mgpu()
    array = np.empty(len(registers), dtype=object)
    array[:] = registers
    return mgpu.FragmentedArray(
        _registers=array.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None
    )
