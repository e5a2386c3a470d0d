"""How the Hopper expert kernels cut their work, by the rows (tokens) an expert has on average. Reviewed tables.

Measured on an H200 on 2026-11-22 with `python -m pallas_kernels.tune`, whose output has the lines to put here.
"""

import dataclasses


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

# The decode form: its `DecodeTiles` and their table go here.


def prefill(rows_per_expert: float) -> Tiling:
    """The prefill form's tiling for so many rows an expert.

    Example:
        >>> prefill(128 * 4 / 32).widths, prefill(8192 * 4 / 128).widths
        ((16, 24, 32), (32, 64, 96, 128, 160))
    """
    return next((tiling for most, tiling in PREFILL if rows_per_expert <= most), PREFILL_BEYOND)
