"""Query, key and value projections of a few tokens on Hopper GPUs: from the norm to the cache in one kernel.

A unit of `product` is eight rows of one head: rows 4q .. 4q + 3 and, H / 2 further on, the four that they are rotated
against.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir.dialects import arith
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper_thread as code
from pallas_kernels.hopper_thread import Thread, Value
from pallas_kernels.projections.norm import SQUARES, Activations, Norm
from pallas_kernels.projections.places import HEAD_DIM, Places, rotated
from pallas_kernels.projections.product import Tiles, multiply, total
from pallas_kernels.projections.weights import HeadWeights

UNITS_PER_HEAD = HEAD_DIM // 8


def project_to_cache(
    x: Float[Array, "T D"],
    norm_scale: Float[Array, " D"],
    heads: HeadWeights,
    rotation: tuple[Float[Array, "T half"], Float[Array, "T half"]],
    keys: Float[Array, "P K slots W"],
    values: Float[Array, "P K slots W"],
    pages: Int[Array, " T"],
    slots: Int[Array, " T"],
    *,
    eps: float,
    tiles: Tiles,
) -> tuple[Float[Array, "T N H"], Float[Array, "P K slots W"], Float[Array, "P K slots W"]]:
    """See `pallas_kernels.projections.project_to_cache`; arguments are checked by the caller."""
    num_tokens, width = x.shape
    num_pages, num_kv_heads, num_slots, _ = keys.shape
    all_heads = heads.weight.shape[0]
    num_heads = all_heads - 2 * num_kv_heads
    num_blocks = all_heads * UNITS_PER_HEAD // tiles.units
    num_pairs = tiles.rows // 2
    num_items, num_threads = num_tokens * num_pairs, 32 * tiles.warps

    def run(ctx, *refs) -> tuple[()]:
        del ctx
        pointers = [code.address(ref) for ref in refs[:11]]
        parts, squares, scale, extras, rows = (code.shared_address(ref) for ref in refs[11:])
        x, norm_scale, weight, bias, cos, sin, pages, slots, keys, values, queries = pointers
        me = Thread.current()
        places = Places(num_heads, num_kv_heads, num_pages, num_slots, queries, keys, values, pages, slots)
        first_unit = code.times(code.block_index(), tiles.units)

        def unit_row(unit: int) -> tuple[Value, int]:
            index = code.plus(first_unit, unit)
            head, quad = code.shifted(index, 3), code.times(arith.andi(index, code.constant(7)), 4)
            within = code.plus(
                arith.andi(me.group, code.constant(3)), code.times(code.shifted(me.group, 2), HEAD_DIM // 2)
            )
            row = code.plus(code.plus(code.times(head, HEAD_DIM), quad), within)
            return code.moved(weight, code.times(row, 2 * width)), 0

        def item(turn: Value) -> tuple[Value, Value, Value, Value, Value, Value]:
            """Turn's item of this thread: which, its token, its pair in the block, whether it exists, head, dim."""
            index = code.plus(me.index, code.times(turn, num_threads))
            token, pair = arith.divui(index, code.constant(num_pairs)), arith.remui(index, code.constant(num_pairs))
            unit = code.plus(first_unit, code.shifted(pair, 2))
            dim = code.plus(code.times(arith.andi(unit, code.constant(7)), 4), arith.andi(pair, code.constant(3)))
            return index, token, pair, code.less(index, num_items), code.shifted(unit, 3), dim

        num_turns = -(-num_items // num_threads)

        def stage(turn: Value) -> None:
            """What one of this thread's items needs beside its product, to shared memory: nobody waits for it later."""
            index, token, _, exists, head, dim = item(turn)
            with mgpu.utils.when(exists):
                column = code.moved(bias, code.times(code.plus(code.times(head, HEAD_DIM), dim), 2))
                angle = code.times(code.plus(code.times(token, HEAD_DIM // 2), dim), 4)
                biases = code.load_global_bfloat16(column), code.load_global_bfloat16(_later(column, HEAD_DIM))
                angles = code.load_global_float(code.moved(cos, angle)), code.load_global_float(code.moved(sin, angle))
                words = [code.pair(*biases), code.pair(*angles)]
                code.store_shared_pair(code.plus(extras, code.times(index, 8)), words)
                code.store_shared_word(code.plus(rows, code.times(index, 4)), places.row(places.locate(head), token))

        multiply(
            me,
            Activations(x, width, num_tokens, num_tokens),
            [unit_row(unit) for unit in range(tiles.units)],
            tiles,
            parts,
            norm=Norm(norm_scale, eps, squares, scale, tiles.sharers),
            meanwhile=lambda: code.each_turn(num_turns, stage),
        )

        def finish(turn: Value) -> None:
            index, token, pair, exists, head, dim = item(turn)
            place = places.locate(head)
            with mgpu.utils.when(exists):
                row = code.plus(code.times(code.shifted(pair, 2), 8), arith.andi(pair, code.constant(3)))
                spot = code.plus(code.times(token, tiles.padded_rows), row)
                one, two = (total(parts, spot, tiles, num_tokens, offset) for offset in (0, 4))
                biases, angles = code.load_shared_pair(code.plus(extras, code.times(index, 8)))
                bias_one, bias_two = code.unpair(biases)
                one, two = code.rounded(arith.addf(one, bias_one), arith.addf(two, bias_two))
                word = code.pair(*rotated(one, two, *code.unpair(angles), place.rotates))
                target_row = code.load_shared_word(code.plus(rows, code.times(index, 4)))
                with mgpu.utils.when(places.keeps(target_row)):
                    target = places.address(place, target_row, dim)
                    code.store_global_bfloat16(target, word, 0)
                    code.store_global_bfloat16(_later(target, HEAD_DIM), word, 1)

        code.each_turn(num_turns, finish)
        return ()

    def project_to_cache_kernel(*refs) -> None:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs), return_type=())(run)(*refs)

    cluster: dict[str, Any] = {"cluster": (tiles.sharers,), "cluster_names": ("block",)} if tiles.sharers > 1 else {}
    key_pool, value_pool = jax.new_ref(keys), jax.new_ref(values)
    queries = plgpu.kernel(
        project_to_cache_kernel,
        out_type=jax.ShapeDtypeStruct((num_tokens, num_heads, HEAD_DIM), x.dtype),
        grid=(num_blocks // tiles.sharers,),
        grid_names=("group",),
        num_threads=tiles.warps // 4,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((tiles.part_floats(num_tokens),), jnp.float32),
            plgpu.SMEM((num_tokens, SQUARES), jnp.float32),
            plgpu.SMEM((width,), jnp.bfloat16),
            plgpu.SMEM((num_items, 2), jnp.uint32),
            plgpu.SMEM((num_items,), jnp.uint32),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **cluster,
    )(x, norm_scale, *heads, *rotation, pages, slots, key_pool, value_pool)
    return queries, jax.freeze(key_pool), jax.freeze(value_pool)


def _later(pointer: Value, num_bytes: int) -> Value:
    return code.moved(pointer, code.constant(num_bytes))
