"""Attention of a warpgroup over one page in registers, as inline PTX for `plgpu.inline_mgpu`.

On the hardware each warp has 16 keys of a page. Lane 4 * g + t loads what it needs of them as 16-byte runs, into
registers at once or by way of a place in shared memory that no other thread looks at. So nothing is exchanged: the
order of the head's dimensions within a product, and of the answer's columns, is free.

    scores      16 rows (8 query heads of one or two tokens) x 8 keys, key g: dimensions 8t .. 8t + 7 and 32 + 8t ..
    weighted    16 dimensions x 8 query heads, four times, so that the scores' registers are its right operand: rows g
                and g + 8 of product i are dimensions 8g + 2i and 8g + 2i + 1, so that a lane loads dimensions
                8g .. 8g + 7 of keys 2t, 2t + 1, 8 + 2t, 9 + 2t, and its answers are these of heads 2t and 2t + 1
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels import hopper
from pallas_kernels.hopper_card import LOG2_E

GROUP = 8
SLOTS = 64
WIDTH = 64
WARPS = 4
LANE_VALUES = 16
"""Values of the answer that a lane has of each token."""
PART_VALUES = 32 * LANE_VALUES
LOWEST = -1e30
"""The running maximum before the first key; finite, so that differences of two of them are."""
SCALE = WIDTH**-0.5 * LOG2_E

SCALAR = plgpu.Layout.WG_SPLAT(())
VECTOR = 4


def vectors(size: int):
    """So many words, 16 bytes at a time to each thread in turn."""
    return plgpu.Layout.WG_STRIDED((size,), VECTOR)


def state_layouts(num_tokens: int):
    """Of a state's largest scores, denominators and weighted values."""
    per_row = plgpu.Layout.WG_STRIDED((128 * num_tokens,), 1)
    return per_row, per_row, vectors(128 * LANE_VALUES * num_tokens)


def array_of(values, layout, *, signed):
    """What threads hold as an array whose order means nothing outside this module; values by register."""
    made = layout.to_mgpu()
    element = values[0].type
    size = made.vec_size
    packed = [
        vector.from_elements(ir.VectorType.get((size,), element), values[i : i + size])
        for i in range(0, len(values), size)
    ]
    registers = np.empty(len(packed), dtype=object)
    registers[:] = packed
    return mgpu.FragmentedArray(_registers=registers, _layout=made, _is_signed=signed)


def values_of(array) -> list[ir.Value]:
    size = array.layout.vec_size
    return [vector.extract(register, [], [i]) for register in array.registers.flat for i in range(size)]


def lane_of_thread() -> tuple[ir.Value, ir.Value, ir.Value]:
    """Warp of the warpgroup, and g and t of the lane."""
    thread = mgpu.utils.thread_idx()
    warp = arith.remui(arith.shrui(thread, hopper.constant(5)), hopper.constant(WARPS))
    g = arith.remui(arith.shrui(thread, hopper.constant(2)), hopper.constant(8))
    return warp, g, arith.remui(thread, hopper.constant(4))


def moved(base: ir.Value, *terms: tuple[ir.Value, int]) -> ir.Value:
    for value, factor in terms:
        moved = arith.muli(value, hopper.constant(factor))
        base = arith.addi(base, moved if base.type == moved.type else arith.extui(base.type, moved))
    return base


def load_queries(num_tokens: int) -> Callable[..., Any]:
    size = 128 * 8 * num_tokens

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),) * num_tokens,
        return_type=plgpu.ShapeDtypeStruct((size,), jnp.uint32, layout=vectors(size)),
    )
    def load_queries(_, *refs):
        _, g, t = lane_of_thread()
        words = []
        for ref in refs:
            pointer = moved(hopper.address(ref), (g, 2 * WIDTH), (t, 16))
            words += hopper.load_vector(pointer) + hopper.load_vector(pointer, 64)
        return array_of(words, vectors(size), signed=False)

    return load_queries


_PAGE_WORDS = SLOTS * WIDTH // 2


def _page_runs(keys: ir.Value, values: ir.Value) -> list[tuple[ir.Value, int]]:
    """Where a lane's eight 16-byte runs of a page lie: address and offset.

    Of a warp's 16 keys: for the scores keys g and 8 + g, for the values keys 2t, 2t + 1, 8 + 2t and 9 + 2t.
    """
    warp, g, t = lane_of_thread()
    row = 2 * WIDTH
    key_pointer = moved(hopper.address(keys), (warp, 16 * row), (g, row), (t, 16))
    value_pointer = moved(hopper.address(values), (warp, 16 * row), (t, 2 * row), (g, 16))
    key_runs = [(key_pointer, offset) for offset in (0, 64, 8 * row, 8 * row + 64)]
    return key_runs + [(value_pointer, offset) for offset in (0, row, 8 * row, 9 * row)]


