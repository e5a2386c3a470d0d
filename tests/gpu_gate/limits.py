"""The reviewed table of limits, and what is above it or missing."""

import json
from collections.abc import Mapping
from pathlib import Path

Limits = dict[str, dict[str, float]]

NAMES = (
    "decode-1", "decode-8", "decode-128", "draw-8", "prefill-2048", "train-2048", "decode-8-two", "prefill-2048-two",
    "decode-8-eight", "decode-8-two-by-four", "decode-128-four", "prefill-2048-four", "full-4096-four",
)  # fmt: skip
"""The programs: a greedy decode step of so many rows, one that draws, a prefill of so many tokens, an update of a LoRA
fine-tuning with a row of so many, or of a full one; last its mesh, one GPU without it."""
MESHES: dict[str, dict[str, int]] = {
    "": {},
    "two": {"expert": 2},
    "four": {"expert": 4},
    "eight": {"expert": 8},
    "two-by-four": {"data": 2, "expert": 4},
}
SPILLS = "spill_bytes "
"""Before the name of a kernel: its limit, and by that the kernels a program is expected to have."""
_FILE = Path(__file__).with_name("limits.json")


def read() -> Limits:
    """The limits of each program."""
    return json.loads(_FILE.read_text()) if _FILE.exists() else {}


def write(limits: Limits) -> None:
    """Replace the table."""
    _FILE.write_text(json.dumps(limits, indent=2, sort_keys=True) + "\n")


def exceeded(name: str, figures: Mapping[str, float], limits: Mapping[str, float]) -> list[str]:
    """A line for each figure above its limit or without one, and for each limit without its figure."""
    above = [
        f"{name}: {key} is {value:,.6g}, "
        + (f"the limit is {limits[key]:,.6g}" if key in limits else "and has no limit: run with --update")
        for key, value in figures.items()
        if key not in limits or value > limits[key]
    ]
    return above + [
        f"{name}: {key} was not found: a kernel that is gone or has another name? If so, run with --update"
        for key in limits
        if key not in figures
    ]
