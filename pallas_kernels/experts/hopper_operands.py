"""The two operands of the decode kernels' product, and how the product is cut.

A warp asks for its tiles of the weights long before it multiplies them, straight into registers: 16 bytes a lane are
its part of the A operand of mma.m16n8k16 for a strip of 16 rows and 64 columns, packed. Its part of the input rows
stays in registers as long as the expert is the same, if there is room. The weights' scales are applied either to
the A operand (`hopper.unpack`) or, for A operands that are the bare codes (`hopper.codes`), to the result.
"""

import dataclasses
from collections.abc import Callable

from jax.experimental.mosaic import gpu as mgpu

from pallas_kernels import hopper
from pallas_kernels.experts.hopper_schedule import Rows, Schedule, Segment
from pallas_kernels.hopper import STREAMED, Value, f32, i32, load_vector, load_vector_if, load_word_if
from pallas_kernels.hopper_words import WARP, Condition, Word, pointer, thread, warp, when, word

TILE_BYTES = 2048
SCALE_BYTES = 128
STRIPS_PER_TILE = 4
COLUMN_BLOCK = 8
NUM_BUFFERS = 2
"""Sets of partial sums: the warps may be a round ahead of the one that adds them up. Four were no faster."""
TILES_AHEAD = 6
"""About how many strips' tiles a warp asks for before it needs the first. Nine and twelve were slower."""
MAX_HELD_INPUTS = 48
"""Registers a warp's part of the input rows may take; beyond, it is loaded again in each round."""
INPUT_EXPONENT = 64
"""Inputs are multiplied by 2 ** 64 where sums are scaled: codes alone are as small as 2 ** -127."""


