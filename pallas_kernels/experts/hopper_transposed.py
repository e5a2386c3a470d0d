"""The grouped product of the backward pass: tiles of gradients times their expert's MXFP4 matrix, transposed.

A persistent grid, cut as in `hopper_grouped_matmul`: in each block one warpgroup copies (TMA, a ring of stages) and one
or two multiply. The weights are the same packed tiles as in the forward pass, read another way: two of them, side by
side, are a warpgroup's A operand, their columns its rows, unpacked in registers; the gradients are the B operand.
"""

import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, UInt32

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.experts import hopper_transposed_parts as parts_of
from pallas_kernels.experts import tiles
from pallas_kernels.experts.hopper_layout import TILE, TILE_SCALES, TILE_WORDS, HopperExperts
from pallas_kernels.experts.hopper_routing import Grouping
from pallas_kernels.experts.hopper_transposed_parts import PAIR, ROW_WORDS, TILE_ROWS
from pallas_kernels.experts.tiles import Tiling
from pallas_kernels.hopper_card import NUM_MULTIPROCESSORS, SHARED_BYTES

_RESERVED = 4096
_REGISTERS = {1: (232, 40), 2: (232, 40)}
"""Of a multiplying thread and of a copying one, by the number of multiplying warpgroups."""
_MAX_WIDTH = 128
_MAX_STAGES = 8
_WIDTHS = (32, 64, 96, 128)
"""Of the tiles, where `tiles.prefill` has wider ones."""


