"""The two products of the expert layer on TPUs: row tiles of one expert each, its matrix unpacked in VMEM.

One kernel for gate and up with the bias and SwiGLU, one for down with its bias. The grid is columns by row tiles. A
row tile names its expert, whose packed columns are fetched while the tile before multiplies, and unpacked to bfloat16
if the tile before was another expert's: so once for each expert and columns, however many row tiles it has. Row tiles
past the last name the last one's expert and rows, so nothing is fetched or written for them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.experts.tpu_layout import LANES, STEP_WORDS, TPUExperts, scale_words, spread_scales, unpack_words

LARGEST_VMEM = 56 * 2**20
"""Bytes that one kernel may ask for: tpu7x has 64 MiB a core, the others more."""
_SPARE_VMEM = 4 * 2**20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowTiles:
    """Which rows and which expert each tile has. From `num_tiles` on, entries repeat the last tile's (0 if none)."""

    experts: Any
    """int32 `tiles`."""
    sources: Any
    """int32 `tiles`: the tile's rows of the input, counted in tiles."""
    targets: Any
    """int32 `tiles`: its rows of the result."""
    num_tiles: Any
    """int32 `1`."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut."""

    gate_up_columns: int = 512
    """Of gate and of up each, a multiple of 128."""
    down_columns: int = 1024


@dataclasses.dataclass(frozen=True)
class SwiGLU:
    """The clamped SwiGLU's constants."""

    alpha: float
    limit: float


