"""The reviewed table of limits, and what is above it."""

import json
from collections.abc import Mapping
from pathlib import Path

Limits = dict[str, dict[str, float]]

NAMES = ("decode-1", "decode-8", "prefill-2048")
"""The programs: a decode step of so many rows, a prefill of so many tokens."""
_FILE = Path(__file__).with_name("limits.json")


def read() -> Limits:
    """The limits of each program."""
    return json.loads(_FILE.read_text()) if _FILE.exists() else {}


def write(limits: Limits) -> None:
    """Replace the table."""
    _FILE.write_text(json.dumps(limits, indent=2, sort_keys=True) + "\n")


def exceeded(name: str, figures: Mapping[str, float], limits: Mapping[str, float]) -> list[str]:
    """A line for each figure above its limit, or without one."""
    return [
        f"{name}: {key} is {value:,.6g}, "
        + (f"the limit is {limits[key]:,.6g}" if key in limits else "and has no limit: run with --update")
        for key, value in figures.items()
        if key not in limits or value > limits[key]
    ]
