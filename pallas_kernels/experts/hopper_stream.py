"""The decode kernels' product: packed expert matrices times few rows each, streamed through registers.

One block per multiprocessor. Its warps share the columns (K) of a strip of matrix rows: each holds its part of the
gathered input rows in registers, for as long as the expert is the same, and streams its part of the strip from global
memory straight into the registers from which mma.m16n8k16 takes its A operand, several tiles ahead. The partial sums
go to shared memory, where the block's last warp adds them up in the warps' order and finishes the strip, while the
others are at the next one. Rounds (`hopper_schedule`) follow each other without the loads ever draining.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper
from pallas_kernels.experts.hopper_operands import (
    COLUMN_BLOCK,
    INPUT_EXPONENT,
    NUM_BUFFERS,
    Inputs,
    Product,
    Weights,
)
from pallas_kernels.experts.hopper_schedule import Schedule, Segment, rounds_of_team
from pallas_kernels.hopper import Value, f32
from pallas_kernels.hopper_words import (
    WARP,
    Condition,
    Word,
    arrive,
    block,
    load_shared_vector,
    repeat,
    store_shared_vector,
    thread,
    wait,
    warp,
    when,
    word,
)

STRIP_ROWS = 16
_FULL = 8
_EMPTY = _FULL + NUM_BUFFERS
"""Named barriers, above those that Mosaic uses."""
_NO_SEGMENT = 0xFFFFFFFF
_FRAGMENT_BYTES = 16 * WARP


@dataclasses.dataclass(frozen=True)
class Strip:
    """16 rows of one expert's matrix, the same in all lanes."""

    expert: Word
    tile: Word
    part: Word
    """Which of the tile's four strips."""


@runtime_checkable
class Finish(Protocol):
    """What becomes of the sums: the part of a kernel behind its product."""

    floats_per_row: int

    def per_row(self, row: Word) -> list[Value]:
        """What to load once for a row of the segment."""
        ...

    def per_strip(self, strip: Strip) -> list[Value]:
        """What to load once for a strip, before its sums are there."""
        ...

    def write(
        self,
        strip: Strip,
        loaded: Sequence[Value],
        row: Word,
        per_row: Sequence[Value],
        sums: tuple[Value, Value],
        *,
        only: Condition,
    ) -> None:
        """Finish the sums of the strip's rows g and g + 8 for one row of the input."""
        ...


