"""The way into the cache for many tokens on Hopper GPUs: bias, rotation and rounding of a product, in one pass.

A thread takes four dims of a head, and the four that they are rotated against, for several heads of one token; threads
that follow each other take what lies behind it.
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir.dialects import arith
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper_thread as code
from pallas_kernels.hopper_thread import Thread, Value
from pallas_kernels.projections.places import HEAD_DIM, Places, rotated

_DIMS = 4
_QUADS = HEAD_DIM // 2 // _DIMS
"""Threads for a head."""
_MOST_HEADS = 5
"""Heads for a thread, whose loads are in flight together."""
_WARPGROUPS = 2


def append(
    product: Float[Array, "T out"],
    bias: Float[Array, "heads H"],
    rotation: tuple[Float[Array, "T half"], Float[Array, "T half"]],
    keys: Float[Array, "P K slots W"],
    values: Float[Array, "P K slots W"],
    pages: Int[Array, " T"],
    slots: Int[Array, " T"],
) -> tuple[Float[Array, "T N H"], Float[Array, "P K slots W"], Float[Array, "P K slots W"]]:
    """Finish what `project_to_cache` began: `product` holds queries, keys and values of each token, in float32.

    Arguments are checked by the caller.
    """
    num_tokens, all_heads = product.shape[0], bias.shape[0]
    num_pages, num_kv_heads, num_slots, _ = keys.shape
    num_heads = all_heads - 2 * num_kv_heads
    heads_per_thread = max(count for count in range(1, _MOST_HEADS + 1) if all_heads % count == 0)
    head_step = all_heads // heads_per_thread
    threads_per_token = head_step * _QUADS
    num_items, num_threads = num_tokens * threads_per_token, 128 * _WARPGROUPS

    def run(ctx, *refs) -> tuple[()]:
        del ctx
        product, bias, cos, sin, pages, slots, keys, values, queries = map(code.address, refs)
        places = Places(num_heads, num_kv_heads, num_pages, num_slots, queries, keys, values, pages, slots)
        item = code.plus(code.times(code.block_index(), num_threads), Thread.current().index)
        # The threads left over in the last block repeat the last item, bit for bit.
        item = code.smaller(item, num_items - 1)
        token = arith.divui(item, code.constant(threads_per_token))
        within = arith.remui(item, code.constant(threads_per_token))
        dim = code.times(arith.remui(within, code.constant(_QUADS)), _DIMS)
        first_head = arith.divui(within, code.constant(_QUADS))
        heads = [code.plus(first_head, head_step * turn) for turn in range(heads_per_thread)]

        token_product = code.element(product, token, 4 * all_heads * HEAD_DIM)
        loaded = []
        for head in heads:
            start = code.moved(token_product, code.times(code.plus(code.times(head, HEAD_DIM), dim), 4))
            loaded.append([_floats(start, offset) for offset in (0, 2 * HEAD_DIM)])
        angle = code.times(dim, 4)
        cosines, sines = (
            _rounded_pairs(_floats(code.moved(code.element(table, token, 2 * HEAD_DIM), angle))) for table in (cos, sin)
        )

        for head, halves in zip(heads, loaded, strict=True):
            place = places.locate(head)
            column = code.moved(bias, code.times(code.plus(code.times(head, HEAD_DIM), dim), 2))
            ones, twos = (
                _biased(floats, code.load_global_pair(code.moved(column, code.constant(offset))))
                for floats, offset in zip(halves, (0, HEAD_DIM), strict=True)
            )
            turned = [rotated(*values, place.rotates) for values in zip(ones, twos, cosines, sines, strict=True)]
            row = places.row(place, token)
            with mgpu.utils.when(places.keeps(row)):
                target = places.address(place, row, dim)
                for half, offset in enumerate((0, HEAD_DIM)):
                    values = [pair[half] for pair in turned]
                    words = [code.pair(values[first], values[first + 1]) for first in range(0, _DIMS, 2)]
                    code.store_global_pair(target, words, offset)
        return ()

    def append_kernel(*refs) -> None:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs), return_type=())(run)(*refs)

    key_pool, value_pool = jax.new_ref(keys), jax.new_ref(values)
    queries = plgpu.kernel(
        append_kernel,
        out_type=jax.ShapeDtypeStruct((num_tokens, num_heads, HEAD_DIM), jnp.bfloat16),
        grid=(-(-num_items // num_threads),),
        grid_names=("block",),
        num_threads=_WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(product, bias, *rotation, pages, slots, key_pool, value_pool)
    return queries, jax.freeze(key_pool), jax.freeze(value_pool)


def _floats(pointer: Value, offset: int = 0) -> list[Value]:
    """Four float32 values."""
    words = code.load_global_words(pointer, offset, how=code.STREAMED)
    return [arith.bitcast(code.f32(), word) for word in words]


def _rounded_pairs(values: list[Value]) -> list[Value]:
    """An even number of values, rounded to bfloat16."""
    pairs = (code.rounded(*values[first : first + 2]) for first in range(0, len(values), 2))
    return [value for pair in pairs for value in pair]


def _biased(values: list[Value], bias: list[Value]) -> list[Value]:
    """Bias in float32, then one rounding."""
    added = [value for word in bias for value in code.unpair(word)]
    return _rounded_pairs([arith.addf(one, two) for one, two in zip(values, added, strict=True)])
