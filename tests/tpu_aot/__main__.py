"""Compile every program and compare it with table.json.

    python -m tests.tpu_aot [--layers N] [--update] [--markdown] [NAME ...]

A name is model-generation-step, or some of the three. Exit code 1 if a program does not compile, needs more memory
than the table says or has other kernels. --layers compiles the first N layers only; --update writes what was found.
"""

import argparse
import dataclasses
import sys
from typing import Any

from tests.tpu_aot.programs import EXPERT_AXIS, GENERATIONS, MODELS, STEPS, TOPOLOGIES, compiled, published, tpu_mesh
from tests.tpu_aot.table import exceeded, markdown, read, write

NAMES = tuple(f"{model}-{generation}-{step}" for model in MODELS for generation in GENERATIONS for step in STEPS)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tpu_aot")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}, or a part (default: all)")
    parser.add_argument("--layers", type=int, help="the first so many layers (default: all)")
    parser.add_argument("--update", action="store_true", help="put the figures found into the table")
    parser.add_argument("--markdown", action="store_true", help="print the table and compile nothing")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(read()))
        return 0
    chosen = [name for name in NAMES if not options.names or any(_is_part(part, name) for part in options.names)]
    if not chosen:
        parser.error(f"no program {options.names}: choose of {', '.join(NAMES)}")
    failures = []
    for name in chosen:
        label = f"{name}-{options.layers}" if options.layers else name
        found = _compile(name, options.layers)
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
    model, generation, step = name.split("-")
    topology = TOPOLOGIES[model][generation]
    mesh = tpu_mesh(topology, expert=EXPERT_AXIS[model])
    figures, _ = compiled(step, published(model, num_layers), mesh)
    return {"topology": topology, "devices": mesh.size, **dataclasses.asdict(figures)}


if __name__ == "__main__":
    sys.exit(main())
