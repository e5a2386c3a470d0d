"""How the Hopper expert kernels cut their work, by the rows (tokens) an expert has on average. Reviewed tables.

Measured on an H200 on 2026-11-22; `python -m pallas_kernels.tune` measures again and prints lines to put here.
"""

import dataclasses

from pallas_kernels.hopper_card import NUM_MULTIPROCESSORS


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the prefill form's work is cut."""

    widths: tuple[int, ...]
    """The numbers of tokens a tile may have, ascending, each a multiple of 8."""
    warpgroups: int
    """Multiplying warpgroups: 64 rows of weights each."""
    k_tiles: int = 1
    """Tiles of 64 columns per stage."""
    stages: int | None = None
    """Of the ring; None for as many as shared memory holds."""


# The prefill form: up to so many rows an expert, this tiling. Widths near the mean plus a deviation or two let most
# experts be one tile; beyond 192 rows they are several, and a narrow last one costs little.
PREFILL: tuple[tuple[int, Tiling], ...] = (
    (24, Tiling(widths=(16, 24, 32), warpgroups=3, k_tiles=3)),
    (48, Tiling(widths=(32, 48, 64), warpgroups=3, k_tiles=3)),
    (96, Tiling(widths=(64, 72, 80, 96), warpgroups=3)),
    (192, Tiling(widths=(32, 128, 144, 160), warpgroups=3)),
)
PREFILL_BEYOND = Tiling(widths=(32, 64, 96, 128, 160), warpgroups=3)


@dataclasses.dataclass(frozen=True)
class DecodeTiles:
    """How the decode form's work is cut; any of these gives the same numbers up to rounding."""

    columns: int
    """Rows of one expert that are multiplied at once: 8, 16, 24 or 32. An expert with more is read again."""
    strips: int
    """Strips of 16 matrix rows a warp takes at a time: 1 or 2."""
    scale_sums: bool
    """Multiply each sum over 32 columns of the matrix by its scale, instead of every value: less work for 8 columns,
    more for 16, since there is a sum for each row of the expert."""
    warpgroups: int = 4
    """Four warps each, of which one in all only adds up. Fewer leave a warp more registers."""
    num_blocks: int = NUM_MULTIPROCESSORS
    """One per multiprocessor."""


# The decode form. Microseconds of gate and up / down at the published 20b widths (2880 x 2880), 4 experts a token
# chosen evenly; "-" was not measured:
#
#     tokens of experts            1 of 32     8 of 32      32 of 32     32 of 128     64 of 32
#     columns  strips  scaled
#        8        1     sums     13.0/ 8.6   53.6/29.3    81.9/43.2   203.8/104.8      -
#        8        1     values   13.1/ 8.6      -         83.3/44.5        -           -
#        8        2     sums     13.4/ 8.8   50.4/28.2    77.6/41.9   188.7/ 96.4      -
#       16        2     sums        -           -            -             -       94.7/51.5
#       16        2     values      -           -            -             -       89.6/48.5
#
# (8 columns, 2 strips: with four sets of partial sums, which made no difference in the 32 of 32, instead of two.)
# One strip at a time deals out few rounds more evenly, two make half as many. Where between 4 and 32 rows in all the
# one overtakes the other is a guess. So are 32 columns, of which there are no figures: `experts.hopper` takes the
# prefill form beyond 8 rows an expert. With 32 columns four warpgroups run out of registers.
DECODE_FEW_ROWS = 8
"""Rows of all experts together, up to which DECODE_FEW."""
DECODE_FEW = DecodeTiles(columns=8, strips=1, scale_sums=True)
DECODE: tuple[tuple[int, DecodeTiles], ...] = (
    (4, DecodeTiles(columns=8, strips=2, scale_sums=True)),
    (8, DecodeTiles(columns=16, strips=2, scale_sums=False)),
)
"""Up to so many rows an expert, these tiles."""
DECODE_BEYOND = DecodeTiles(columns=32, strips=2, scale_sums=False, warpgroups=3)


def prefill(rows_per_expert: float) -> Tiling:
    """The prefill form's tiling for so many rows an expert.

    Example:
        >>> prefill(128 * 4 / 32).widths, prefill(8192 * 4 / 128).widths
        ((16, 24, 32), (32, 64, 96, 128, 160))
    """
    return next((tiling for most, tiling in PREFILL if rows_per_expert <= most), PREFILL_BEYOND)


def decode(num_rows: int, num_experts: int) -> DecodeTiles:
    """The decode form's tiles for so many rows (tokens times experts per token) over so many experts.

    Example:
        >>> [(tiles.columns, tiles.strips) for tiles in (decode(4, 32), decode(128, 32), decode(256, 32))]
        [(8, 1), (8, 2), (16, 2)]
    """
    if num_rows <= DECODE_FEW_ROWS:
        return DECODE_FEW
    return next((tiles for most, tiles in DECODE if num_rows <= most * num_experts), DECODE_BEYOND)