def load_page() -> Callable[..., Any]:
    """A page on its way to registers."""

    @plgpu.inline_mgpu(
        arg_types=(SCALAR, plgpu.RefType(), plgpu.RefType()),
        return_type=(plgpu.ShapeDtypeStruct((_PAGE_WORDS,), jnp.uint32, layout=vectors(_PAGE_WORDS)),) * 2,
    )
    def load_page(_, present, keys, values):
        present = present.registers.item()
        return _page(
            [
                hopper.load_vector_if(present, pointer, offset, hint=hopper.STREAMED)
                for pointer, offset in _page_runs(keys, values)
            ]
        )

    return load_page


def _page(runs: list[list[ir.Value]]):
    halves = ([word for run in half for word in run] for half in (runs[:4], runs[4:]))
    return tuple(array_of(words, vectors(_PAGE_WORDS), signed=False) for words in halves)


RUN_BYTES = 16
PAGE_BYTES = 128 * 8 * RUN_BYTES


def _own_run(place: ir.Value) -> ir.Value:
    """The address of a thread's first run in a page's place in shared memory; the others are 128 runs apart."""
    thread = arith.remui(mgpu.utils.thread_idx(), hopper.constant(128))
    return moved(hopper.shared_address(place), (thread, RUN_BYTES))


def fetch_page() -> Callable[..., None]:
    """A page on its way to shared memory, every run to where only the thread that asked for it looks."""

    @plgpu.inline_mgpu(arg_types=(SCALAR, plgpu.RefType(), plgpu.RefType(), plgpu.RefType()))
    def fetch_page(_, present, keys, values, place):
        present, target = present.registers.item(), _own_run(place)
        for index, (pointer, offset) in enumerate(_page_runs(keys, values)):
            to = 128 * RUN_BYTES * index
            code = f"@$2 cp.async.cg.shared.global.L2::256B [$0+{to}], [$1+{offset}], {RUN_BYTES};"
            hopper.assembly([], [target, pointer, present], code, "r,l,b", effect=True)
        hopper.assembly([], [], "cp.async.commit_group;", "", effect=True)

    return fetch_page


def take_page(pending: int) -> Callable[..., Any]:
    """The page that `fetch_page` has brought, when so many later ones may still be on their way."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=(plgpu.ShapeDtypeStruct((_PAGE_WORDS,), jnp.uint32, layout=vectors(_PAGE_WORDS)),) * 2,
    )
    def take_page(_, place):
        hopper.assembly([], [], f"cp.async.wait_group {pending};", "", effect=True)
        source = _own_run(place)
        runs = []
        for index in range(8):
            code = f"ld.shared.v4.u32 {{$0,$1,$2,$3}}, [$4+{128 * RUN_BYTES * index}];"
            runs.append(hopper.assembly([hopper.i32()] * 4, [source], code, "=r,=r,=r,=r,r", effect=True))
        return _page(runs)

    return take_page


ENTRIES = 32
"""Of a page table that a warp can hold, one a lane."""
_PER_THREAD = plgpu.Layout.WG_STRIDED((128,), 1)


def load_entries(count: int) -> Callable[..., Any]:
    """The entries of a table of so many, at most `ENTRIES`."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((128,), jnp.int32, layout=_PER_THREAD)
    )
    def load_entries(_, table):
        lane = arith.remui(mgpu.utils.thread_idx(), hopper.constant(32))
        index = arith.minui(lane, hopper.constant(count - 1))
        return array_of([hopper.load_word(moved(hopper.address(table), (index, 4)))], _PER_THREAD, signed=True)

    return load_entries


@plgpu.inline_mgpu(arg_types=(_PER_THREAD, SCALAR), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR))
def entry(_, entries, index):
    """One of the entries, the same for all threads."""
    word = values_of(entries)[0]
    code = "shfl.sync.idx.b32 $0, $1, $2, 31, -1;"
    found = hopper.assembly([hopper.i32()], [word, index.registers.item()], code, "=r,r,r", effect=True)[0]
    return mgpu.FragmentedArray.splat(found, (), is_signed=True)


