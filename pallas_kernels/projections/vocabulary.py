"""Final norm and unembedding on Hopper GPUs: a grid that stays, every warp streaming rows of the weight by itself.

A strip of sixteen rows is the A operand of `mma.m16n8k16`, straight from global memory with the columns of a tile
permuted as in `product`; tokens are the B operand, normed once per block and kept in shared memory. Warps share nothing
else, and each one's loads run on from strip to strip.
"""

import dataclasses

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir.dialects import arith
from jaxtyping import Array, Float

from pallas_kernels import hopper_thread as code
from pallas_kernels.hopper import mma
from pallas_kernels.hopper_thread import Thread, Value
from pallas_kernels.projections.norm import Activations, normalize_rows
from pallas_kernels.projections.product import TILE_BYTES, TILE_COLUMNS

STRIP_ROWS = 16


@dataclasses.dataclass(frozen=True)
class StreamTiles:
    """Blocks of the grid, warps of a block, and tiles in flight per warp."""

    blocks: int
    warps: int
    depth: int


def row_bytes(width: int) -> int:
    """Bytes between two tokens in shared memory: two neighbours' 64-byte reads then meet no bank twice."""
    return 2 * width + 64


def unembed(
    x: Float[Array, "T D"],
    norm_scale: Float[Array, " D"],
    weight: Float[Array, "V D"],
    *,
    eps: float,
    tiles: StreamTiles,
) -> Float[Array, "T V"]:
    """See `pallas_kernels.projections.unembed`; arguments are checked by the caller."""
    (num_tokens, width), num_rows = x.shape, weight.shape[0]
    num_strips, num_tiles = num_rows // STRIP_ROWS, width // TILE_COLUMNS
    num_warps, depth = tiles.blocks * tiles.warps, min(tiles.depth, num_tiles)
    half_strip = STRIP_ROWS // 2 * 2 * width

    def run(ctx, *refs) -> tuple[()]:
        del ctx
        x, norm_scale, weight, logits = (code.address(ref) for ref in refs[:4])
        rows = code.shared_address(refs[4])
        me = Thread.current()
        own_warp = code.plus(code.times(code.block_index(), tiles.warps), me.warp)
        lane_bytes = code.plus(code.times(me.group, 2 * width), code.times(me.member, 16))
        tokens = [
            code.plus(
                rows,
                code.plus(
                    code.times(code.smaller(code.plus(me.group, first), num_tokens - 1), row_bytes(width)),
                    code.times(me.member, 16),
                ),
            )
            for first in range(0, num_tokens, 8)
        ]

        def strip_of(turn: Value) -> Value:
            return code.plus(own_warp, code.times(turn, num_warps))

        def start_of(strip: Value) -> Value:
            """The address of this lane's first bytes of a strip; 64 bits, for the weight has more than 2**32."""
            wide = arith.extui(weight.type, strip)
            skipped = arith.muli(wide, mgpu.c(STRIP_ROWS * 2 * width, weight.type))
            return code.moved(arith.addi(weight, skipped), lane_bytes)

        def load(start: Value, tile: int, when: Value | None) -> list[Value]:
            return [
                word
                for offset in (0, 64, half_strip, half_strip + 64)
                for word in code.load_global_words(start, TILE_BYTES * tile + offset, when=when, how=code.STREAMED)
            ]

        has_strip = code.less(own_warp, num_strips)
        waiting = [load(start_of(own_warp), tile, has_strip) for tile in range(depth)]
        code.pin()
        normalize_rows(
            me, Activations(x, width, num_tokens, num_tokens), norm_scale, eps, rows, row_bytes(width), tiles.warps
        )
        left = arith.subi(code.constant(num_strips + num_warps - 1), own_warp)
        num_turns = arith.divui(left, code.constant(num_warps))

        @mgpu.utils.fori(num_turns, waiting)
        def _(turn: Value, waiting: list[list[Value]]) -> list[list[Value]]:
            strip, next_strip = strip_of(turn), strip_of(code.plus(turn, 1))
            start, next_start = start_of(strip), start_of(next_strip)
            has_next = code.less(next_strip, num_strips)
            waiting = list(waiting)
            results = [[code.number(0.0)] * 4 for _ in tokens]
            for tile in range(num_tiles):
                weights = waiting[tile % depth]
                for block, pointer in enumerate(tokens):
                    b = code.load_shared_words(pointer, TILE_BYTES * tile)
                    b += code.load_shared_words(pointer, TILE_BYTES * tile + 64)
                    for low in range(0, 8, 2):
                        a = [weights[low], weights[8 + low], weights[low + 1], weights[9 + low]]
                        results[block] = mma(results[block], a, b[low : low + 2])
                ahead = tile + depth
                waiting[tile % depth] = (
                    load(start, ahead, None) if ahead < num_tiles else load(next_start, ahead - num_tiles, has_next)
                )
            _store(me, logits, strip, results, num_tokens, num_rows)
            return [waiting[(num_tiles + tile) % depth] for tile in range(depth)]

        return ()

    def unembed_kernel(*refs) -> None:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs), return_type=())(run)(*refs)

    return plgpu.kernel(
        unembed_kernel,
        out_type=jax.ShapeDtypeStruct((num_tokens, num_rows), jnp.float32),
        grid=(tiles.blocks,),
        grid_names=("block",),
        num_threads=tiles.warps // 4,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((num_tokens * row_bytes(width) // 2,), jnp.bfloat16)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x, norm_scale, weight)


def _store(me: Thread, logits: Value, strip: Value, results: list[list[Value]], num_tokens: int, num_rows: int) -> None:
    row = code.plus(code.times(strip, STRIP_ROWS), me.group)
    for block, result in enumerate(results):
        for which in range(2):
            token = code.plus(code.times(me.member, 2), 8 * block + which)
            exists = code.less(token, num_tokens)
            pointer = code.moved(logits, code.times(code.plus(code.times(token, num_rows), row), 4))
            code.store_global_float(pointer, result[which], when=exists)
            code.store_global_float(pointer, result[2 + which], 4 * STRIP_ROWS // 2, when=exists)
