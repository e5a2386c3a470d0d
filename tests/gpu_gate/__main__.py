"""Compile every program of the gate and compare it with limits.json.

    python -m tests.gpu_gate [--list] [--update] [NAME ...]

Exit code 1 if a figure is above its limit, or a kernel that has a limit is not there. --list prints what each program
launches; --update writes the figures found as the new limits, to be reviewed like any other change: a kernel whose line
goes is a kernel that is no longer checked.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.gpu_gate.limits import NAMES, SPILLS, exceeded, read, write
from tests.gpu_gate.ptxas import kernels

_SHOWN = 160


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_gate")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--list", action="store_true", help="print what is launched, in order")
    parser.add_argument("--update", action="store_true", help="make the figures found the limits")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no program {sorted(unknown)[0]}: choose of {', '.join(NAMES)}")
    limits, failures = read(), []
    for name in options.names or NAMES:
        found = _compile(name)
        _show(name, found, limits.get(name, {}), launches=options.list)
        figures = {key: value for key, value in found.items() if key not in ("list", "kernels")}
        if options.update:
            limits[name] = figures
        else:
            failures += exceeded(name, figures, limits.get(name, {}))
    if options.update:
        write(limits)
    for failure in failures:
        print(f"gpu-gate: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _compile(name: str) -> dict[str, Any]:
    """The figures of one program, compiled in another process, with what ptxas said of each of its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "figures.json"
        answer = subprocess.run(
            [sys.executable, "-m", "tests.gpu_gate.programs", name, str(result)],
            env=os.environ
            | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "MOSAIC_GPU_DUMP_PTXAS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if answer.returncode != 0:
            sys.exit(f"gpu-gate: {name} did not compile (see above)")
        found = json.loads(result.read_text())
    found["kernels"] = kernels(answer.stdout)
    if not found["kernels"]:
        sys.exit(f"gpu-gate: {name}: ptxas named no kernel, so no spill was checked")
    return found | {SPILLS + kernel.name: kernel.spill_bytes for kernel in found["kernels"]}


def _show(name: str, found: dict[str, Any], limits: dict[str, float], *, launches: bool) -> None:
    print(f"{name}")
    for key, value in found.items():
        if key not in ("list", "kernels"):
            print(f"  {key:<40} {value:>14,.6g}  limit {limits.get(key, float('nan')):,.6g}")
    for kernel in found["kernels"]:
        print(f"  {'registers ' + kernel.name:<40} {kernel.registers:>14}")
    for launch in found["list"] if launches else ():
        times = f"{launch['times']} x " if launch["times"] > 1 else ""
        source = launch["source"].rpartition("/body/")[2] or launch["source"]
        print(f"  {times}{launch['kind']:<16} {launch['name']:<40} {source:<50} {launch['shape']}"[:_SHOWN])
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
