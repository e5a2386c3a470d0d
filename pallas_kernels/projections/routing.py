"""Norm, router, choice of experts and softmax on Hopper GPUs, in one kernel.

A cluster of thread blocks serves up to eight tokens: its blocks share the experts, then hand their scores to the first
one, where a warp per token picks the best. Eight experts make a unit of `product`.
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
from pallas_kernels.projections.product import UNIT_ROWS, Tiles, multiply, total

GROUP_TOKENS = 8
MAX_CLUSTER = 8


def route(
    x: Float[Array, "T D"],
    norm_scale: Float[Array, " D"],
    router_weight: Float[Array, "E D"],
    router_bias: Float[Array, " E"],
    *,
    eps: float,
    experts_per_token: int,
    tiles: Tiles,
) -> tuple[Float[Array, "T D"], Int[Array, "T A"], Float[Array, "T A"]]:
    """See `pallas_kernels.projections.route`; arguments are checked by the caller."""
    num_tokens, width = x.shape
    num_experts = router_weight.shape[0]
    num_groups, num_members = -(-num_tokens // GROUP_TOKENS), num_experts // tiles.rows
    num_items, num_threads = GROUP_TOKENS * tiles.rows, 32 * tiles.warps
    group_tokens = min(GROUP_TOKENS, num_tokens)

    def run(ctx, *refs) -> tuple[()]:
        del ctx
        x, norm_scale, weight, bias, normed, expert_ids, routing = (code.address(ref) for ref in refs[:7])
        parts, squares, scale, scores = (code.shared_address(ref) for ref in refs[7:])
        me = Thread.current()
        block = code.block_index()
        group, member = arith.divui(block, code.constant(num_members)), arith.remui(block, code.constant(num_members))
        first_token = code.times(group, GROUP_TOKENS)
        first_expert = code.times(member, tiles.rows)
        lane_row = code.moved(weight, code.times(code.plus(first_expert, me.group), 2 * width))
        if num_members > 1:
            code.cluster_arrive()

        def keep(words: list[Value], row: Value, column_bytes: Value, offset: int) -> None:
            """Every block writes every `num_members`-th token's normed values."""
            token = code.plus(first_token, row)
            mine = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(row, code.constant(num_members)), member)
            mine = arith.andi(mine, code.less(row, group_tokens))
            with mgpu.utils.when(arith.andi(mine, code.less(token, num_tokens))):
                target = code.moved(code.moved(normed, code.times(token, 2 * width)), column_bytes)
                code.store_global_words(target, words, offset)

        biases = []
        num_turns = -(-num_items // num_threads)

        def stage() -> None:
            for turn in range(num_turns):
                index = code.plus(me.index, turn * num_threads)
                expert = code.plus(first_expert, arith.remui(index, code.constant(tiles.rows)))
                biases.append(code.load_global_bfloat16(code.moved(bias, code.times(expert, 2))))

        multiply(
            me,
            Activations(x, width, group_tokens, num_tokens, first_token),
            [(lane_row, 2 * width * UNIT_ROWS * unit) for unit in range(tiles.units)],
            tiles,
            parts,
            norm=Norm(norm_scale, eps, squares, scale),
            meanwhile=stage,
            keep=keep,
        )
        if num_members > 1:
            code.cluster_wait()
        for turn in range(num_turns):
            index = code.plus(me.index, turn * num_threads)
            token, row = arith.divui(index, code.constant(tiles.rows)), arith.remui(index, code.constant(tiles.rows))
            with mgpu.utils.when(code.less(index, group_tokens * tiles.rows)):
                product = total(parts, code.plus(code.times(token, tiles.padded_rows), row), tiles, group_tokens)
                score = arith.addf(product, biases[turn])
                place = code.plus(code.times(token, num_experts), code.plus(first_expert, row))
                target = code.plus(scores, code.times(place, 4))
                if num_members > 1:
                    code.store_first_block_float(target, score)
                else:
                    code.store_shared_float(target, score)
        if num_members > 1:
            code.cluster_arrive()
            code.cluster_wait()
        else:
            code.synchronize()
        is_first = arith.cmpi(arith.CmpIPredicate.eq, member, code.constant(0))
        for turn in range(-(-group_tokens // tiles.warps)):
            row = code.plus(me.warp, turn * tiles.warps)
            token = code.plus(first_token, row)
            exists = arith.andi(code.less(row, group_tokens), code.less(token, num_tokens))
            with mgpu.utils.when(arith.andi(is_first, exists)):
                own = code.plus(scores, code.times(code.plus(code.times(row, num_experts), me.lane), 4))
                expert, score = _best(me, own, num_experts, experts_per_token)
                share = _softmax(me, score, experts_per_token)
                with mgpu.utils.when(code.less(me.lane, experts_per_token)):
                    place = code.times(code.plus(code.times(token, experts_per_token), me.lane), 4)
                    code.store_global_word(code.moved(expert_ids, place), expert)
                    code.store_global_float(code.moved(routing, place), share)
        return ()

    def route_kernel(*refs) -> None:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs), return_type=())(run)(*refs)

    cluster: dict[str, Any] = {"cluster": (num_members,), "cluster_names": ("member",)} if num_members > 1 else {}
    return plgpu.kernel(
        route_kernel,
        out_type=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((num_tokens, experts_per_token), jnp.int32),
            jax.ShapeDtypeStruct((num_tokens, experts_per_token), jnp.float32),
        ],
        grid=(num_groups,),
        grid_names=("group",),
        **cluster,
        num_threads=tiles.warps // 4,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((tiles.part_floats(group_tokens),), jnp.float32),
            plgpu.SMEM((group_tokens, SQUARES), jnp.float32),
            plgpu.SMEM((width,), jnp.bfloat16),
            plgpu.SMEM((group_tokens * num_experts,), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x, norm_scale, router_weight, router_bias)


def _best(me: Thread, own: Value, num_experts: int, count: int) -> tuple[Value, Value]:
    """In lane i, the i-th best expert and its score; equal scores in the order of their experts.

    `own` is the address of the lane's first score; it has every 32nd from there. Scores are compared as integers of
    the same order, of which 0 stands for one already chosen.
    """
    keys = []
    for load in range(-(-num_experts // 32)):
        key = code.ordered(code.load_shared_float(own, 128 * load))
        if 32 * (load + 1) > num_experts:
            key = arith.select(code.less(me.lane, num_experts - 32 * load), key, code.constant(0))
        keys.append(key)
    expert, best_key = code.constant(0), code.constant(0)
    for place in range(count):
        top, first = keys[0], me.lane
        for load, key in enumerate(keys[1:], start=1):
            higher = code.less(top, key)
            top = arith.select(higher, key, top)
            first = arith.select(higher, code.plus(me.lane, 32 * load), first)
        top_of_all = code.warp_max(top)
        is_top = arith.cmpi(arith.CmpIPredicate.eq, top, top_of_all)
        chosen = code.warp_min(arith.select(is_top, first, code.constant(0x7FFFFFFF)))
        here = arith.cmpi(arith.CmpIPredicate.eq, me.lane, code.constant(place))
        expert, best_key = arith.select(here, chosen, expert), arith.select(here, top_of_all, best_key)
        for load, key in enumerate(keys):
            taken = arith.cmpi(arith.CmpIPredicate.eq, chosen, code.plus(me.lane, 32 * load))
            keys[load] = arith.select(taken, code.constant(0), key)
    return expert, code.unordered(best_key)


def _softmax(me: Thread, score: Value, count: int) -> Value:
    """Softmax over the first `count` lanes, of which lane 0 has the highest score."""
    shifted = arith.subf(score, code.from_lane(score, 0))
    power = arith.select(code.less(me.lane, count), code.exponential(shifted), code.number(0.0))
    return arith.divf(power, code.warp_sum(power))
