"""Bringing the softmaxes of the decode kernel's warps together, as inline PTX for `plgpu.inline_mgpu`.

Through shared memory within a block, and through that of the first block within a cluster. Sums are taken in the order
of the warps and blocks, whatever the order they arrive in.
"""

import functools
from collections.abc import Callable

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper
from pallas_kernels.attention.hopper_decode_registers import (
    GROUP,
    LANE_VALUES,
    LOWEST,
    PART_VALUES,
    SCALAR,
    WIDTH,
    array_of,
    lane_of_thread,
    moved,
    state_layouts,
    values_of,
)
from pallas_kernels.hopper_card import LOG2_E


def store(num_tokens: int) -> Callable[..., None]:
    layouts = state_layouts(num_tokens)

    @plgpu.inline_mgpu(arg_types=(*layouts, plgpu.RefType(), plgpu.RefType()))
    def store(_, largest, denominators, weighted, weighted_memory, sums_memory):
        largest, denominators, weighted = (values_of(array) for array in (largest, denominators, weighted))
        warp, g, t = lane_of_thread()
        head = moved(hopper.shared_address(weighted_memory), (warp, 4 * num_tokens * PART_VALUES), (t, 8 * WIDTH))
        runs = [_run(head, t, moved(hopper.constant(half), (g, 2))) for half in range(2)]
        sums = moved(hopper.shared_address(sums_memory), (warp, 8 * num_tokens * GROUP), (g, 4))
        is_first = arith.cmpi(arith.CmpIPredicate.eq, t, hopper.constant(0))
        for token in range(num_tokens):
            own = weighted[LANE_VALUES * token : LANE_VALUES * (token + 1)]
            for odd in range(2):
                row = own[odd::2]
                for half, run in enumerate(runs):
                    offset = 4 * (PART_VALUES * token + WIDTH * odd)
                    _store_shared(run, offset, row[4 * half : 4 * half + 4])
            total = denominators[token]
            for distance in (1, 2):
                total = arith.addf(total, hopper.shuffle_xor(total, distance))
            for offset, value in ((0, largest[token]), (4 * num_tokens * GROUP, total)):
                _store_shared(sums, offset + 4 * GROUP * token, [value], condition=is_first)

    return store


def _run(row: ir.Value, head_pair: ir.Value, run: ir.Value) -> ir.Value:
    """Where the dimensions 4 * run .. + 3 of a head lie in its row, turned so that no two lanes share a bank."""
    turn = arith.addi(
        arith.muli(arith.andi(head_pair, hopper.constant(1)), hopper.constant(4)),
        arith.shrui(head_pair, hopper.constant(1)),
    )
    return moved(row, (arith.andi(arith.addi(run, turn), hopper.constant(15)), 16))


def _merging_thread() -> tuple[ir.Value, ir.Value]:
    """The head and the run of four dimensions that a thread merges."""
    thread = arith.remui(mgpu.utils.thread_idx(), hopper.constant(128))
    return arith.shrui(thread, hopper.constant(4)), arith.andi(thread, hopper.constant(15))


def _merged(weighted_memory: ir.Value, sums_memory: ir.Value, count: int, num_tokens: int):
    """Of each token: four weighted values of a head, its largest score and its denominator, over all parts."""
    head, run = _merging_thread()
    row = moved(hopper.shared_address(weighted_memory), (head, 4 * WIDTH))
    place = _run(row, arith.shrui(head, hopper.constant(1)), run)
    sums = moved(hopper.shared_address(sums_memory), (head, 4))
    merged = []
    for token in range(num_tokens):
        offsets = [8 * num_tokens * GROUP * part + 4 * GROUP * token for part in range(count)]
        largest = [_load_shared(sums, offset, 1)[0] for offset in offsets]
        top = functools.reduce(arith.maximumf, largest)
        denominator, weighted = mgpu.c(0.0, hopper.f32()), [mgpu.c(0.0, hopper.f32())] * 4
        for part in range(count):
            shrink = hopper.exp2(arith.subf(largest[part], top))
            added = _load_shared(sums, offsets[part] + 4 * num_tokens * GROUP, 1)[0]
            denominator = hopper.multiply_add(added, shrink, denominator)
            values = _load_shared(place, 4 * PART_VALUES * (num_tokens * part + token), 4)
            weighted = [
                hopper.multiply_add(value, shrink, total) for value, total in zip(values, weighted, strict=True)
            ]
        merged.append((weighted, top, denominator))
    return merged


