"""A thread block's share of `activations @ weight.T` for a few tokens, weights streamed once from global memory.

The block's weight rows are cut into units of eight; its warps share the columns, 64 at a time (a tile). Weights are the
B operand of `mma.m16n8k16` (a unit: eight columns of the result), tokens the A operand. Both go from global memory
straight to registers in 16-byte loads, with the columns of a tile permuted alike: lane 4 * g + t holds columns
8t .. 8t + 7 and 32 + 8t .. 32 + 8t + 7 of unit row g and of tokens g, g + 8, ..., which four instructions' fragments
then use in any common order. So weights lie in memory as published and the product is unchanged.

Each warp ends with float32 parts of the whole block's result; they meet in shared memory, [warp, token, row].
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper_thread as code
from pallas_kernels.hopper import mma
from pallas_kernels.hopper_thread import Thread, Value
from pallas_kernels.projections.norm import Activations, Norm, RootMeanSquare, normalize

UNIT_ROWS = 8
TILE_COLUMNS = 64
TILE_BYTES = 2 * TILE_COLUMNS


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a product is cut: units of weight rows per block, warps that share the columns, tiles in flight per warp."""

    units: int
    warps: int
    depth: int
    sharers: int = 1
    """Blocks of a cluster that share what is the same for all of them, where a kernel says so."""

    @property
    def rows(self) -> int:
        """Weight rows of a block."""
        return self.units * UNIT_ROWS

    @property
    def padded_rows(self) -> int:
        """Floats between two tokens' parts in shared memory, so that a warp's stores meet no bank twice."""
        return self.rows if self.rows % 16 == 8 else self.rows + 8

    def part_floats(self, num_tokens: int) -> int:
        """Floats of shared memory that the warps' parts take."""
        return self.warps * num_tokens * self.padded_rows


