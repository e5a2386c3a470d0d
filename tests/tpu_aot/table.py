"""The committed table: what the compiler said of each program, which is the most it may say from now on."""

import json
from pathlib import Path
from typing import Any

from gptoss_jax.plan.chips import TPUS

_FILE = Path(__file__).with_name("table.json")
LIMITED = ("argument_bytes", "temporary_bytes")
EQUAL = ("kernels", "collectives")
MEMORY_GIB = {generation: round(chip.memory_bytes / 2**30, 2) for generation, chip in TPUS.items()}
"""What a program may take of one device; a tpu7x chip is two devices."""

Table = dict[str, dict[str, Any]]


def read() -> Table:
    """Figures by the program's name."""
    return json.loads(_FILE.read_text()) if _FILE.exists() else {}


def write(table: Table) -> None:
    """Replace the table."""
    _FILE.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")


def exceeded(name: str, found: dict[str, Any], table: Table) -> list[str]:
    """A line for each figure above the table's, and for kernels and collectives that are not the table's."""
    if name not in table:
        return [f"{name}: is not in the table: run with --update"]
    known = table[name]
    return [
        *(
            f"{name}: {key} is {found[key]:,}, the table has {known[key]:,}"
            for key in LIMITED
            if found[key] > known[key]
        ),
        *(f"{name}: {key} are {found[key]}, the table has {known[key]}" for key in EQUAL if found[key] != known[key]),
    ]


def markdown(table: Table) -> str:
    """The table for docs/tpu.md."""
    lines = [
        "| program | topology, mesh | arguments + temporaries, GiB of one device | estimated | collectives |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in table.items():
        mesh = " ".join(f"{axis}={size}" for axis, size in row["mesh"].items())
        arguments, temporaries = (row[key] / 2**30 for key in LIMITED)
        memory = f"{arguments:.2f} + {temporaries:.2f} of {MEMORY_GIB[row['topology'].split(':')[0]]}"
        collectives = ", ".join(f"{count} {collective}" for collective, count in row["collectives"].items())
        estimate = f"{1000 * row['estimated_seconds']:.2f} ms"
        lines.append(f"| {name} | {row['topology']} {mesh} | {memory} | {estimate} | {collectives} |")
    return "\n".join(lines)