def grouped_matmul_transposed(
    d: BFloat16[Array, "rows N"],
    words: UInt32[Array, "E n k 512"],
    scales: UInt32[Array, "E n k 32"],
    grouping: Grouping,
    *,
    tiling: Tiling,
    interpret: bool = False,
) -> BFloat16[Array, "rows K"]:
    """Multiply each tile's rows by its expert's matrix from the left: d @ W, where `grouped_matmul` has x @ W.T.

    Columns of d are the matrix's packed rows in mma order, columns of the result its columns in mma order
    (`hopper_layout.to_mma_order`). Rows in no tile are left as they were: arbitrary. Accumulates in float32, rounds
    once.

    Raises Unsupported for a tiling beyond 128 rows, two warpgroups or one tile a step, for a ring of one stage, and for
    matrices of fewer columns than the warpgroups take.
    """
    num_rows = d.shape[0]
    num_experts, steps, num_columns, _ = words.shape
    check(tiling, num_columns=num_columns)
    warpgroups, largest = tiling.warpgroups, tiling.widths[-1]
    at_once = PAIR * warpgroups
    stages = tiling.stages or _stages_that_fit(tiling)
    strips = -(-num_columns // at_once)
    parts = parts_of.interpreted() if interpret else parts_of.hardware()
    max_tiles = grouping.tile_experts.shape[0]
    grid = 2 if interpret else min(NUM_MULTIPROCESSORS, max_tiles * strips)
    most, least = _REGISTERS[warpgroups]

    def grouped_transposed_kernel(
        d_gmem, words_gmem, scales_gmem, experts_gmem, rows_gmem, widths_gmem, count_gmem, out_gmem,
        d_smem, words_smem, scales_smem, out_smem, full, empty, staging=None,
    ):  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")
        block = lax.axis_index("block")

        def count_items():
            return lax.div(count_gmem[0] * strips - block + grid - 1, jnp.int32(grid))

        def item_of(turn):
            item = block + turn * grid
            tile, strip = lax.div(item, jnp.int32(strips)), lax.rem(item, jnp.int32(strips))
            first = jnp.minimum(strip * at_once, num_columns - at_once)
            return tile, strip * at_once, first

        def for_width(tile, act) -> None:
            for index, tile_width in enumerate(tiling.widths):
                pl.when(widths_gmem[tile] == index)(lambda tile_width=tile_width: act(tile_width))

        def row_of(tile):
            return pl.multiple_of(rows_gmem[tile], math.gcd(*tiling.widths))

        def stage_of(turn, step):
            return lax.rem(turn * steps + step, jnp.int32(stages))

        @pl.when(warpgroup < warpgroups)
        def _multiply() -> None:
            plgpu.set_max_registers(most, action="increase")
            num_items = count_items()

            @pl.loop(0, num_items)
            def _one_item(turn):
                tile, wanted, first = item_of(turn)
                column = first + PAIR * warpgroup

                def one_step(accumulator, tile_width, step):
                    stage = stage_of(turn, step)
                    plgpu.barrier_wait(full.at[stage])
                    parts.multiply(
                        accumulator,
                        words_smem.at[stage, pl.ds(warpgroup * PAIR * TILE_ROWS, PAIR * TILE_ROWS)],
                        scales_smem.at[stage, pl.ds(warpgroup * PAIR, PAIR)],
                        d_smem.at[stage, pl.ds(0, tile_width)],
                        staging and staging.at[warpgroup],
                    )

                def release(step):
                    plgpu.barrier_arrive(empty.at[stage_of(turn, step)])

                def product(tile_width, accumulator):
                    one_step(accumulator, tile_width, 0)

                    def overlapped(step):
                        one_step(accumulator, tile_width, step)
                        plgpu.wgmma_wait(1)
                        release(step - 1)

                    # By twos, so that a step's fragment is not in the registers that the step before still reads. What
                    # is odd comes first: with it after the loop, ptxas waits for every product (C7513).
                    before = 1 + (steps - 1) % 2
                    if before == 2:
                        overlapped(1)

                    @pl.loop(0, (steps - before) // 2)
                    def _two_steps(index):
                        overlapped(before + 2 * index)
                        overlapped(before + 1 + 2 * index)

                    plgpu.wgmma_wait(0)
                    release(steps - 1)
                    return accumulator[...]

                def run(tile_width) -> None:
                    value = pl.run_scoped(
                        lambda accumulator: product(tile_width, accumulator),
                        plgpu.WGMMAAccumulatorRef((PAIR * TILE, tile_width)),
                    )
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out = out_smem.at[warpgroup]
                    parts.finish(value, out)
                    plgpu.commit_smem()
                    for index in range(PAIR):

                        @pl.when(column + index >= wanted)
                        def _store(index=index) -> None:
                            here = pl.ds(row_of(tile), tile_width), pl.ds((column + index) * TILE, TILE)
                            plgpu.copy_smem_to_gmem(out.at[index, pl.ds(0, tile_width)], out_gmem.at[here])

                @pl.when(column + PAIR > wanted)
                def _run() -> None:
                    for_width(tile, run)

                @pl.when(column + PAIR <= wanted)
                def _pass() -> None:
                    @pl.loop(0, steps)
                    def _one_step(step):
                        plgpu.barrier_wait(full.at[stage_of(turn, step)])
                        release(step)

            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == warpgroups)
        def _copy() -> None:
            plgpu.set_max_registers(least, action="decrease")
            num_items = count_items()

            @pl.loop(0, num_items)
            def _one_item(turn):
                tile, _, first = item_of(turn)
                expert, row = experts_gmem[tile], row_of(tile)

                def run(tile_width) -> None:
                    @pl.loop(0, steps)
                    def _one_step(step):
                        stage = stage_of(turn, step)

                        @pl.when(turn * steps + step >= stages)
                        def _wait() -> None:
                            plgpu.barrier_wait(empty.at[stage])

                        matrix_row = expert * steps + step
                        word_rows = (
                            matrix_row,
                            pl.ds(pl.multiple_of(first * TILE_ROWS, TILE_ROWS), at_once * TILE_ROWS),
                        )
                        gradients = (pl.ds(row, tile_width), pl.ds(step * TILE, TILE))
                        d_stage = d_smem.at[stage, pl.ds(0, tile_width)]
                        plgpu.copy_gmem_to_smem(d_gmem.at[gradients], d_stage, full.at[stage])
                        plgpu.copy_gmem_to_smem(words_gmem.at[word_rows], words_smem.at[stage], full.at[stage])
                        scale_rows = (matrix_row, pl.ds(first, at_once))
                        plgpu.copy_gmem_to_smem(scales_gmem.at[scale_rows], scales_smem.at[stage], full.at[stage])

                for_width(tile, run)

            @pl.loop(jnp.maximum(num_items * steps - stages, 0), num_items * steps)
            def _drain(step):
                plgpu.barrier_wait(empty.at[lax.rem(step, jnp.int32(stages))])

    scratch: dict[str, Any] = {
        "d_smem": plgpu.SMEM((stages, largest, TILE), jnp.bfloat16, transforms=parts_of.GRADIENTS),
        "words_smem": plgpu.SMEM((stages, at_once * TILE_ROWS, ROW_WORDS), jnp.uint32, transforms=parts_of.WORDS),
        "scales_smem": plgpu.SMEM((stages, at_once, TILE_SCALES), jnp.uint32),
        "out_smem": plgpu.SMEM((warpgroups, PAIR, largest, TILE), jnp.bfloat16, transforms=parts_of.GRADIENTS),
        "full": plgpu.Barrier(num_barriers=stages, num_arrivals=3),
        "empty": plgpu.Barrier(num_barriers=stages, num_arrivals=warpgroups),
    }
    if parts.staging is not None:
        scratch["staging"] = plgpu.SMEM((warpgroups, *parts.staging), jnp.bfloat16, transforms=parts_of.GRADIENTS)
    kernel = plgpu.kernel(
        grouped_transposed_kernel,
        out_type=jax.ShapeDtypeStruct((num_rows, num_columns * TILE), jnp.bfloat16),
        grid=(grid,),
        grid_names=("block",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return kernel(
        d,
        words.reshape(num_experts * steps, num_columns * TILE_ROWS, ROW_WORDS),
        scales.reshape(num_experts * steps, num_columns, TILE_SCALES),
        grouping.tile_experts,
        grouping.tile_rows,
        grouping.tile_widths,
        grouping.num_tiles,
    )


def check(tiling: Tiling, *, num_columns: int) -> None:
    """Unsupported if the work cannot be cut so."""
    widths, warpgroups = tiling.widths, tiling.warpgroups
    if warpgroups not in _REGISTERS or widths[-1] > _MAX_WIDTH or any(width % 8 for width in widths):
        raise Unsupported(
            f"transposed product: widths {widths} with {warpgroups} warpgroups; the most are {_MAX_WIDTH} and 2"
        )
    if tiling.stages == 1:
        raise Unsupported("transposed product: a ring of 1 stage; a step is let go of while the next is multiplied")
    if tiling.k_tiles != 1 or num_columns < PAIR * warpgroups:
        raise Unsupported(
            f"transposed product: {num_columns} columns of tiles for {warpgroups} warpgroups, {tiling.k_tiles} tiles a "
            f"step; each warpgroup takes {PAIR}, one a step"
        )


def choose_tiling(num_pairs: int, weights: HopperExperts) -> Tiling:
    """The tiling of both transposed products, and of `grouped_matmul` beside them, for so many pairs."""
    widths = tiles.prefill(num_pairs / weights.num_experts).widths
    narrowest = min(weights.width, weights.expert_width) // TILE
    return Tiling(widths if widths[-1] <= _MAX_WIDTH else _WIDTHS, min(2, narrowest // PAIR))


def _stages_that_fit(tiling: Tiling) -> int:
    weights = tiling.warpgroups * PAIR * (TILE_WORDS + TILE_SCALES) * 4
    stage = tiling.widths[-1] * TILE * 2 + weights
    out = tiling.warpgroups * PAIR * tiling.widths[-1] * TILE * 2
    return min(_MAX_STAGES, (SHARED_BYTES - _RESERVED - out) // stage)
