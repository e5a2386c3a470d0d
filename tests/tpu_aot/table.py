"""The committed table: what the compiler said of each program, which is the most it may say from now on."""

import json
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("table.json")
LIMITED = ("argument_bytes", "temporary_bytes")

Table = dict[str, dict[str, Any]]


def read() -> Table:
    """Figures by the program's name."""
    return json.loads(_FILE.read_text()) if _FILE.exists() else {}


def write(table: Table) -> None:
    """Replace the table."""
    _FILE.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")


def exceeded(name: str, found: dict[str, Any], table: Table) -> list[str]:
    """A line for each figure above the table's, and for kernels that are not the table's."""
    if name not in table:
        return [f"{name}: is not in the table: run with --update"]
    known = table[name]
    lines = [
        f"{name}: {key} is {found[key]:,}, the table has {known[key]:,}" for key in LIMITED if found[key] > known[key]
    ]
    if found["kernels"] != known["kernels"]:
        lines.append(f"{name}: kernels are {found['kernels']}, the table has {known['kernels']}")
    return lines


def markdown(table: Table) -> str:
    """The table for docs/kernels.md."""
    lines = [
        "| program | topology | arguments | temporaries | estimated | kernels | compiled in |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in table.items():
        kernels = ", ".join(f"{count} {kernel}" for kernel, count in row["kernels"].items())
        sizes = " | ".join(f"{row[key] / 2**20:,.0f} MiB" for key in LIMITED)
        estimate = f"{1000 * row['estimated_seconds']:.2f} ms"
        lines.append(f"| {name} | {row['topology']} | {sizes} | {estimate} | {kernels} | {row['seconds']:.0f} s |")
    return "\n".join(lines)