def attend(num_tokens: int) -> Callable[..., Any]:
    layouts = state_layouts(num_tokens)
    pages = (vectors(_PAGE_WORDS),) * 2

    @plgpu.inline_mgpu(
        arg_types=(vectors(128 * 8 * num_tokens), *pages, *((SCALAR,) * (2 * num_tokens)), *layouts),
        return_type=tuple(plgpu.ShapeDtypeStruct(layout.args[0], jnp.float32, layout=layout) for layout in layouts),
    )
    def attend(_, queries, keys, values, *rest):
        bounds = [scalar.registers.item() for scalar in rest[: 2 * num_tokens]]
        largest, denominators, weighted = (values_of(array) for array in rest[2 * num_tokens :])
        warp, _, t = lane_of_thread()
        first_key = moved(arith.muli(warp, hopper.constant(16)), (t, 2))
        key_of = [arith.addi(first_key, hopper.constant(offset)) for offset in (0, 1, 8, 9)]
        seen = [[_both(key, bounds[2 * token], bounds[2 * token + 1]) for key in key_of] for token in range(num_tokens)]
        scores = _scores(values_of(queries), values_of(keys), num_tokens)
        right, shrinks = [], []
        for token in range(num_tokens):
            weights, shrink, largest[token], denominators[token] = _softmax_step(
                scores[token], seen[token], largest[token], denominators[token]
            )
            shrinks.append([hopper.shuffle_from(shrink, moved(hopper.constant(4 * i), (t, 8))) for i in range(2)])
            right.append([hopper.bfloat16_pair(*weights[:2]), hopper.bfloat16_pair(*weights[2:])])
        shown = _clear_unseen(values_of(values), seen)
        _add_weighted(right, shrinks, shown, weighted)
        results = (largest, denominators, weighted)
        return tuple(array_of(result, layout, signed=None) for result, layout in zip(results, layouts, strict=True))

    return attend


def _scores(queries, keys, num_tokens: int) -> list[list[ir.Value]]:
    """Of each token, the lane's four scores in base 2: of keys 2t, 2t + 1, 8 + 2t, 9 + 2t of the warp."""
    nothing, zero = hopper.constant(0), mgpu.c(0.0, hopper.f32())
    scores = [[] for _ in range(num_tokens)]
    for block in range(2):
        halves = []
        for half in range(2):
            total = [zero] * 4
            for step in (4 * half, 4 * half + 2):
                left = [nothing] * 4
                for token in range(num_tokens):
                    left[token], left[2 + token] = queries[8 * token + step : 8 * token + step + 2]
                total = hopper.mma(total, left, keys[8 * block + step : 8 * block + step + 2])
            halves.append(total)
        for token in range(num_tokens):
            for i in (2 * token, 2 * token + 1):
                scores[token].append(arith.mulf(arith.addf(halves[0][i], halves[1][i]), mgpu.c(SCALE, hopper.f32())))
    return scores


def _softmax_step(scores, seen, largest, denominator):
    """Weights, the factor for what came before, the new largest score, and the lane's share of the denominator."""
    hidden = mgpu.c(-math.inf, hopper.f32())
    scores = [arith.select(visible, score, hidden) for score, visible in zip(scores, seen, strict=True)]
    new_largest = functools.reduce(arith.maximumf, scores)
    for distance in (1, 2):
        new_largest = arith.maximumf(new_largest, hopper.shuffle_xor(new_largest, distance))
    new_largest = arith.maximumf(new_largest, largest)
    weights = [hopper.exp2(arith.subf(score, new_largest)) for score in scores]
    shrink = hopper.exp2(arith.subf(largest, new_largest))
    added = arith.addf(arith.addf(weights[0], weights[1]), arith.addf(weights[2], weights[3]))
    return weights, shrink, new_largest, hopper.multiply_add(denominator, shrink, added)


def _clear_unseen(values, seen) -> list[ir.Value]:
    """Zeros for keys that no token sees: they may hold NaN, and 0 * NaN is NaN."""
    shown = []
    for key in range(4):
        visible = functools.reduce(arith.ori, [token[key] for token in seen])
        shown += [arith.select(visible, word, hopper.constant(0)) for word in values[4 * key : 4 * key + 4]]
    return shown


def _add_weighted(right, shrinks, values, weighted) -> None:
    """weighted = weighted * shrinks + values @ right; see the module's docstring for what is where."""
    for product in range(4):
        left = [
            hopper.halves(values[8 * pair + product], values[8 * pair + 4 + product], half)
            for pair in range(2)
            for half in range(2)
        ]
        for token, (weights, (even, odd)) in enumerate(zip(right, shrinks, strict=True)):
            own = slice(LANE_VALUES * token + 4 * product, LANE_VALUES * token + 4 * product + 4)
            total = [arith.mulf(value, shrink) for value, shrink in zip(weighted[own], (even, odd) * 2, strict=True)]
            weighted[own] = hopper.mma(total, left, weights)


def _both(key: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    above = arith.cmpi(arith.CmpIPredicate.sge, key, low)
    return arith.andi(above, arith.cmpi(arith.CmpIPredicate.sle, key, high))