def gate_up(
    rows: BFloat16[Array, "rows D"],
    weights: TPUExperts,
    tiles: RowTiles,
    *,
    tile_rows: int,
    num_rows: int,
    activation: SwiGLU,
    cut: Tiles,
    interpret: Any = False,
) -> BFloat16[Array, "num_rows F"]:
    """The activations of each row tile; result rows that no tile has are arbitrary."""
    width, expert_width = weights.width, weights.expert_width
    columns = min(cut.gate_up_columns, weights.gate_up_words.shape[-1])
    return _call(
        functools.partial(_gate_up_kernel, activation=activation),
        tiles,
        rows,
        [
            (weights.gate_up_words, (None, 2, width // 8, columns)),
            (weights.gate_up_scales, (None, 2, scale_words(width), columns)),
            (weights.gate_up_bias, (None, 2, columns)),
        ],
        jax.ShapeDtypeStruct((num_rows, expert_width), rows.dtype),
        tile_rows=tile_rows,
        columns=columns,
        scratch=[_unpacked(2, width, columns)],
        name="experts_gate_up",
        interpret=interpret,
    )


def down(
    rows: BFloat16[Array, "rows F"],
    weights: TPUExperts,
    tiles: RowTiles,
    *,
    tile_rows: int,
    num_rows: int,
    cut: Tiles,
    interpret: Any = False,
) -> BFloat16[Array, "num_rows D"]:
    """The answers of each row tile; result rows that no tile has are arbitrary."""
    columns = min(cut.down_columns, weights.down_words.shape[-1])
    return _call(
        _down_kernel,
        tiles,
        rows,
        _down_matrix(weights, columns),
        jax.ShapeDtypeStruct((num_rows, weights.width), rows.dtype),
        tile_rows=tile_rows,
        columns=columns,
        scratch=[_unpacked(1, weights.expert_width, columns)],
        name="experts_down",
        interpret=interpret,
    )


def down_and_sum(
    rows: BFloat16[Array, "rows F"],
    weights: TPUExperts,
    tiles: RowTiles,
    shares: Float[Array, "tiles m 1"],
    *,
    cut: Tiles,
    interpret: Any = False,
) -> BFloat16[Array, "m D"]:
    """The answers of all row tiles, each row of a tile times its share, added up in float32 in the tiles' order."""
    tile_rows = shares.shape[1]
    columns = min(cut.down_columns, weights.down_words.shape[-1])
    shares_spec = pl.BlockSpec((None, tile_rows, 1), lambda column, tile, *tables: (tables[2][tile], 0, 0))
    return _call(
        _down_and_sum_kernel,
        tiles,
        rows,
        _down_matrix(weights, columns),
        jax.ShapeDtypeStruct((tile_rows, weights.width), rows.dtype),
        tile_rows=tile_rows,
        columns=columns,
        scratch=[_unpacked(1, weights.expert_width, columns), pltpu.VMEM((tile_rows, columns), jnp.float32)],
        last_operand=(shares, shares_spec),
        summed=True,
        name="experts_down_and_sum",
        interpret=interpret,
    )


def _down_matrix(weights: TPUExperts, columns: int) -> list[tuple[Array, tuple[int | None, ...]]]:
    return [
        (weights.down_words[:, None], (None, 1, weights.expert_width // 8, columns)),
        (weights.down_scales[:, None], (None, 1, scale_words(weights.expert_width), columns)),
        (weights.down_bias, (None, 1, columns)),
    ]


def _unpacked(matrices: int, depth: int, columns: int) -> Any:
    """Room for matrices of bfloat16, two rows in a word: registers are unpacked as words, and stay as they are."""
    return pltpu.VMEM((matrices, depth // 2, columns), jnp.int32)


def _call(
    kernel: Callable[..., None],
    tiles: RowTiles,
    rows: Array,
    matrix: list[tuple[Array, tuple[int | None, ...]]],
    result: jax.ShapeDtypeStruct,
    *,
    tile_rows: int,
    columns: int,
    scratch: list[Any],
    name: str,
    interpret: Any,
    last_operand: tuple[Array, pl.BlockSpec] | None = None,
    summed: bool = False,
) -> Array:
    """Run a kernel over columns and row tiles; `summed`, all row tiles have the same rows of the result."""
    num_columns = result.shape[1]

    def matrix_block(shape: tuple[int | None, ...]) -> pl.BlockSpec:
        middle = (0,) * (len(shape) - 2)
        return pl.BlockSpec(shape, lambda column, tile, *tables: (tables[0][tile], *middle, column))

    in_specs = [
        pl.BlockSpec((tile_rows, rows.shape[1]), lambda column, tile, *tables: (tables[1][tile], 0)),
        *(matrix_block(shape) for _, shape in matrix),
    ]
    operands = [rows, *(array for array, _ in matrix)]
    if last_operand is not None:
        operands.append(last_operand[0])
        in_specs.append(last_operand[1])
    out_spec = pl.BlockSpec(
        (tile_rows, columns), lambda column, tile, *tables: (0 if summed else tables[2][tile], column)
    )
    depth = rows.shape[1]
    num_matrices = matrix[0][0].shape[1]
    scratch = [*scratch, pltpu.VMEM((num_matrices, 4 * scale_words(depth), columns), jnp.int32)]
    needed = _vmem_bytes(in_specs, operands, out_spec, result, scratch)
    if needed > LARGEST_VMEM:
        raise Unsupported(
            f"experts: {name} with tiles of {tile_rows} rows of width {depth} and {columns} columns needs {needed} "
            f"bytes of VMEM, the most is {LARGEST_VMEM}"
        )
    return pl.pallas_call(
        kernel,
        out_shape=result,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(num_columns, columns), tiles.experts.shape[0]),
            in_specs=in_specs,
            out_specs=out_spec,
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=needed + _SPARE_VMEM
        ),
        cost_estimate=_cost(tiles, matrix, rows, result, tile_rows=tile_rows),
        name=name,
        interpret=interpret,
    )(tiles.experts, tiles.sources, tiles.targets, tiles.num_tiles, *operands)


def _cost(
    tiles: RowTiles, matrix: list[tuple[Array, tuple[int | None, ...]]], rows: Array, result: Any, *, tile_rows: int
) -> pl.CostEstimate:
    """What the compiler cannot see: the most that these shapes may need, every tile being there."""
    num_tiles, num_experts = tiles.experts.shape[0], matrix[0][0].shape[0]
    num_matrices = matrix[0][0].shape[1]
    packed = sum(array.size * array.dtype.itemsize for array, _ in matrix) // num_experts
    moved = sum(math.prod(array.shape) * array.dtype.itemsize for array in (rows, result))
    products = num_matrices * tile_rows * rows.shape[1] * result.shape[1]
    return pl.CostEstimate(
        flops=2 * num_tiles * products,
        bytes_accessed=min(num_tiles, num_experts) * packed + moved,
        transcendentals=num_tiles * tile_rows * result.shape[1] * (num_matrices - 1),
    )


def _vmem_bytes(
    in_specs: list[pl.BlockSpec], operands: list[Array], out_spec: pl.BlockSpec, result: Any, scratch: list[Any]
) -> int:
    """Blocks are there twice, one in use and one on its way; the last dim fills whole registers."""

    def size(shape: Any, dtype: Any) -> int:
        dims = [dim for dim in shape if dim is not None]
        dims[-1] = -(-dims[-1] // LANES) * LANES
        return math.prod(dims) * jnp.dtype(dtype).itemsize

    blocks = [(spec.block_shape, array.dtype) for spec, array in zip(in_specs, operands, strict=True)]
    blocks.append((out_spec.block_shape, result.dtype))
    return 2 * sum(size(*block) for block in blocks) + sum(size(memory.shape, memory.dtype) for memory in scratch)


def _gate_up_kernel(
    experts: Any, sources: Any, targets: Any, num_tiles: Any,
    rows: Any, words: Any, scales: Any, bias: Any,
    out: Any,
    matrix: Any, bases: Any,
    *,
    activation: SwiGLU,
) -> None:  # fmt: skip
    @pl.when(pl.program_id(1) < num_tiles[0])
    def _() -> None:
        _unpack_if_new(experts, words, scales, matrix, bases)
        gate, up = (_multiply(rows, matrix, bias, half) for half in (0, 1))
        gate = jnp.minimum(gate, activation.limit)
        up = jnp.clip(up, -activation.limit, activation.limit)
        out[...] = (gate * jax.nn.sigmoid(activation.alpha * gate) * (up + 1)).astype(out.dtype)


def _down_kernel(
    experts: Any, sources: Any, targets: Any, num_tiles: Any,
    rows: Any, words: Any, scales: Any, bias: Any,
    out: Any,
    matrix: Any, bases: Any,
) -> None:  # fmt: skip
    @pl.when(pl.program_id(1) < num_tiles[0])
    def _() -> None:
        _unpack_if_new(experts, words, scales, matrix, bases)
        out[...] = _multiply(rows, matrix, bias, 0).astype(out.dtype)


def _down_and_sum_kernel(
    experts: Any, sources: Any, targets: Any, num_tiles: Any,
    rows: Any, words: Any, scales: Any, bias: Any, shares: Any,
    out: Any,
    matrix: Any, total: Any, bases: Any,
) -> None:  # fmt: skip
    tile = pl.program_id(1)

    @pl.when(tile == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    @pl.when(tile < num_tiles[0])
    def _() -> None:
        _unpack_if_new(experts, words, scales, matrix, bases)
        # Rows are those of all tokens: what an expert says to others may be anything.
        share = shares[...]
        total[...] += jnp.where(share == 0, 0.0, share * _multiply(rows, matrix, bias, 0))

    @pl.when(tile == pl.num_programs(1) - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def _unpack_if_new(experts: Any, words: Any, scales: Any, matrix: Any, bases: Any) -> None:
    tile = pl.program_id(1)

    @pl.when((tile == 0) | (experts[tile] != experts[jnp.maximum(tile - 1, 0)]))
    def _() -> None:
        for index in range(words.shape[0]):
            for byte in range(4):
                bases[index, pl.ds(byte * scales.shape[1], scales.shape[1]), :] = spread_scales(scales[index], byte)
            jax.lax.fori_loop(
                0,
                words.shape[1] // STEP_WORDS,
                functools.partial(_unpack_step, words, matrix, bases, index),
                None,
            )


def _unpack_step(words: Any, matrix: Any, bases: Any, index: int, step: Int[Array, ""], _: None) -> None:
    packed = words[index, pl.ds(pl.multiple_of(step * STEP_WORDS, STEP_WORDS), STEP_WORDS), :]
    first, second = (bases[index, pl.ds(2 * step + block, 1), :] for block in (0, 1))
    for pair, values in enumerate(unpack_words(packed, first, second)):
        start = pl.multiple_of((4 * step + pair) * STEP_WORDS, STEP_WORDS)
        matrix[index, pl.ds(start, STEP_WORDS), :] = values


def _multiply(rows: Any, matrix: Any, bias: Any, index: int) -> Float[Array, "m n"]:
    product = jnp.dot(rows[...], pltpu.bitcast(matrix[index], jnp.bfloat16), preferred_element_type=jnp.float32)
    return product + bias[index][None]
