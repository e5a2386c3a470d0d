"""The grouped product of the prefill: tiles of tokens times their expert's MXFP4 matrix, on Hopper's tensor cores.

A persistent grid. In each block one warpgroup copies (TMA, a ring of stages) and two or three multiply: the weights
are wgmma's A operand, 64 rows each, unpacked in registers; the tokens are its B operand. Unpacking one step overlaps
the product of the step before.
"""

import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, UInt32

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.experts import hopper_prefill_parts as parts_of
from pallas_kernels.experts.hopper_layout import TILE, TILE_SCALES, TILE_WORDS
from pallas_kernels.experts.hopper_prefill_parts import SwiGLU
from pallas_kernels.experts.hopper_routing import Grouping
from pallas_kernels.experts.tiles import Tiling
from pallas_kernels.hopper_card import NUM_MULTIPROCESSORS, SHARED_BYTES

_RESERVED = 4096
_REGISTERS = {1: (232, 40), 2: (232, 40), 3: (160, 24)}
"""Of a multiplying thread and of a copying one, by the number of multiplying warpgroups: 64 k registers in all."""
_MAX_WIDTH = {1: 256, 2: 256, 3: 192}
_MAX_STAGES = 8


def grouped_matmul(
    x: BFloat16[Array, "rows K"],
    words: UInt32[Array, "E n k 512"],
    scales: UInt32[Array, "E n k 32"],
    bias: Float[Array, "E N"],
    grouping: Grouping,
    *,
    tiling: Tiling,
    activation: SwiGLU | None,
    interpret: bool = False,
) -> BFloat16[Array, "rows out"]:
    """Multiply each tile's rows by its expert's matrix and add the bias; columns of x in mma order.

    Without an activation: 64 columns for each of the n tiles of rows. With one: 32, whose order is the mma order of
    the activations. Rows in no tile are left as they were: arbitrary. Accumulates in float32, rounds once.
    """
    num_rows = x.shape[0]
    num_experts, num_row_tiles, k_tiles, _ = words.shape
    steps = check(tiling, num_row_tiles=num_row_tiles, k_tiles=k_tiles)
    warpgroups, columns = tiling.warpgroups, parts_of.out_columns(activation)
    largest = tiling.widths[-1]
    stages = tiling.stages or _stages_that_fit(tiling, columns)
    blocks = -(-num_row_tiles // warpgroups)
    make_parts = parts_of.interpreted if interpret else parts_of.hardware
    parts = make_parts(tiling.k_tiles, activation)
    max_tiles = grouping.tile_experts.shape[0]
    grid = 2 if interpret else min(NUM_MULTIPROCESSORS, max_tiles * blocks)
    most, least = _REGISTERS[warpgroups]
    step_columns = TILE * tiling.k_tiles

    def grouped_matmul_kernel(
        x_gmem, words_gmem, scales_gmem, bias_gmem, experts_gmem, rows_gmem, widths_gmem, count_gmem, out_gmem,
        x_smem, words_smem, scales_smem, out_smem, full, empty, staging=None,
    ):  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")
        block = lax.axis_index("block")
        num_items = lax.div(count_gmem[0] * blocks - block + grid - 1, jnp.int32(grid))

        def item_of(turn):
            item = block + turn * grid
            tile, strip = lax.div(item, jnp.int32(blocks)), lax.rem(item, jnp.int32(blocks))
            first = jnp.minimum(strip * warpgroups, num_row_tiles - warpgroups)
            return tile, strip * warpgroups, first

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

            @pl.loop(0, num_items)
            def _one_item(turn):
                tile, wanted, first = item_of(turn)
                row_tile = first + warpgroup

                def one_step(accumulator, tile_width, step):
                    stage = stage_of(turn, step)
                    plgpu.barrier_wait(full.at[stage])
                    parts.multiply(
                        accumulator,
                        words_smem.at[stage, warpgroup],
                        scales_smem.at[stage, warpgroup],
                        x_smem.at[stage, pl.ds(0, tile_width)],
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

                    # By twos, so that a step's fragment is not in the registers that the step before still reads.
                    @pl.loop(0, (steps - 1) // 2)
                    def _two_steps(index):
                        overlapped(1 + 2 * index)
                        overlapped(2 + 2 * index)

                    if steps % 2 == 0:
                        overlapped(steps - 1)
                    plgpu.wgmma_wait(0)
                    release(steps - 1)
                    return accumulator[...]

                def run(tile_width) -> None:
                    bias = plgpu.load(
                        bias_gmem.at[experts_gmem[tile], pl.ds(row_tile * TILE, TILE)],
                        layout=plgpu.Layout.WGMMA.reduce(1),
                        optimized=False,
                    )
                    value = pl.run_scoped(
                        lambda accumulator: product(tile_width, accumulator),
                        plgpu.WGMMAAccumulatorRef((TILE, tile_width)),
                    )
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out = out_smem.at[warpgroup, pl.ds(0, tile_width)]
                    parts.finish(value, bias, out)
                    plgpu.commit_smem()
                    columns_here = pl.ds(row_tile * columns, columns)
                    plgpu.copy_smem_to_gmem(out, out_gmem.at[pl.ds(row_of(tile), tile_width), columns_here])

                @pl.when(row_tile >= wanted)
                def _run() -> None:
                    for_width(tile, run)

                @pl.when(row_tile < wanted)
                def _pass() -> None:
                    @pl.loop(0, steps)
                    def _one_step(step):
                        plgpu.barrier_wait(full.at[stage_of(turn, step)])
                        release(step)

            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == warpgroups)
        def _copy() -> None:
            plgpu.set_max_registers(least, action="decrease")

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

                        weight_tiles = (expert, pl.ds(first, warpgroups), pl.ds(step * tiling.k_tiles, tiling.k_tiles))
                        tokens = (pl.ds(row, tile_width), pl.ds(step * step_columns, step_columns))
                        x_stage = x_smem.at[stage, pl.ds(0, tile_width)]
                        plgpu.copy_gmem_to_smem(x_gmem.at[tokens], x_stage, full.at[stage])
                        plgpu.copy_gmem_to_smem(words_gmem.at[weight_tiles], words_smem.at[stage], full.at[stage])
                        plgpu.copy_gmem_to_smem(scales_gmem.at[weight_tiles], scales_smem.at[stage], full.at[stage])

                for_width(tile, run)

            @pl.loop(jnp.maximum(num_items * steps - stages, 0), num_items * steps)
            def _drain(step):
                plgpu.barrier_wait(empty.at[lax.rem(step, jnp.int32(stages))])

    # TMA copies boxes of at most 256 a side.
    halves = (2, TILE_WORDS // 2)
    scratch: dict[str, Any] = {
        "x_smem": plgpu.SMEM((stages, largest, step_columns), jnp.bfloat16, transforms=parts_of.transforms(TILE)),
        "words_smem": plgpu.SMEM((stages, warpgroups, tiling.k_tiles, *halves), jnp.uint32),
        "scales_smem": plgpu.SMEM((stages, warpgroups, tiling.k_tiles, TILE_SCALES), jnp.uint32),
        "out_smem": plgpu.SMEM((warpgroups, largest, columns), jnp.bfloat16, transforms=parts_of.transforms(columns)),
        "full": plgpu.Barrier(num_barriers=stages, num_arrivals=3),
        "empty": plgpu.Barrier(num_barriers=stages, num_arrivals=warpgroups),
    }
    if parts.staging is not None:
        scratch["staging"] = plgpu.SMEM(
            (warpgroups, *parts.staging), jnp.bfloat16, transforms=parts_of.transforms(TILE)
        )
    grouped_matmul_kernel.__name__ = "grouped_down" if activation is None else "grouped_gate_up"
    kernel = plgpu.kernel(
        grouped_matmul_kernel,
        out_type=jax.ShapeDtypeStruct((num_rows, num_row_tiles * columns), jnp.bfloat16),
        grid=(grid,),
        grid_names=("block",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return kernel(
        x,
        words.reshape(num_experts, num_row_tiles, k_tiles, *halves),
        scales,
        bias,
        grouping.tile_experts,
        grouping.tile_rows,
        grouping.tile_widths,
        grouping.num_tiles,
    )


def check(tiling: Tiling, *, num_row_tiles: int, k_tiles: int) -> int:
    """The number of steps along K, or Unsupported if the work cannot be cut so."""
    widths, warpgroups = tiling.widths, tiling.warpgroups
    if warpgroups not in _REGISTERS or widths[-1] > _MAX_WIDTH[warpgroups] or any(width % 8 for width in widths):
        raise Unsupported(f"grouped matmul: widths {widths} with {warpgroups} warpgroups; the most are {_MAX_WIDTH}")
    if num_row_tiles < warpgroups or k_tiles % tiling.k_tiles:
        raise Unsupported(
            f"grouped matmul: {num_row_tiles} x {k_tiles} tiles of weights, cut by {warpgroups} and {tiling.k_tiles}"
        )
    return k_tiles // tiling.k_tiles


def _stages_that_fit(tiling: Tiling, columns: int) -> int:
    weights = tiling.warpgroups * tiling.k_tiles * (TILE_WORDS + TILE_SCALES) * 4
    stage = tiling.widths[-1] * TILE * tiling.k_tiles * 2 + weights
    out = tiling.warpgroups * tiling.widths[-1] * columns * 2
    return min(_MAX_STAGES, (SHARED_BYTES - _RESERVED - out) // stage)
