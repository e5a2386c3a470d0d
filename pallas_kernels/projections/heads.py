"""Query, key and value projections on Hopper GPUs: norm, product, bias and rotation in one kernel.

A unit of `product` is eight rows of one head: rows 4q .. 4q + 3 and, H / 2 further on, the four that they are rotated
against.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir.dialects import arith
from jaxtyping import Array, Float

from pallas_kernels.projections import thread as code
from pallas_kernels.projections.norm import SQUARES, Activations, Norm
from pallas_kernels.projections.product import Tiles, multiply, total
from pallas_kernels.projections.thread import Thread, Value

HEAD_DIM = 64
UNITS_PER_HEAD = HEAD_DIM // 8


@dataclasses.dataclass(frozen=True)
class _Projection:
    """One of the three, in global memory."""

    num_heads: int
    weight: Value
    bias: Value
    out: Value


@dataclasses.dataclass(frozen=True)
class _Place:
    """The head of a unit: which projection's it is, by its number within that projection."""

    head: Value
    weight: Value
    bias: Value
    out: Value
    num_heads: Value
    rotates: Value


def _locate(projections: Sequence[_Projection], head: Value) -> _Place:
    """Where a head lies, heads counted through queries, keys and values."""
    query, key, value = projections
    is_query = code.less(head, query.num_heads)
    is_value = arith.cmpi(arith.CmpIPredicate.uge, head, code.constant(query.num_heads + key.num_heads))

    def pick(one: Value, two: Value, three: Value) -> Value:
        return arith.select(is_query, one, arith.select(is_value, three, two))

    skipped = pick(*(code.constant(count) for count in (0, query.num_heads, query.num_heads + key.num_heads)))
    return _Place(
        head=arith.subi(head, skipped),
        weight=pick(query.weight, key.weight, value.weight),
        bias=pick(query.bias, key.bias, value.bias),
        out=pick(query.out, key.out, value.out),
        num_heads=pick(*(code.constant(each.num_heads) for each in projections)),
        rotates=arith.xori(is_value, mgpu.c(1, is_value.type)),
    )