class Stream:
    """One product, as it is written into a kernel."""

    def __init__(self, product: Product, finish: Finish, schedule: Schedule, partials: Value):
        self._product = product
        self._finish = finish
        self._schedule = schedule
        self._partials = Word(hopper.shared_address(partials)) + thread() % WARP * 16
        per_team = product.blocks_per_team
        self._part = block() % per_team * product.strips
        self._start, self._stop = rounds_of_team(
            schedule.num_segments * product.row_tiles, block() // per_team, product.num_blocks // per_team
        )

    def run(self, inputs: Value, words: Value, scales: Value) -> None:
        """Let every warp of the block do its part."""
        when(warp() < self._product.streaming_warps, lambda: self._multiply(inputs, words, scales))
        when(warp().equals(self._product.rows.num_warps - 1), self._add_up)

    def _locate(self, round_number: Word) -> tuple[Word, Word]:
        """A round's segment number and tile."""
        segment = round_number // self._product.row_tiles
        return segment, round_number - segment * self._product.row_tiles

    # The warps that share K.

    def _multiply(self, inputs: Value, words: Value, scales: Value) -> list[Value]:
        product = self._product
        weights = Weights(product, self._part, words, scales)
        operand = Inputs(product, self._schedule, inputs)
        per_round = 5 * product.tiles_per_warp * product.strips

        def ask(round_number: Word) -> list[Value]:
            number, tile = self._locate(round_number)
            weights.move_to(self._schedule.segment(number).expert, tile, round_number < self._stop)
            return [value for index in range(product.tiles_per_warp) for value in weights.ask(index)]

        def one_round(round_number: Word, state: list[Value]) -> list[Value]:
            ring, held = state[:per_round], state[per_round:]
            ahead = round_number + product.rounds_ahead
            next_number, next_tile = self._locate(ahead)
            weights.move_to(self._schedule.segment(next_number).expert, next_tile, ahead < self._stop)
            zero = mgpu.c(0.0, f32())
            sums = [[zero] * 4 for _ in range(product.strips * product.column_blocks)]
            asked = []
            for index in range(product.tiles_per_warp):
                size = 5 * product.strips
                loaded = ring[index * size : (index + 1) * size]
                sums = weights.multiply(index, loaded, functools.partial(operand.block, held, index), sums)
                asked += weights.ask(index)
            following = round_number + 1
            number, tile = self._locate(following)
            moves = tile.equals(0) & (following < self._stop)
            # Here, since the loads' latency is hidden behind what is left of the round.
            held = when(moves, lambda: operand.load(self._schedule.segment(number)), otherwise=held)
            self._hand_over(round_number - self._start, sums)
            return [*asked, *held]

        def rounds(round_number: Word, state: list[Value]) -> list[Value]:
            rings, rest = state[: per_round * product.rounds_ahead], state[per_round * product.rounds_ahead :]
            for ahead in range(product.rounds_ahead):
                mine = slice(ahead * per_round, (ahead + 1) * per_round)
                current = [*rings[mine], *rest]
                this = round_number + ahead

                def step(this: Word = this, current: list[Value] = current) -> list[Value]:
                    return one_round(this, current)

                after = step() if ahead == 0 else when(this < self._stop, step, otherwise=current)
                rings[mine] = after[:per_round]
                rest = after[per_round:]
            return [*rings, *rest]

        rings = [value for ahead in range(product.rounds_ahead) for value in ask(self._start + ahead)]

        def first() -> list[Value]:
            number, _ = self._locate(self._start)
            return operand.load(self._schedule.segment(number))

        held = when(self._start < self._stop, first, otherwise=operand.nothing())
        repeat(self._start, self._stop, product.rounds_ahead, [*rings, *held], rounds)
        return []

    def _partial(self, place: Word, which_warp: Word) -> Word:
        pieces = self._product.strips * self._product.column_blocks
        buffer = place % NUM_BUFFERS
        return self._partials + (buffer * self._product.streaming_warps + which_warp) * (pieces * _FRAGMENT_BYTES)

    def _hand_over(self, place: Word, sums: list[list[Value]]) -> None:
        num_warps = self._product.streaming_warps + 1

        def until_read() -> list[Value]:
            wait(place % NUM_BUFFERS + _EMPTY, num_warps)
            return []

        when(place >= NUM_BUFFERS, until_read)
        target = self._partial(place, warp())
        for index, piece in enumerate(sums):
            store_shared_vector(target, piece, index * _FRAGMENT_BYTES)
        arrive(place % NUM_BUFFERS + _FULL, num_warps)

    # The warp that adds up.

    def _add_up(self) -> list[Value]:
        product, num_warps = self._product, self._product.streaming_warps + 1
        pieces = product.strips * product.column_blocks
        lane = thread() % WARP
        columns = [
            lane % 4 * 2 + (COLUMN_BLOCK * index + parity)
            for index in range(product.column_blocks)
            for parity in (0, 1)
        ]

        def gather(segment: Segment) -> list[Value]:
            count = self._schedule.gather(segment)
            rows = [self._schedule.row(column.at_most(count - 1)) for column in columns]
            return [count.value, *(row.value for row in rows), *(v for row in rows for v in self._finish.per_row(row))]

        def one_round(round_number: Word, state: list[Value]) -> list[Value]:
            number, tile = self._locate(round_number)
            segment = self._schedule.segment(number)
            stays = number.equals(Word(state[0]))
            known = when(stays.negated(), lambda: gather(segment), otherwise=state[1:])
            count, rows, per_row = Word(known[0]), known[1 : 1 + len(columns)], known[1 + len(columns) :]
            strips = [Strip(segment.expert, tile, self._part + index) for index in range(product.strips)]
            loaded = [self._finish.per_strip(strip) for strip in strips]
            place = round_number - self._start
            wait(place % NUM_BUFFERS + _FULL, num_warps)
            each = len(per_row) // len(columns)
            for piece in range(pieces):
                sums = self._sum(place, piece)
                if piece == pieces - 1:
                    when(round_number + NUM_BUFFERS < self._stop, lambda: self._release(place))
                strip, column_block = divmod(piece, product.column_blocks)
                for parity in (0, 1):
                    which = 2 * column_block + parity
                    self._finish.write(
                        strips[strip],
                        loaded[strip],
                        Word(rows[which]),
                        per_row[which * each : (which + 1) * each],
                        (sums[parity], sums[2 + parity]),
                        only=columns[which] < count,
                    )
            return [number.value, *known]

        nothing = self._nothing_gathered(len(columns))
        repeat(self._start, self._stop, 1, [word(_NO_SEGMENT).value, *nothing], one_round)
        return []

    def _nothing_gathered(self, num_columns: int) -> list[Value]:
        zero = word(0)
        return [zero.value] * (1 + num_columns) + [mgpu.c(0.0, f32())] * (num_columns * self._finish.floats_per_row)

    def _sum(self, place: Word, piece: int) -> list[Value]:
        pieces = self._product.strips * self._product.column_blocks
        source = self._partial(place, word(0))
        sums = load_shared_vector(source, piece * _FRAGMENT_BYTES)
        for other in range(1, self._product.streaming_warps):
            more = load_shared_vector(source, (other * pieces + piece) * _FRAGMENT_BYTES)
            sums = [arith.addf(one, two) for one, two in zip(sums, more, strict=True)]
        if self._product.scale_sums:
            sums = [arith.mulf(value, mgpu.c(2.0**-INPUT_EXPONENT, f32())) for value in sums]
        return sums

    def _release(self, place: Word) -> list[Value]:
        arrive(place % NUM_BUFFERS + _EMPTY, self._product.streaming_warps + 1)
        return []
