"""Time converting a checkpoint against `cp` of the same files, in turns on the same disk, and write the figures.

    python -m convert.synthetic SOURCE --model 20b --shards 3
    python -m convert.bench_convert SOURCE SCRATCH RESULT.json

`cp` leaves part of what it wrote in memory; the conversion returns when all is on the disk. So `cp` is timed twice, up
to its return and up to the flush of its files. Both start with cold caches where the system lets us drop them. The last
conversion stays in SCRATCH/converted.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert.source import Source, open_source
from gptoss_jax.manifest import chunk_shape

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m convert.bench_convert")
    parser.add_argument("source", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--conditions", default="", help="what else the machine was doing, for the record")
    options = parser.parse_args()
    figures = {"conditions": options.conditions} | measure(options.source, options.scratch, options.repeats)
    options.result.write_text(json.dumps(figures, indent=2) + "\n")


def measure(path: Path, scratch: Path, repeats: int) -> dict[str, Any]:
    """Copy and convert in turns; figures of each turn, and the ratio of the median rates."""
    source = open_source(path)
    copies, conversions = [], []
    for _ in range(repeats):
        copies.append(_copy(source, scratch / "copy"))
        conversions.append(_convert(source, scratch / "converted"))
    converting = _median(conversions, "seconds")
    largest_slice = _largest_slice(source)
    return {
        "command": "python -m convert.bench_convert SOURCE SCRATCH RESULT",
        "date": datetime.date.today().isoformat(),
        "hardware": {
            "cpu": _processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint", "tensorstore", "numpy")},
        "checkpoint": {
            "layout": source.layout,
            "layers": source.config.num_layers,
            "experts": source.config.num_experts,
            "bytes": source.num_bytes,
        },
        "cp": copies,
        "convert": conversions,
        "rate_of_cp": round(_median(copies, "seconds") / converting, 3),
        "rate_of_cp_flushed": round(_median(copies, "flushed_seconds") / converting, 3),
        "largest_slice_bytes": largest_slice,
        "peak_rss_bound_mib": round((1536 * _MIB + 2 * largest_slice) / _MIB, 1),
    }


def _copy(source: Source, copy: Path) -> dict[str, Any]:
    copy.mkdir(parents=True)
    dropped = _drop_caches()
    started = time.monotonic()
    subprocess.run(["cp", *map(str, source.folder.files), str(copy)], check=True)
    seconds = time.monotonic() - started
    for file in copy.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    flushed = time.monotonic() - started
    num_bytes = sum(file.stat().st_size for file in copy.iterdir())
    shutil.rmtree(copy)
    return _figures(num_bytes, seconds) | {"flushed_seconds": round(flushed, 2), "cold_caches": dropped}


def _convert(source: Source, destination: Path) -> dict[str, Any]:
    if destination.exists():
        shutil.rmtree(destination)
    dropped = _drop_caches()
    started = time.monotonic()
    child = subprocess.Popen([sys.executable, "-m", "convert", str(source.folder.path), str(destination)])
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, child.args)
    memory = {
        "peak_rss_mib": round(usage.ru_maxrss / 1024, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
    }
    return _figures(source.num_bytes, seconds) | memory | {"cold_caches": dropped}


def _figures(num_bytes: int, seconds: float) -> dict[str, Any]:
    return {"bytes": num_bytes, "seconds": round(seconds, 2), "mb_per_second": round(num_bytes / seconds / 1e6, 1)}


def _median(turns: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(turn[key] for turn in turns)


def _drop_caches() -> bool:
    """Write out and forget what the system caches of files; False where it needs rights we do not have."""
    os.sync()
    if not os.access(_DROP_CACHES, os.W_OK):
        return False
    _DROP_CACHES.write_text("3\n")
    return True


def _largest_slice(source: Source) -> int:
    return max(
        parameter.num_bytes // parameter.shape[0] * chunk_shape(parameter)[0]
        for tensor in source.tensors.values()
        for parameter in tensor.holds
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
