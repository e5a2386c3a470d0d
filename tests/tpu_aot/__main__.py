"""Compile every program and compare it with table.json.

    python -m tests.tpu_aot [--layers N] [--jobs N] [--update] [--markdown] [NAME ...]

A name is model-generation-step or model-generation-step-mesh, or some of these. Exit code 1 if a program does not
compile, needs more memory than the table says, or has other kernels or collectives. --layers compiles the first N
layers only, prefill in a shorter chunk; --update writes what was found.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import sys
from typing import Any

from tests.tpu_aot.programs import (
    AXES,
    CHUNK,
    GENERATIONS,
    MODELS,
    OTHER_AXES,
    STEPS,
    TOPOLOGIES,
    compiled,
    published,
    tpu_mesh,
)
from tests.tpu_aot.table import exceeded, markdown, read, write

NAMES = (
    *(f"{model}-{generation}-{step}" for model in MODELS for generation in GENERATIONS for step in STEPS),
    *(f"120b-v6e-{step}-{mesh}" for mesh in OTHER_AXES for step in STEPS),
)
_SHORT_CHUNK = 512
"""Takes half as long to compile."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tpu_aot")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}, or a part (default: all)")
    parser.add_argument("--layers", type=int, help="the first so many layers (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="how many to compile at a time (default: 1)")
    parser.add_argument("--update", action="store_true", help="put the figures found into the table")
    parser.add_argument("--markdown", action="store_true", help="print the table's full programs and compile nothing")
    options = parser.parse_args()
    if options.markdown:
        print(markdown({name: row for name, row in read().items() if name in NAMES}))
        return 0
    chosen = [name for name in NAMES if not options.names or any(_is_part(part, name) for part in options.names)]
    if not chosen:
        parser.error(f"no program {options.names}: choose of {', '.join(NAMES)}")
    failures = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for name, found in zip(
            chosen, pool.map(functools.partial(_compile, num_layers=options.layers), chosen), strict=True
        ):
            label = f"{name}-{options.layers}" if options.layers else name
            print(f"{label}: {found}", flush=True)
            if options.update:
                write(read() | {label: found})
            else:
                failures += exceeded(label, found, read())
    for failure in failures:
        print(f"aot: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _is_part(part: str, name: str) -> bool:
    return set(part.split("-")) <= set(name.split("-"))


def _compile(name: str, num_layers: int | None) -> dict[str, Any]:
    model, generation, step, *other = name.split("-")
    topology, axes = TOPOLOGIES[model][generation], OTHER_AXES[other[0]] if other else AXES[model]
    chunk = CHUNK if num_layers is None else _SHORT_CHUNK
    figures = compiled(step, published(model, num_layers), tpu_mesh(topology, **axes), chunk=chunk)
    return {"topology": topology, "mesh": axes, **dataclasses.asdict(figures)}


if __name__ == "__main__":
    sys.exit(main())