@dataclasses.dataclass(frozen=True)
class Product:
    """The shape of one product and how it is cut; all static."""

    rows: Rows
    row_tiles: int
    """Tiles of 64 rows in one expert's matrix."""
    k_tiles: int
    rows_per_input: int
    """Consecutive rows (assignments) that share a row of the input."""
    strips: int
    """Strips of 16 matrix rows that a warp takes at a time."""
    scale_sums: bool
    """Multiply each sum over 32 columns of the matrix by its scale, instead of every value."""
    num_blocks: int

    @property
    def column_blocks(self) -> int:
        """Groups of 8 columns in a pass."""
        return self.rows.columns // COLUMN_BLOCK

    @property
    def tiles_per_warp(self) -> int:
        """Tiles of K that a warp takes of every strip."""
        return -(-self.k_tiles // (self.rows.num_warps - 1))

    @property
    def streaming_warps(self) -> int:
        """Warps that share K."""
        return -(-self.k_tiles // self.tiles_per_warp)

    @property
    def rounds_ahead(self) -> int:
        """Rounds of loads in flight."""
        return max(1, round(TILES_AHEAD / (self.tiles_per_warp * self.strips)))

    @property
    def holds_inputs(self) -> bool:
        """Whether a warp's part of the input rows stays in its registers."""
        return 8 * self.tiles_per_warp * self.column_blocks <= MAX_HELD_INPUTS

    @property
    def partial_floats(self) -> int:
        """Float32 of shared memory for partial sums."""
        return NUM_BUFFERS * self.streaming_warps * self.strips * self.column_blocks * 4 * WARP

    @property
    def blocks_per_team(self) -> int:
        """Blocks that share a tile of 64 rows."""
        return STRIPS_PER_TILE // self.strips


def _exists(product: Product, index: int) -> Condition | None:
    """Whether this warp has a tile of that index; None if every warp does."""
    if product.k_tiles % product.tiles_per_warp == 0 or index == 0:
        return None
    return warp() * product.tiles_per_warp + index < product.k_tiles


class Weights:
    """A warp's tiles of the strips of one round: where they are, how they are loaded and multiplied."""

    def __init__(self, product: Product, part: Word, words: Value, scales: Value):
        self._product = product
        lane = thread() % WARP
        first_tile = warp() * product.tiles_per_warp
        offset = first_tile * TILE_BYTES + part * (TILE_BYTES // STRIPS_PER_TILE) + lane * 16
        self._words = pointer(hopper.address(words), offset, 1)
        offset = first_tile * SCALE_BYTES + part * (SCALE_BYTES // STRIPS_PER_TILE) + lane // 4 * 4
        self._scales = pointer(hopper.address(scales), offset, 1)

    def move_to(self, expert: Word, tile: Word, only: Condition) -> None:
        """Load from this place, if the condition holds, until moved again."""
        row = expert * self._product.row_tiles + tile
        self._at = (
            pointer(self._words, row, self._product.k_tiles * TILE_BYTES),
            pointer(self._scales, row, self._product.k_tiles * SCALE_BYTES),
        )
        self._only = only

    def ask(self, index: int) -> list[Value]:
        """Five registers per strip, for the warp's tile of that index: they arrive later."""
        words, scales = self._at
        exists = _exists(self._product, index)
        only = (self._only if exists is None else self._only & exists).value
        asked = []
        for strip in range(self._product.strips):
            at = index * TILE_BYTES + strip * (TILE_BYTES // STRIPS_PER_TILE)
            asked += load_vector_if(only, words, at, hint=STREAMED)
            at = index * SCALE_BYTES + strip * (SCALE_BYTES // STRIPS_PER_TILE)
            asked.append(load_word_if(only, scales, at, hint="nc.L2::128B."))
        return asked

    def multiply(
        self, index: int, loaded: list[Value], inputs: Callable[[int], list[Value]], sums: list[list[Value]]
    ) -> list[list[Value]]:
        """Add the product of what was asked for and the same tile's inputs, by their column block."""
        exists = _exists(self._product, index)
        if exists is None:
            return self._multiply(loaded, inputs, sums)
        flat = [value for piece in sums for value in piece]

        def body() -> list[Value]:
            return [value for piece in self._multiply(loaded, inputs, sums) for value in piece]

        flat = when(exists, body, otherwise=flat)
        return [flat[start : start + 4] for start in range(0, len(flat), 4)]

    def _multiply(
        self, loaded: list[Value], inputs: Callable[[int], list[Value]], sums: list[list[Value]]
    ) -> list[list[Value]]:
        sums = list(sums)
        scale_sums, num_column_blocks = self._product.scale_sums, self._product.column_blocks
        strips = [loaded[5 * strip : 5 * strip + 5] for strip in range(self._product.strips)]
        a = [_a_fragments(strip, scaled=not scale_sums) for strip in strips]
        for column_block in range(num_column_blocks):
            b = inputs(column_block)
            for strip, fragments in enumerate(a):
                piece = strip * num_column_blocks + column_block
                if scale_sums:
                    sums[piece] = _add_scaled(sums[piece], fragments, b, strips[strip][-1])
                    continue
                for chunk in range(4):
                    sums[piece] = hopper.mma(sums[piece], fragments[chunk], b[2 * chunk : 2 * chunk + 2])
        return sums


def _a_fragments(loaded: list[Value], *, scaled: bool) -> list[list[Value]]:
    """The four 16-wide A fragments of a strip's tile: its weights, or only their codes times 2 ** -126."""
    *words, scales = loaded

    def unpacked(which: int) -> list[Value]:
        return hopper.unpack(words[which], hopper.scale_pair(scales, which)) if scaled else hopper.codes(words[which])

    fragments = []
    for half in (0, 1):
        low, high = unpacked(2 * half), unpacked(2 * half + 1)
        fragments += [[low[2 * a], high[2 * a], low[2 * a + 1], high[2 * a + 1]] for a in (0, 1)]
    return fragments


def _add_scaled(sums: list[Value], fragments: list[list[Value]], b: list[Value], scales: Value) -> list[Value]:
    """`sums` plus the products of a tile's two blocks of 32 columns, each times its two rows' scales."""
    zero = mgpu.c(0.0, f32())
    for half in (0, 1):
        block = [zero] * 4
        for chunk in (2 * half, 2 * half + 1):
            block = hopper.mma(block, fragments[chunk], b[2 * chunk : 2 * chunk + 2])
        rows = [hopper.scale_float(scales, 2 * half + r) for r in (0, 0, 1, 1)]
        sums = [hopper.multiply_add(*terms) for terms in zip(block, rows, sums, strict=True)]
    return sums


def _load_block(at: Value, offset: int) -> list[Value]:
    return [*load_vector(at, offset, hint="nc."), *load_vector(at, offset + 64, hint="nc.")]


def _enlarged(pairs: list[Value]) -> list[Value]:
    """Pairs of bfloat16 times 2 ** INPUT_EXPONENT, which loses nothing below 2 ** 64."""
    factor = word((127 + INPUT_EXPONENT) << 7 | (127 + INPUT_EXPONENT) << 23).value
    return [hopper.assembly([i32()], [v, factor], "mul.bf16x2 $0, $1, $2;", "=r,r,r", effect=False)[0] for v in pairs]


class Inputs:
    """A warp's columns of the input rows of a segment, as the B operand of mma.m16n8k16."""

    def __init__(self, product: Product, schedule: Schedule, inputs: Value):
        self._product = product
        self._schedule = schedule
        lane = thread() % WARP
        offset = warp() * (product.tiles_per_warp * 128) + lane % 4 * 16
        self._inputs = pointer(hopper.address(inputs), offset, 1)

    def nothing(self) -> list[Value]:
        """As many values as `load` returns, before there is a segment."""
        blocks = self._product.column_blocks
        if self._product.holds_inputs:
            return [word(0).value] * (8 * self._product.tiles_per_warp * blocks)
        return [self._inputs] * blocks

    def load(self, segment: Segment) -> list[Value]:
        """What `block` needs of a segment's rows: their values, or pointers to them where registers do not hold them.

        Columns without a row repeat the last one, and nobody looks there.
        """
        count = self._schedule.gather(segment)
        own_column = thread() % WARP // 4
        pointers = []
        for index in range(self._product.column_blocks):
            row = self._schedule.row((own_column + index * COLUMN_BLOCK).at_most(count - 1))
            source = row // self._product.rows_per_input
            pointers.append(pointer(self._inputs, source, self._product.k_tiles * 128))
        if not self._product.holds_inputs:
            return pointers
        loaded = [
            value
            for tile in range(self._product.tiles_per_warp)
            for at in pointers
            for value in self._load_tile(at, tile)
        ]
        return _enlarged(loaded) if self._product.scale_sums else loaded

    def _load_tile(self, at: Value, tile: int) -> list[Value]:
        exists = _exists(self._product, tile)
        if exists is None:
            return _load_block(at, tile * 128)
        return [
            *load_vector_if(exists.value, at, tile * 128, hint="nc."),
            *load_vector_if(exists.value, at, tile * 128 + 64, hint="nc."),
        ]

    def block(self, held: list[Value], index: int, column_block: int) -> list[Value]:
        """The B operand of the warp's tile of that index: two registers for each 16 columns of K."""
        if self._product.holds_inputs:
            start = 8 * (index * self._product.column_blocks + column_block)
            return held[start : start + 8]
        loaded = _load_block(held[column_block], index * 128)
        return _enlarged(loaded) if self._product.scale_sums else loaded