def query_key_value(
    x: Float[Array, "T D"],
    norm_scale: Float[Array, " D"],
    query_weight: Float[Array, "N H D"],
    query_bias: Float[Array, "N H"],
    key_weight: Float[Array, "K H D"],
    key_bias: Float[Array, "K H"],
    value_weight: Float[Array, "K H D"],
    value_bias: Float[Array, "K H"],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    *,
    eps: float,
    tiles: Tiles,
) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
    """See `pallas_kernels.projections.query_key_value`; arguments are checked by the caller."""
    num_tokens, width = x.shape
    num_heads, num_kv_heads = query_weight.shape[0], key_weight.shape[0]
    num_blocks = (num_heads + 2 * num_kv_heads) * UNITS_PER_HEAD // tiles.units
    num_pairs = tiles.rows // 2
    num_items, num_threads = num_tokens * num_pairs, 32 * tiles.warps

    def run(ctx, *refs) -> tuple[()]:
        del ctx
        pointers = [code.address(ref) for ref in refs[:13]]
        parts, squares, scale, extras = (code.shared_address(ref) for ref in refs[13:])
        x, norm_scale, query_weight, query_bias, key_weight, key_bias, value_weight, value_bias = pointers[:8]
        cos, sin, queries, keys, values = pointers[8:]
        me = Thread.current()
        projections = (
            _Projection(num_heads, query_weight, query_bias, queries),
            _Projection(num_kv_heads, key_weight, key_bias, keys),
            _Projection(num_kv_heads, value_weight, value_bias, values),
        )
        first_unit = code.times(code.block_index(), tiles.units)

        def unit_row(unit: int) -> tuple[Value, int]:
            index = code.plus(first_unit, unit)
            place = _locate(projections, arith.shrui(index, code.constant(3)))
            quad = code.times(arith.andi(index, code.constant(7)), 4)
            within = code.plus(
                arith.andi(me.group, code.constant(3)), code.times(code.shifted(me.group, 2), HEAD_DIM // 2)
            )
            row = code.plus(code.plus(code.times(place.head, HEAD_DIM), quad), within)
            return code.moved(place.weight, code.times(row, 2 * width)), 0

        def item(turn: Value) -> tuple[Value, Value, Value, Value, _Place, Value]:
            """Turn's item of this thread: which, its token, its pair in the block, whether it exists, head, dim."""
            index = code.plus(me.index, code.times(turn, num_threads))
            token, pair = arith.divui(index, code.constant(num_pairs)), arith.remui(index, code.constant(num_pairs))
            unit = code.plus(first_unit, code.shifted(pair, 2))
            place = _locate(projections, code.shifted(unit, 3))
            dim = code.plus(code.times(arith.andi(unit, code.constant(7)), 4), arith.andi(pair, code.constant(3)))
            return index, token, pair, code.less(index, num_items), place, dim

        num_turns = -(-num_items // num_threads)

        def stage(turn: Value) -> None:
            """Bias and rotation of one of this thread's items to shared memory: nobody waits for them at the end."""
            index, token, _, exists, place, dim = item(turn)
            with mgpu.utils.when(exists):
                bias = code.moved(place.bias, code.times(code.plus(code.times(place.head, HEAD_DIM), dim), 2))
                angle = code.times(code.plus(code.times(token, HEAD_DIM // 2), dim), 4)
                biases = code.load_global_bfloat16(bias), code.load_global_bfloat16(_later(bias, HEAD_DIM))
                angles = code.load_global_float(code.moved(cos, angle)), code.load_global_float(code.moved(sin, angle))
                words = [code.pair(*biases), code.pair(*angles)]
                code.store_shared_pair(code.plus(extras, code.times(index, 8)), words)

        multiply(
            me,
            Activations(x, width, num_tokens, num_tokens),
            [unit_row(unit) for unit in range(tiles.units)],
            tiles,
            parts,
            norm=Norm(norm_scale, eps, squares, scale),
            meanwhile=lambda: code.each_turn(num_turns, stage),
        )

        def finish(turn: Value) -> None:
            index, token, pair, exists, place, dim = item(turn)
            with mgpu.utils.when(exists):
                row = code.plus(code.times(code.shifted(pair, 2), 8), arith.andi(pair, code.constant(3)))
                spot = code.plus(code.times(token, tiles.padded_rows), row)
                one, two = (total(parts, spot, tiles, num_tokens, offset) for offset in (0, 4))
                biases, angles = code.load_shared_pair(code.plus(extras, code.times(index, 8)))
                one, two = _rotated(one, two, biases, angles, place.rotates)
                column = code.plus(code.times(code.plus(code.times(token, place.num_heads), place.head), HEAD_DIM), dim)
                target, word = code.moved(place.out, code.times(column, 2)), code.pair(one, two)
                code.store_global_bfloat16(target, word, 0)
                code.store_global_bfloat16(_later(target, HEAD_DIM), word, 1)

        code.each_turn(num_turns, finish)
        return ()

    def query_key_value_kernel(*refs) -> None:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs), return_type=())(run)(*refs)

    heads = [(num_tokens, count, HEAD_DIM) for count in (num_heads, num_kv_heads, num_kv_heads)]
    return plgpu.kernel(
        query_key_value_kernel,
        out_type=[jax.ShapeDtypeStruct(shape, x.dtype) for shape in heads],
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=tiles.warps // 4,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((tiles.part_floats(num_tokens),), jnp.float32),
            plgpu.SMEM((num_tokens, SQUARES), jnp.float32),
            plgpu.SMEM((width,), jnp.bfloat16),
            plgpu.SMEM((num_items, 2), jnp.uint32),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x, norm_scale, query_weight, query_bias, key_weight, key_bias, value_weight, value_bias, cos, sin)


def _later(pointer: Value, num_bytes: int) -> Value:
    return code.moved(pointer, code.constant(num_bytes))


def _rotated(one: Value, two: Value, biases: Value, angles: Value, rotates: Value) -> tuple[Value, Value]:
    """Bias in float32, one rounding to bfloat16, then the rotation with every operation rounded to bfloat16."""
    bias_one, bias_two = code.unpair(biases)
    one, two = code.rounded(arith.addf(one, bias_one), arith.addf(two, bias_two))
    cos, sin = code.unpair(angles)
    one_cos, two_sin = code.rounded(arith.mulf(one, cos), arith.mulf(two, sin))
    two_cos, one_sin = code.rounded(arith.mulf(two, cos), arith.mulf(one, sin))
    return (
        arith.select(rotates, arith.subf(one_cos, two_sin), one),
        arith.select(rotates, arith.addf(two_cos, one_sin), two),
    )
