"""One kernel that groups the (token, expert) pairs by expert and copies each token to its pairs' rows.

Each block has a run of tokens. It counts all ids, those before its run apart: so it knows where every expert's group
starts and how much of it earlier blocks fill, without waiting for any of them. One of its warps gives its pairs their
rows, in order; then all copy the tokens, which were on their way since the start. Sums of integers: the same answer on
every run, `hopper_routing.group`'s.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Int

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.experts.hopper_layout import TILE
from pallas_kernels.experts.hopper_routing import Grouping, max_tiles, num_grouped_rows
from pallas_kernels.experts.hopper_schedule import NOBODY
from pallas_kernels.hopper import Value, address, assembly, i32, load_vector_if, load_word_if, shared_address
from pallas_kernels.hopper_card import NUM_MULTIPROCESSORS, SHARED_BYTES
from pallas_kernels.hopper_words import (
    WARP,
    Condition,
    Word,
    ballot,
    block,
    count_bits,
    count_up,
    from_lane,
    lanes_before,
    lanes_with_same,
    largest_of_lanes,
    load_shared,
    pointer,
    repeat,
    store_shared,
    sum_up_to_lane,
    sync_block,
    sync_warp,
    thread,
    warp,
    when,
    word,
)

_WARPGROUPS = 8
_THREADS = _WARPGROUPS * 4 * WARP
_VECTOR = 8
"""Columns of 16 bytes."""
_IDS_AT_ONCE = 8
_AHEAD = 2
"""Vectors that each thread has on their way while it writes one."""


def spread(
    x: BFloat16[Array, "T D"], expert_ids: Int[Array, "T A"], num_experts: int, widths: tuple[int, ...]
) -> tuple[BFloat16[Array, "rows D"], Grouping]:
    """See `hopper_routing.spread`; rows in no pair are left as they were.

    Raises Unsupported for widths of x that are no multiple of 64, and for more pairs than shared memory can note.
    """
    num_tokens, per_token = expert_ids.shape
    if x.shape[1] % TILE:
        raise Unsupported(f"grouping: tokens of width {x.shape[1]}, takes multiples of {TILE}")
    plan = _Plan(num_tokens, per_token, num_experts, x.shape[1] // _VECTOR, widths)
    if plan.shared_words * 4 > SHARED_BYTES:
        raise Unsupported(
            f"grouping: {num_tokens} tokens with {per_token} of {num_experts} experts each need "
            f"{plan.shared_words * 4} bytes of shared memory, there are {SHARED_BYTES}"
        )
    tiles = jax.ShapeDtypeStruct((max_tiles(expert_ids.size, num_experts, widths),), jnp.int32)
    outs = (
        jax.ShapeDtypeStruct((plan.num_rows, x.shape[1]), x.dtype),
        jax.ShapeDtypeStruct(expert_ids.shape, jnp.int32),
        tiles,
        tiles,
        tiles,
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )

    def experts_group(*refs) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def run(_, *refs: Value) -> None:
            *arrays, scratch = refs
            _Block(plan, [address(array) for array in arrays], Word(shared_address(scratch))).run()

        run(*refs)

    rows, *grouping = plgpu.kernel(
        experts_group,
        out_type=outs,
        grid=(plan.num_blocks,),
        grid_names=("block",),
        num_threads=_WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((plan.shared_words,), jnp.uint32)],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(x, expert_ids.astype(jnp.int32))
    return rows, Grouping(*grouping)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known when the kernel is compiled."""

    num_tokens: int
    per_token: int
    num_experts: int
    vectors: int
    """16-byte vectors of a token."""
    widths: tuple[int, ...]

    @property
    def num_pairs(self) -> int:
        return self.num_tokens * self.per_token

    @property
    def num_rows(self) -> int:
        return num_grouped_rows(self.num_pairs, self.num_experts, self.widths)

    @property
    def num_blocks(self) -> int:
        return min(NUM_MULTIPROCESSORS, self.num_tokens)

    @property
    def padded_experts(self) -> int:
        return -(-self.num_experts // WARP) * WARP

    @property
    def shared_words(self) -> int:
        """Three per expert and one per pair of a block's."""
        return 3 * self.padded_experts + -(-self.num_tokens // self.num_blocks) * self.per_token


@dataclasses.dataclass(frozen=True)
class _Group:
    """What a lane knows of its expert's group."""

    before: Word
    """Pairs in earlier blocks."""
    full: Word
    """Tiles of the largest width."""
    rest_index: Word
    """Which width holds the others."""
    has_rest: Condition
    length: Word
    """Rows."""


class _Block:
    """The kernel, for one thread."""

    def __init__(self, plan: _Plan, arrays: Sequence[Value], scratch: Word):
        self._plan = plan
        self._x, self._ids, self._rows, self._places, *self._tile_arrays, self._num_tiles = arrays
        self._before = scratch
        self._after = self._before + 4 * plan.padded_experts
        self._next = self._after + 4 * plan.padded_experts
        """The row of each expert's next pair."""
        self._own = self._next + 4 * plan.padded_experts
        """The experts, later the rows, of the block's pairs."""
        self._thread = thread()
        self._lane = self._thread % WARP
        self._first_token = block() * plan.num_tokens // plan.num_blocks
        self._end_token = (block() + 1) * plan.num_tokens // plan.num_blocks
        self._num_vectors = (self._end_token - self._first_token) * plan.vectors

    def run(self) -> None:
        loaded = [value for number in range(_AHEAD) for value in self._load(self._thread + number * _THREADS)]
        for start in range(0, 2 * self._plan.padded_experts, _THREADS):
            place = self._thread + start
            store_shared(self._before + place * 4, word(0), only=place < 2 * self._plan.padded_experts)
        sync_block()
        self._count()
        sync_block()
        when(warp().equals(0), self._place)
        when(warp().equals(1) & block().equals(0), self._list_tiles)
        sync_block()
        self._copy(loaded)

    def _count(self) -> None:
        plan = self._plan
        first = self._first_token * plan.per_token
        num_own = self._end_token * plan.per_token - first
        at_once = min(_IDS_AT_ONCE, -(-plan.num_pairs // _THREADS))

        def count(start: Word, _: list[Value]) -> list[Value]:
            pairs = [start + self._thread + number * _THREADS for number in range(at_once)]
            found = [Word(load_word_if((p < plan.num_pairs).value, pointer(self._ids, p, 4))) for p in pairs]
            for pair, expert in zip(pairs, found, strict=True):
                known = (pair < plan.num_pairs) & (expert < plan.num_experts)
                counts = (pair < first).choose(self._before, self._after)
                count_up(counts + expert * 4, only=known)
                own = pair - first  # of an earlier pair, this wraps around
                store_shared(self._own + own * 4, known.choose(expert, NOBODY), only=own < num_own)
            return []

        repeat(word(0), word(plan.num_pairs), at_once * _THREADS, [], count)

    def _group(self, expert: Word) -> _Group:
        widths = self._plan.widths
        before = load_shared(self._before + expert * 4)
        size = before + load_shared(self._after + expert * 4)
        full = size // widths[-1]
        rest = size - full * widths[-1]
        index, width = word(0), word(0)
        for place, (previous, wider) in enumerate(zip((0, *widths), widths, strict=False)):
            wants = rest >= previous + 1
            index, width = wants.choose(place, index), wants.choose(wider, width)
        return _Group(before, full, index, rest >= 1, full * widths[-1] + width)

    def _place(self) -> list[Value]:
        plan = self._plan
        row = word(0)
        for start in range(0, plan.padded_experts, WARP):
            expert = self._lane + start
            group = self._group(expert)
            end = sum_up_to_lane(group.length, self._lane) + row
            store_shared(self._next + expert * 4, end - group.length + group.before)
            row = from_lane(end, WARP - 1)
        sync_warp()
        num_own = (self._end_token - self._first_token) * plan.per_token
        first = self._first_token * plan.per_token

        def place_some(start: Word, _: list[Value]) -> list[Value]:
            pair = start + self._lane
            inside = pair < num_own
            own = self._own + inside.choose(pair, 0) * 4
            expert = inside.choose(load_shared(own), NOBODY)
            known = expert < NOBODY
            same = lanes_with_same(expert)
            earlier = count_bits(same & lanes_before())
            following = self._next + known.choose(expert, 0) * 4
            base = load_shared(following)
            row = known.choose(base + earlier, plan.num_rows)
            sync_warp()
            store_shared(following, base + count_bits(same), only=known & earlier.equals(0))
            store_shared(own, row, only=inside)
            _store_word(pointer(self._places, first + pair, 4), row, only=inside)
            sync_warp()
            return []

        repeat(word(0), num_own, WARP, [], place_some)
        return []

    def _list_tiles(self) -> list[Value]:
        plan = self._plan
        starts = range(0, plan.padded_experts, WARP)
        num_full = word(0)
        num_rests = [word(0) for _ in plan.widths]
        for start in starts:
            group = self._group(self._lane + start)
            num_full = num_full + from_lane(sum_up_to_lane(group.full, self._lane), WARP - 1)
            for index, lanes in enumerate(self._rests(group)):
                num_rests[index] = num_rests[index] + count_bits(lanes)

        next_rests = list(num_rests)
        end = num_full
        for index in reversed(range(len(plan.widths))):
            next_rests[index], end = end, end + num_rests[index]
        _store_word(self._num_tiles, end, only=self._lane.equals(0))

        row, first_full = word(0), word(0)
        for start in starts:
            expert = self._lane + start
            group = self._group(expert)
            row_end = sum_up_to_lane(group.length, self._lane) + row
            full_end = sum_up_to_lane(group.full, self._lane) + first_full
            self._list_group(expert, group, row=row_end - group.length, place=full_end - group.full)
            rest_row = row_end - group.length + group.full * plan.widths[-1]
            place = word(0)
            for index, lanes in enumerate(self._rests(group)):
                mine = next_rests[index] + count_bits(lanes & lanes_before())
                place = group.rest_index.equals(index).choose(mine, place)
                next_rests[index] = next_rests[index] + count_bits(lanes)
            self._list_tile(place, expert, rest_row, group.rest_index, only=group.has_rest)
            row, first_full = from_lane(row_end, WARP - 1), from_lane(full_end, WARP - 1)
        return []

    def _rests(self, group: _Group) -> list[Word]:
        """For each width, the lanes whose last tile has it."""
        return [ballot(group.has_rest & group.rest_index.equals(index)) for index in range(len(self._plan.widths))]

    def _list_group(self, expert: Word, group: _Group, *, row: Word, place: Word) -> None:
        largest = len(self._plan.widths) - 1

        def list_one(number: Word, _: list[Value]) -> list[Value]:
            first = row + number * self._plan.widths[-1]
            self._list_tile(place + number, expert, first, word(largest), only=number < group.full)
            return []

        repeat(word(0), largest_of_lanes(group.full), 1, [], list_one)

    def _list_tile(self, place: Word, expert: Word, row: Word, width: Word, *, only: Condition) -> None:
        for array, value in zip(self._tile_arrays, (expert, row, width), strict=True):
            _store_word(pointer(array, place, 4), value, only=only)

    def _load(self, vector: Word) -> list[Value]:
        place = self._first_token * self._plan.vectors + vector
        return load_vector_if((vector < self._num_vectors).value, pointer(self._x, place, 16))

    def _copy(self, loaded: Sequence[Value]) -> None:
        """Write the tokens, 16 bytes a thread at a time; the next are loaded meanwhile."""
        plan = self._plan

        def copy_some(start: Word, carried: list[Value]) -> list[Value]:
            vector = start + self._thread
            following = self._load(vector + _AHEAD * _THREADS)
            ordered = _to_mma_order(carried[:4], self._lane)
            inside = vector < self._num_vectors
            token, column = inside.choose(vector // plan.vectors, 0), vector % plan.vectors
            for number in range(plan.per_token):
                row = load_shared(self._own + (token * plan.per_token + number) * 4)
                target = pointer(self._rows, row * plan.vectors + column, 16)
                _store_vector(target, ordered, only=inside & (row < plan.num_rows))
            return [*carried[4:], *following]

        repeat(word(0), self._num_vectors, _THREADS, loaded, copy_some)


def _to_mma_order(words: Sequence[Value], lane: Word) -> list[Value]:
    """Transpose the 4 x 4 words, two columns each, of every four lanes: 32 columns in `hopper_layout`'s order."""
    found = [Word(value) for value in words]
    for distance in (1, 2):
        upper = (lane & distance).equals(distance)
        for low in (0, 1) if distance == 2 else (0, 2):
            high = low + distance
            received = _from_other(upper.choose(found[low], found[high]), distance)
            found[low], found[high] = upper.choose(received, found[low]), upper.choose(found[high], received)
    return [item.value for item in found]


def _from_other(value: Word, distance: int) -> Word:
    """What the lane whose number differs in the bits of `distance` holds."""
    code = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;"
    return Word(assembly([i32()], [value.value], code, "=r,r", effect=True)[0])


def _store_word(place: Value, value: Word, *, only: Condition) -> None:
    assembly([], [place, value.value, only.value], "@$2 st.global.u32 [$0], $1;", "l,r,b", effect=True)


def _store_vector(place: Value, values: Sequence[Value], *, only: Condition) -> None:
    code = "@$5 st.global.v4.u32 [$4], {$0,$1,$2,$3};"
    assembly([], [*values, place, only.value], code, "r,r,r,r,l,b", effect=True)