def multiply(
    me: Thread,
    activations: Activations,
    unit_rows: Sequence[tuple[Value, int]],
    tiles: Tiles,
    shared_parts: Value,
    *,
    norm: Norm | None = None,
    meanwhile: Callable[[], None] = lambda: None,
    keep: Callable[[list[Value], Value, Value, int], None] | None = None,
) -> None:
    """Fill `shared_parts` with every warp's part of the product, and wait for the block.

    `unit_rows` has, per unit, the address of this lane's weight row (row me.group of the unit) and a constant number of
    bytes to add. `meanwhile` is run once the first loads are on their way; `keep(words, token, column_bytes, offset)`
    for every eight normed values of every token, at `column_bytes` + `offset` in the token's row.
    """
    num_tiles = activations.num_columns // TILE_COLUMNS
    num_slots = -(-num_tiles // tiles.warps)
    # The last slot may be short of tiles: the warps left over load zeros there.
    rest = num_tiles - (num_slots - 1) * tiles.warps
    has_last = None if rest == tiles.warps else code.less(me.warp, rest)
    lane_bytes = code.plus(code.times(me.warp, TILE_BYTES), code.times(me.member, 16))
    weights = [(code.moved(row, lane_bytes), offset) for row, offset in unit_rows]
    own_tokens = [code.plus(me.group, first) for first in range(0, activations.num_tokens, 8)]
    tokens = [code.moved(activations.row(token), lane_bytes) for token in own_tokens]

    def load_weights(slot: int) -> list[list[Value]]:
        when = has_last if slot == num_slots - 1 else None
        start = slot * tiles.warps * TILE_BYTES
        return [
            code.load_global_words(row, start + offset, when=when, how=code.STREAMED)
            + code.load_global_words(row, start + offset + 64, when=when, how=code.STREAMED)
            for row, offset in weights
        ]

    num_blocks = -(-len(tokens) // 2)
    steps = [(slot, block) for slot in range(num_slots) for block in range(num_blocks)]

    def load_tokens(step: int) -> list[list[Value]]:
        """A slot's values of the tokens of one block, sixteen or eight."""
        slot, block = steps[step]
        when = has_last if slot == num_slots - 1 else None
        start = slot * tiles.warps * TILE_BYTES
        return [
            code.load_global_words(row, start, when=when) + code.load_global_words(row, start + 64, when=when)
            for row in tokens[2 * block : 2 * block + 2]
        ]

    ahead = 2 if num_blocks == 1 else 1
    rms = None if norm is None else RootMeanSquare(me, activations, norm, tiles.warps)
    waiting_weights = {slot: load_weights(slot) for slot in range(min(tiles.depth, num_slots))}
    waiting_tokens = {step: load_tokens(step) for step in range(min(ahead, len(steps)))}
    code.pin()
    meanwhile()
    inverses = None if rms is None else rms.finish(own_tokens)

    results = [[[code.number(0.0)] * 4 for _ in range(num_blocks)] for _ in unit_rows]
    weight, scales = [], []
    for step, (slot, block) in enumerate(steps):
        if block == 0:
            weight = waiting_weights.pop(slot)
            if norm is not None:
                scales = _load_scales(norm, lane_bytes, num_tiles, slot, tiles)
        pairs = waiting_tokens.pop(step)
        own = slice(2 * block, 2 * block + 2)
        if inverses is not None:
            pairs = [normalize(raw, inverse, scales) for raw, inverse in zip(pairs, inverses[own], strict=True)]
        if keep is not None:
            with mgpu.utils.when(has_last) if has_last is not None and slot == num_slots - 1 else nullcontext():
                for token, words in zip(own_tokens[own], pairs, strict=True):
                    for half in range(2):
                        offset = slot * tiles.warps * TILE_BYTES + 64 * half
                        keep(words[4 * half : 4 * half + 4], token, lane_bytes, offset)
        _accumulate([unit[block] for unit in results], weight, pairs)
        if step + ahead < len(steps):
            waiting_tokens[step + ahead] = load_tokens(step + ahead)
        if block == num_blocks - 1 and slot + tiles.depth < num_slots:
            waiting_weights[slot + tiles.depth] = load_weights(slot + tiles.depth)

    _store_parts(me, results, own_tokens, activations.num_tokens, tiles, shared_parts)
    code.synchronize()


def total(shared_parts: Value, place: Value, tiles: Tiles, num_tokens: int, offset: int = 0) -> Value:
    """The sum of all warps' parts of one result, in the order of the warps; `place` = token * padded_rows + row."""
    pointer = code.plus(shared_parts, code.times(place, 4))
    stride = 4 * num_tokens * tiles.padded_rows
    parts = [code.load_shared_float(pointer, 4 * offset + stride * warp) for warp in range(tiles.warps)]
    result = parts[0]
    for part in parts[1:]:
        result = arith.addf(result, part)
    return result


def _accumulate(results: list[list[Value]], weight: list[list[Value]], tokens: list[list[Value]]) -> None:
    """Add a tile's product to every unit's result for one block of tokens, in place."""
    upper = tokens[0]
    lower = tokens[1] if len(tokens) == 2 else [code.constant(0)] * len(upper)
    for low in range(0, 2 * TILE_COLUMNS // 16, 2):
        a = [upper[low], lower[low], upper[low + 1], lower[low + 1]]
        for result, pairs in zip(results, weight, strict=True):
            result[:] = mma(result, a, pairs[low : low + 2])


def _store_parts(
    me: Thread,
    results: list[list[list[Value]]],
    own_tokens: list[Value],
    num_tokens: int,
    tiles: Tiles,
    shared_parts: Value,
) -> None:
    for half, token in enumerate(own_tokens):
        place = code.times(code.plus(code.times(me.warp, num_tokens), token), tiles.padded_rows)
        pointer = code.plus(shared_parts, code.times(code.plus(place, code.times(me.member, 2)), 4))

        def store(pointer: Value = pointer, half: int = half) -> None:
            for unit, blocks in enumerate(results):
                low = 2 * (half % 2)
                code.store_shared_floats(pointer, blocks[half // 2][low : low + 2], 4 * UNIT_ROWS * unit)

        if 8 * (half + 1) <= num_tokens:
            store()
        else:
            with mgpu.utils.when(code.less(token, num_tokens)):
                store()


def _load_scales(norm: Norm, lane_bytes: Value, num_tiles: int, slot: int, tiles: Tiles) -> list[Value]:
    """The 16 scales of this lane's columns in a slot's tile."""
    column_bytes = code.plus(lane_bytes, slot * tiles.warps * TILE_BYTES)
    if (slot + 1) * tiles.warps > num_tiles:
        # A warp without a tile multiplies zeros: any scale will do, but not one past the end.
        column_bytes = code.smaller(column_bytes, (num_tiles - 1) * TILE_BYTES + 48)
    pointer = code.plus(norm.shared_scale, column_bytes)
    words = code.load_shared_words(pointer) + code.load_shared_words(pointer, 64)
    return [value for word in words for value in code.unpair(word)]
