"""Who reads which weights in the decode kernels, worked out inside them from the experts' ids.

The rows (assignments 32 or 2 of a token, by number t * A + a) of one expert are cut into passes of a fixed number of
columns. Expert and pass are a segment; a segment has one round per tile of 64 matrix rows; and the rounds of all
segments, in the experts' order, are dealt out to the blocks in contiguous runs. So every expert with rows is read
once per pass, one without is not read, and each block meets few experts.
"""

import dataclasses
from collections.abc import Sequence

from pallas_kernels.hopper import Value, address, load_word, load_word_if, shared_address
from pallas_kernels.hopper_words import (
    WARP,
    Word,
    ballot,
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
    word,
)

NOBODY = 0x7FFFFFFF
"""An id that is no expert's."""
_PASS_BIT = 16


@dataclasses.dataclass(frozen=True)
class Rows:
    """How many rows there are and how they are grouped; all static."""

    num_experts: int
    num_rows: int
    columns: int
    """Rows of one expert that a pass takes."""
    num_warps: int

    @property
    def padded_rows(self) -> int:
        """`num_rows` rounded up to whole warps."""
        return -(-self.num_rows // WARP) * WARP

    @property
    def padded_experts(self) -> int:
        """`num_experts` rounded up to whole warps."""
        return -(-self.num_experts // WARP) * WARP

    @property
    def max_segments(self) -> int:
        """The most segments there can be."""
        return min(self.num_rows, self.num_experts + self.num_rows // self.columns)

    @property
    def shared_words(self) -> int:
        """Words of shared memory for `Schedule`."""
        return self.padded_rows + self.padded_experts + self._segment_words + self.num_warps * self.columns

    @property
    def _segment_words(self) -> int:
        # Loads ahead of the last round look at entries beyond the last segment, and drop what they find.
        return -(-(self.max_segments + 2 * WARP) // WARP) * WARP


@dataclasses.dataclass(frozen=True)
class Segment:
    """One expert's pass over its rows: the same in all lanes of a warp."""

    expert: Word
    first: Word
    """Rank, among the expert's rows, of the pass's first."""


class Schedule:
    """The segments, in shared memory. Every thread of the block takes part in making it."""

    def __init__(self, rows: Rows, chosen: Sequence[Value], scratch: Value):
        """`chosen` refers to the experts' ids and, where the first expert here is not number 0, to its number."""
        ids, *first = map(address, chosen)
        self._rows = rows
        self._first = Word(load_word(first[0])) if first else None
        self._lane = thread() % WARP
        self._ids = Word(shared_address(scratch))
        self._counts = self._ids + 4 * rows.padded_rows
        self._segments = self._counts + 4 * rows.padded_experts
        self._columns = self._segments + 4 * rows._segment_words + warp() * (4 * rows.columns)
        make = self._from_one_warp if rows.num_rows <= WARP else self._from_counts
        self.num_segments: Word = make(ids)

    def segment(self, number: Word) -> Segment:
        """A segment of the list."""
        entry = load_shared(self._segments + number * 4)
        return Segment(entry & ((1 << _PASS_BIT) - 1), (entry >> _PASS_BIT) * self._rows.columns)

    def gather(self, segment: Segment) -> Word:
        """Note the rows of a segment, in order, for this warp's `row`; returns how many there are."""
        sync_warp()
        first = segment.first

        def note(chunk: Word, seen: Word) -> Word:
            row = chunk * WARP + self._lane
            mine = load_shared(self._ids + row * 4).equals(segment.expert)
            found = ballot(mine)
            place = seen + count_bits(found & lanes_before()) - first
            store_shared(self._columns + place * 4, row, only=mine & (place < self._rows.columns))
            return seen + count_bits(found)

        num_chunks = self._rows.padded_rows // WARP
        if num_chunks == 1:
            seen = note(word(0), word(0))
        else:

            def one_chunk(chunk: Word, carried: list[Value]) -> list[Value]:
                return [note(chunk, Word(carried[0])).value]

            seen = Word(repeat(word(0), word(num_chunks), 1, [word(0).value], one_chunk)[0])
        sync_warp()
        return (seen - first).at_most(self._rows.columns)

    def row(self, column: Word) -> Word:
        """The row in a column of the segment gathered last."""
        return load_shared(self._columns + column * 4)

    def _id(self, ids: Value, row: Word) -> Word:
        inside = row < self._rows.num_rows
        found = Word(load_word_if(inside.value, pointer(ids, row, 4)))
        if self._first is not None:
            found -= self._first
        known = inside & (found < self._rows.num_experts)
        return known.choose(found, NOBODY)

    def _from_one_warp(self, ids: Value) -> Word:
        """Every warp works out the same from ids in its registers, so that none waits for another."""
        expert = self._id(ids, self._lane)
        same = lanes_with_same(expert)
        leads = (expert < NOBODY) & (same & lanes_before()).equals(0)
        store_shared(self._ids + self._lane * 4, expert)
        if self._rows.num_rows <= self._rows.columns:  # then nobody needs a second pass
            leaders = ballot(leads)
            store_shared(self._segments + count_bits(leaders & lanes_before()) * 4, expert, only=leads)
            sync_warp()
            return count_bits(leaders)
        return self._list(expert, leads.choose(count_bits(same), 0), word(0))

    def _from_counts(self, ids: Value) -> Word:
        num_threads = self._rows.num_warps * WARP
        me = thread()
        for start in range(0, self._rows.padded_experts, num_threads):
            place = me + start
            store_shared(self._counts + place * 4, word(0), only=place < self._rows.padded_experts)
        sync_block()
        for start in range(0, self._rows.padded_rows, num_threads):
            place = me + start
            expert = self._id(ids, place)
            store_shared(self._ids + place * 4, expert, only=place < self._rows.padded_rows)
            count_up(self._counts + expert * 4, only=expert < self._rows.num_experts)
        sync_block()
        total = word(0)
        for start in range(0, self._rows.padded_experts, WARP):
            expert = self._lane + start
            total = self._list(expert, load_shared(self._counts + expert * 4), total)
        return total

    def _list(self, expert: Word, count: Word, before: Word) -> Word:
        """Write the segments of 32 experts, a lane each, behind `before` others; returns how many there are now."""
        columns = self._rows.columns
        passes = (count + (columns - 1)) // columns
        last = sum_up_to_lane(passes, self._lane) + before
        place = self._segments + (last - passes) * 4

        def write(number: Word, _: list[Value]) -> list[Value]:
            store_shared(place + number * 4, expert | (number << _PASS_BIT), only=number < passes)
            return []

        write(word(0), [])
        if self._rows.num_rows > columns:
            repeat(word(1), largest_of_lanes(passes), 1, [], write)
        sync_warp()
        return from_lane(last, WARP - 1)


def rounds_of_team(num_rounds: Word, team: Word, num_teams: int) -> tuple[Word, Word]:
    """The first round of a team of blocks, and the one behind its last."""
    return team * num_rounds // num_teams, (team + 1) * num_rounds // num_teams
