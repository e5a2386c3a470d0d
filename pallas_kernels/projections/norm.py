"""RMSNorm of a few rows inside the Hopper kernels that multiply them: float32 throughout, rounded once at the end."""

import dataclasses
from collections.abc import Iterable

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper_thread as code
from pallas_kernels.hopper_thread import Thread, Value

_LOADS = 6
"""16-byte loads of a row in flight per lane, where a warp norms a whole row."""
SQUARES = 4
"""Pieces of a row whose squares are summed apart."""
_EARLY_TURNS = 3
"""Pieces per warp that are loaded before anything else."""


@dataclasses.dataclass(frozen=True)
class Activations:
    """Rows of bfloat16 in global memory, of which a block multiplies `num_tokens` from `first` on.

    Rows at or past `limit` are never read: the last one stands in for them. `first` None is the beginning.
    """

    base: Value
    num_columns: int
    num_tokens: int
    limit: int
    first: Value | None = None

    def row(self, token: Value) -> Value:
        """The address of a row, counted from `first`."""
        index = token if self.first is None else code.plus(token, self.first)
        return code.moved(self.base, code.times(code.smaller(index, self.limit - 1), 2 * self.num_columns))

    @property
    def num_chunks(self) -> int:
        """16-byte pieces of a row."""
        return self.num_columns // 8

    @property
    def num_batches(self) -> int:
        """Batches of loads in which a warp reads a row."""
        return -(-self.num_chunks // (32 * _LOADS))


@dataclasses.dataclass(frozen=True)
class Norm:
    """RMSNorm of the activations: its scale in global memory, and shared memory to work in."""

    scale: Value
    eps: float
    shared_squares: Value
    """`num_tokens` * `SQUARES` floats."""
    shared_scale: Value
    """As many bfloat16 values as columns."""
    sharers: int = 1
    """Blocks of the cluster, which norm the same rows and share the sums."""


class RootMeanSquare:
    """1 / root mean square of every token; made in two parts, so that other loads fly in between.

    Warps sum the squares of a quarter row at a time; every lane then adds up the quarters of the tokens it asks for.
    """

    def __init__(self, me: Thread, activations: Activations, norm: Norm, num_warps: int) -> None:
        self.me, self.activations, self.norm, self.num_warps = me, activations, norm, num_warps
        self.num_summers = num_warps * norm.sharers
        self.summer = me.warp
        if norm.sharers > 1:
            block = arith.remui(code.block_index(), code.constant(norm.sharers))
            self.summer = code.plus(me.warp, code.times(block, num_warps))
            code.cluster_arrive()  # a block's shared memory may be written to only once it runs
        self.piece_chunks = -(-activations.num_chunks // SQUARES)
        self.num_turns = -(-activations.num_tokens * SQUARES // self.num_summers)
        self.early = [self._load(turn) for turn in range(min(self.num_turns, _EARLY_TURNS))]
        self.scale = self._load_scale()

    def _piece(self, turn: int) -> Value:
        return code.plus(self.summer, turn * self.num_summers)

    def _load(self, turn: int) -> list[Value]:
        """This lane's words of the piece of a row that is the warp's at this turn; zeros where there is none."""
        token = code.shifted(self._piece(turn), SQUARES.bit_length() - 1)
        first = code.times(arith.andi(self._piece(turn), code.constant(SQUARES - 1)), self.piece_chunks)
        end = code.smaller(code.plus(first, self.piece_chunks), self.activations.num_chunks)
        pointer = self.activations.row(token)
        words = []
        for skipped in range(0, self.piece_chunks, 32):
            chunk = code.plus(first, code.plus(self.me.lane, skipped))
            exists = arith.andi(code.less(chunk, end), code.less(token, self.activations.num_tokens))
            words += code.load_global_words(code.moved(pointer, code.times(chunk, 16)), when=exists)
        return words

    def _load_scale(self) -> list[list[Value]]:
        pointer = code.moved(self.norm.scale, code.times(self.me.index, 16))
        chunks = self.activations.num_chunks
        return [
            code.load_global_words(pointer, 16 * first, when=code.less(self.me.index, chunks - first))
            for first in range(0, chunks, 32 * self.num_warps)
        ]

    def finish(self, own_tokens: list[Value]) -> list[Value]:
        """The values of `own_tokens`, once the block is through; the scale is in shared memory then."""
        me, norm, activations = self.me, self.norm, self.activations
        pointer = code.plus(norm.shared_scale, code.times(me.index, 16))
        for index, words in enumerate(self.scale):
            first = 32 * self.num_warps * index
            with mgpu.utils.when(code.less(me.index, activations.num_chunks - first)):
                code.store_shared_words(pointer, words, 16 * first)
        if norm.sharers > 1:
            code.cluster_wait()
        for turn in range(self.num_turns):
            words = self.early[turn] if turn < len(self.early) else self._load(turn)
            squares = code.warp_sum(sum_of_squares(words))
            piece = self._piece(turn)
            exists = arith.andi(code.less(me.lane, norm.sharers), code.less(piece, SQUARES * activations.num_tokens))
            place = code.plus(norm.shared_squares, code.times(piece, 4))
            if norm.sharers > 1:
                code.store_block_float(place, squares, me.lane, when=exists)
            else:
                code.store_shared_float(place, squares, when=exists)
        if norm.sharers > 1:
            code.cluster_arrive()
            code.cluster_wait()
        else:
            code.synchronize()
        last = activations.num_tokens - 1
        inverses = []
        for token in own_tokens:
            place = code.times(code.smaller(token, last), 4 * SQUARES)
            pieces = code.load_shared_words(code.plus(norm.shared_squares, place))
            floats = [arith.bitcast(code.f32(), word) for word in pieces]
            inverses.append(inverse_root_mean_square(floats, activations, norm.eps))
        return inverses


def load_batch(me: Thread, activations: Activations, row: Value, batch: int, when: Value) -> list[list[Value]]:
    """This lane's chunks of one batch of a row, every 32nd chunk from the lane's own; zeros past the row's end."""
    pointer = code.moved(row, code.times(me.lane, 16))
    loads = []
    for first in _chunks(activations, batch):
        left = activations.num_chunks - first
        exists = when if left >= 32 else arith.andi(when, code.less(me.lane, left))
        loads.append(code.load_global_words(pointer, 16 * first, when=exists))
    return loads


def _chunks(activations: Activations, batch: int) -> range:
    last = min(32 * _LOADS * (batch + 1), activations.num_chunks)
    return range(32 * _LOADS * batch, last, 32)


def sum_of_squares(words: Iterable[Value]) -> Value:
    """The sum over this lane's pairs, in an order that depends on their number alone."""
    sums = [code.number(0.0)] * 8
    for index, word in enumerate(words):
        for half, value in enumerate(code.unpair(word)):
            own = 2 * (index % 4) + half
            sums[own] = code.multiply_add(value, value, sums[own])
    return _added(sums)


def _added(values: list[Value]) -> Value:
    while len(values) > 1:
        values = [arith.addf(one, two) for one, two in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def inverse_root_mean_square(squares: list[Value], activations: Activations, eps: float) -> Value:
    """1 / root mean square of a row from sums of its squares, a power of two in number."""
    mean = arith.divf(_added(squares), code.number(float(activations.num_columns)))
    return code.inverse_root(arith.addf(mean, code.number(eps)))


def normalize(pairs: list[Value], inverse: Value, scales: list[Value]) -> list[Value]:
    """Raw pairs of one token as RMSNorm leaves them; `scales` has one float32 for every value."""
    normed = []
    for index, word in enumerate(pairs):
        low, high = (
            arith.mulf(arith.mulf(value, inverse), scale)
            for value, scale in zip(code.unpair(word), scales[2 * index : 2 * index + 2], strict=True)
        )
        normed.append(code.pair(low, high))
    return normed


def normalize_rows(
    me: Thread, activations: Activations, scale: Value, eps: float, shared_rows: Value, row_bytes: int, num_warps: int
) -> None:
    """Write every token's normed row to shared memory, `row_bytes` apart, and wait for the block."""
    always = mgpu.c(1, code.less(me.lane, 32).type)
    for turn in range(-(-activations.num_tokens // num_warps)):
        token = code.plus(me.warp, turn * num_warps)
        with mgpu.utils.when(code.less(token, activations.num_tokens)):
            row = activations.row(token)
            batches = (load_batch(me, activations, row, batch, always) for batch in range(activations.num_batches))
            words = (word for batch in batches for load in batch for word in load)
            inverse = inverse_root_mean_square([code.warp_sum(sum_of_squares(words))], activations, eps)
            target = code.plus(shared_rows, code.plus(code.times(token, row_bytes), code.times(me.lane, 16)))
            for batch in range(activations.num_batches):
                raw, scales = (load_batch(me, activations, each, batch, always) for each in (row, scale))
                for first, pairs, words in zip(_chunks(activations, batch), raw, scales, strict=True):
                    floats = [value for word in words for value in code.unpair(word)]
                    with mgpu.utils.when(code.less(me.lane, activations.num_chunks - first)):
                        code.store_shared_words(target, normalize(pairs, inverse, floats), 16 * first)
    code.synchronize()