def send(num_tokens: int, count: int) -> Callable[..., None]:
    """Merge a block's parts and write them to the first block of the cluster; all of its blocks then have."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 4)
    def send(_, weighted_memory, sums_memory, target_weighted, target_sums):
        head, run = _merging_thread()
        row = moved(hopper.shared_address(target_weighted), (head, 4 * WIDTH))
        place = _of_first_block(_run(row, arith.shrui(head, hopper.constant(1)), run))
        sums = _of_first_block(moved(hopper.shared_address(target_sums), (head, 4)))
        writes_sums = arith.cmpi(arith.CmpIPredicate.eq, run, hopper.constant(0))
        merged = _merged(weighted_memory, sums_memory, count, num_tokens)
        for token, (weighted, top, denominator) in enumerate(merged):
            _store_shared(place, 4 * PART_VALUES * token, weighted, space="shared::cluster")
            for offset, value in ((0, top), (4 * num_tokens * GROUP, denominator)):
                offset += 4 * GROUP * token
                _store_shared(sums, offset, [value], condition=writes_sums, space="shared::cluster")
        hopper.assembly([], [], "barrier.cluster.arrive.release.aligned;", "", effect=True)
        hopper.assembly([], [], "barrier.cluster.wait.acquire.aligned;", "", effect=True)

    return send


_PER_THREAD = plgpu.Layout.WG_STRIDED((128,), 1)


@plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((128,), jnp.float32, layout=_PER_THREAD)
)
def load_sinks(_, sinks):
    """In base 2, the sink of the head that a thread will merge. Early: nobody has to wait for it then."""
    head, _ = _merging_thread()
    sink = arith.mulf(_load_float(sinks, head), mgpu.c(LOG2_E, hopper.f32()))
    return array_of([arith.maximumf(sink, mgpu.c(LOWEST, hopper.f32()))], _PER_THREAD, signed=None)


def finish(num_tokens: int, count: int) -> Callable[..., None]:
    """Merge parts, add the sink to the denominators, and write the tokens that exist."""

    targets_and_valid = (plgpu.RefType(),) * num_tokens, (SCALAR,) * num_tokens

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), _PER_THREAD, *targets_and_valid))
    def finish(_, weighted_memory, sums_memory, sinks, targets, valid):
        head, run = _merging_thread()
        sink = values_of(sinks)[0]
        merged = _merged(weighted_memory, sums_memory, count, num_tokens)
        for (weighted, largest, denominator), target, exists in zip(merged, targets, valid, strict=True):
            top = arith.maximumf(largest, sink)
            shrink = hopper.exp2(arith.subf(largest, top))
            total = hopper.multiply_add(denominator, shrink, hopper.exp2(arith.subf(sink, top)))
            factor = arith.divf(shrink, total)
            answers = [arith.mulf(value, factor) for value in weighted]
            words = [hopper.bfloat16_pair(*answers[:2]), hopper.bfloat16_pair(*answers[2:])]
            place = moved(hopper.address(target), (head, 2 * WIDTH), (run, 8))
            code = "@$3 st.global.v2.b32 [$0], {$1, $2};"
            hopper.assembly([], [place, *words, exists.registers.item()], code, "l,r,r,b", effect=True)

    return finish


def _load_float(ref: ir.Value, index: ir.Value) -> ir.Value:
    """One float32 or bfloat16 from global memory, as float32."""
    if ir.MemRefType(ref.type).element_type == hopper.f32():
        return arith.bitcast(hopper.f32(), hopper.load_word(moved(hopper.address(ref), (index, 4))))
    place = moved(hopper.address(ref), (index, 2))
    code = "{ .reg .b16 low, high; mov.b16 low, 0; ld.global.b16 high, [$1]; mov.b32 $0, {low, high}; }"
    return hopper.assembly([hopper.f32()], [place], code, "=f,l", effect=True)[0]


def _of_first_block(place: ir.Value) -> ir.Value:
    """The address in the first block of the cluster of what is here in this one."""
    return hopper.assembly([hopper.i32()], [place], "mapa.shared::cluster.u32 $0, $1, 0;", "=r,r", effect=False)[0]


def _store_shared(place, offset: int, values, *, condition=None, space: str = "shared") -> None:
    size = len(values)
    words = "{" + ", ".join(f"${i + 1}" for i in range(size)) + "}" if size > 1 else "$1"
    guard = "" if condition is None else f"@${size + 1} "
    code = f"{guard}st.{space}{f'.v{size}' if size > 1 else ''}.f32 [$0+{offset}], {words};"
    operands = [place, *values] + ([] if condition is None else [condition])
    constraints = ",".join(["r"] + ["f"] * size + ([] if condition is None else ["b"]))
    hopper.assembly([], operands, code, constraints, effect=True)


def _load_shared(place: ir.Value, offset: int, size: int) -> list[ir.Value]:
    words = "{" + ", ".join(f"${i}" for i in range(size)) + "}" if size > 1 else "$0"
    code = f"ld.shared{f'.v{size}' if size > 1 else ''}.f32 {words}, [${size}+{offset}];"
    constraints = ",".join(["=f"] * size + ["r"])
    return hopper.assembly([hopper.f32()] * size, [place], code, constraints, effect=True)
