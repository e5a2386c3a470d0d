"""The roofline plot of --plot: what each row reached against what the card allows. Needs matplotlib."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.bench.report import Row
from gptoss_jax.bench.roofline import Ceilings
from gptoss_jax.errors import BenchError

_FORMATS = (".png", ".svg", ".pdf")
_MARKERS = {"decode": "o", "prefill": "s", "kernel": "^"}


def check(path: Path) -> None:
    """Raise BenchError for a format that is not drawn, or without matplotlib: before a long run, not after it."""
    if path.suffix.lower() not in _FORMATS:
        raise BenchError("no format of a plot", where=str(path), fix=f"name the file {', '.join(_FORMATS)}")
    try:
        importlib.import_module("matplotlib")
    except ImportError as missing:
        raise BenchError("matplotlib is not installed", where="--plot", fix="pip install gptoss-jax[plot]") from missing


def draw(path: Path, rows: Sequence[Row], ceilings: Ceilings, *, title: str) -> None:
    """Write the plot, in the format of the file's ending (see `check`); a second panel shows time over contexts.

    Rows that leave a stage out are not in it.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.left_out is None]
    lines = _over_context(rows)
    figure = Figure(figsize=(12 if lines else 7, 5), layout="constrained")
    left, *others = np.atleast_1d(figure.subplots(1, 2 if lines else 1))
    _roofline(left, rows, ceilings)
    for axes in others:
        _context(axes, lines)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _roofline(axes: Any, rows: Sequence[Row], ceilings: Ceilings) -> None:
    found = np.array([row.flops / row.bytes for row in rows])
    ridge = ceilings.dense_flops_per_s / ceilings.read_bytes_per_s
    intensity = np.geomspace(min(found.min(), ridge) / 2, max(found.max(), ridge) * 2, 200)
    roof = np.minimum(intensity * ceilings.read_bytes_per_s, ceilings.dense_flops_per_s)
    axes.plot(intensity, roof / 1e12, color="black", linewidth=1)
    for phase, marker in _MARKERS.items():
        of_phase = [row for row in rows if row.phase == phase]
        if not of_phase:
            continue
        x = [row.flops / row.bytes for row in of_phase]
        y = [row.flops / row.ms / 1e9 for row in of_phase]
        axes.plot(x, y, marker, label=phase, markersize=5, alpha=0.8)
        for row, across, up in zip(of_phase, x, y, strict=True):
            axes.annotate(_label(row), (across, up), textcoords="offset points", xytext=(5, -9), fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="floating point operations a byte that must be read", ylabel="TFLOP/s")
    axes.legend(loc="lower right", frameon=False)


def _label(row: Row) -> str:
    if row.phase == "prefill":
        return f"{row.context}"
    if row.phase == "kernel":
        return f"{row.kernel} {row.batch}"
    return f"{row.batch}"


def _over_context(rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """Time by context, for what was measured at more than one."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.phase != "kernel":
            lines.setdefault(f"{row.phase}, batch {row.batch}", []).append((row.context, row.ms))
    return {name: sorted(points) for name, points in lines.items() if len(points) > 1}


def _context(axes: Any, lines: dict[str, list[tuple[int, float]]]) -> None:
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), "o-", label=name, markersize=4)
    axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="ms (a step; a prompt)")
    axes.legend(frameon=False)
