"""Time converting a checkpoint against `cp` of the same files, in turns on the same disk, and write the figures.

    python -m convert.synthetic SOURCE --model 20b --shards 3
    python -m convert.bench_convert SOURCE SCRATCH RESULT.json --mesh expert=2

`cp` leaves part of what it wrote in memory; the conversion returns when all is on the disk. So `cp` is timed twice, up
to its return and up to the flush of its files. SCRATCH/copy and SCRATCH/converted are replaced; the second keeps the
last conversion, which is verified against SOURCE and, with --mesh, restored onto those devices. Each step starts with
cold caches where the system lets us drop them. RESULT is written after each step, and those it holds are not taken
again: a run that was cut short goes on.
"""

import argparse
import collections
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from convert.cli import run_guarded
from convert.source import Source, open_source
from gptoss_jax.bench.report import commit
from gptoss_jax.errors import ConversionError
from gptoss_jax.manifest import chunk_shape, partial_directory
from gptoss_jax.sharding import parse_axes

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_RESTORE = "restore "
"""Before a mesh: the step's name."""
_MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m convert.bench_convert")
    parser.add_argument("source", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--repeats", type=int, default=2, help="turns of cp and of converting (default: %(default)s)")
    parser.add_argument("--mesh", metavar="AXES", help="restore onto these devices too, as in expert=2")
    parser.add_argument("--conditions", default="", help="what else the machine was doing, for the record")
    sys.exit(run_guarded(_run, parser.parse_args()))


def _run(options: argparse.Namespace) -> int:
    measure(
        options.source,
        options.scratch,
        options.result,
        repeats=options.repeats,
        mesh=options.mesh,
        conditions=options.conditions,
    )
    return 0


def measure(
    path: Path, scratch: Path, result: Path, *, repeats: int = 2, mesh: str | None = None, conditions: str = ""
) -> None:
    """Take the steps that `result` does not hold yet, and write it after each.

    Raises ConversionError if it is of another checkpoint, machine or version, if the conversion that it is of is gone,
    if `path` is where a copy or a conversion goes, or if a step fails; ShardingError for a mesh that is none.
    """
    if repeats < 1:
        raise ConversionError(f"{repeats} turns", where="--repeats", fix="take at least one")
    if not result.resolve().parent.is_dir():
        raise ConversionError("no such folder", where=str(result.parent), fix="make it first")
    if mesh is not None:
        parse_axes(mesh)
    source = open_source(path)
    copy, converted = scratch / "copy", scratch / "converted"
    for folder in (copy, converted, partial_directory(converted)):
        if source.folder.path.resolve().is_relative_to(folder.resolve()):
            raise ConversionError("the source would be replaced", where=str(folder), fix="name another scratch folder")
    figures = _surroundings(source, scratch)
    if result.exists():
        figures = _kept(result, figures)
        if len(figures.get("convert", [])) >= repeats and not converted.exists():
            raise ConversionError("the conversion that was timed is gone", where=str(converted), fix="name a new file")
    figures["command"] = f"python -m convert.bench_convert SOURCE SCRATCH RESULT --repeats {repeats}" + (
        f" --mesh {mesh}" if mesh else ""
    )
    circumstances = {"date": datetime.date.today().isoformat(), "commit": commit(), "conditions": conditions}
    steps: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("cp", lambda: _copy(source, copy)),
        ("convert", lambda: _convert(source, converted)),
    ] * repeats
    steps.append(("verify", lambda: _verify(source, converted)))
    if mesh is not None:
        steps.append((f"{_RESTORE}{mesh}", lambda: _restore(converted, mesh)))
    taken = collections.Counter[str]()
    for name, take in steps:
        taken[name] += 1
        if len(figures.get(name, [])) >= taken[name]:
            sys.stdout.write(f"{name}: in {result.name} already\n")
            continue
        turn = take() | circumstances
        if name == "convert":  # of the one before it
            figures = {key: value for key, value in figures.items() if not key.startswith(("verify", _RESTORE))}
        figures[name] = [*figures.get(name, []), turn]
        _replace(result, json.dumps(figures | _against_cp(figures), indent=2) + "\n")
        sys.stdout.write(f"{name}: {json.dumps(turn)}\n")
        sys.stdout.flush()


def _kept(result: Path, figures: dict[str, Any]) -> dict[str, Any]:
    """The figures in `result`, if they are of what `figures` are of."""
    try:
        kept = json.loads(result.read_text())
        differs = [key for key in ("checkpoint", "hardware", "versions") if kept[key] != figures[key]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError("no figures of a conversion", where=str(result), fix="name a new file") from error
    if differs:
        what = " and ".join(differs)
        raise ConversionError(f"figures of another {what}", where=str(result), fix="name a new file")
    return kept


def _replace(file: Path, text: str) -> None:
    """Write all of it, or nothing."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text)
    partial.replace(file)


def _surroundings(source: Source, scratch: Path) -> dict[str, Any]:
    largest_slice = _largest_slice(source)
    scratch.mkdir(parents=True, exist_ok=True)
    return {
        "hardware": {
            "cpu": _processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
            "source_on": _file_system(source.folder.path),
            "scratch_on": _file_system(scratch),
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint", "tensorstore", "numpy")},
        "checkpoint": {
            "layout": source.layout,
            "layers": source.config.num_layers,
            "experts": source.config.num_experts,
            "bytes": source.num_bytes,
        },
        "largest_slice_bytes": largest_slice,
        "peak_rss_bound_mib": round((1536 * _MIB + 2 * largest_slice) / _MIB, 1),
    }


def _against_cp(figures: dict[str, Any]) -> dict[str, float]:
    """The ratio of the median rates, once there are two."""
    if not figures.get("convert"):
        return {}
    converting = _median(figures["convert"], "seconds")
    return {
        "rate_of_cp": round(_median(figures["cp"], "seconds") / converting, 3),
        "rate_of_cp_flushed": round(_median(figures["cp"], "flushed_seconds") / converting, 3),
    }


def _copy(source: Source, copy: Path) -> dict[str, Any]:
    _remove(copy)
    copy.mkdir()
    cold = _drop_caches([source.folder.path])
    started = time.monotonic()
    code = subprocess.run(["cp", *map(str, source.folder.files), str(copy)], check=False).returncode
    seconds = time.monotonic() - started
    _check_ended(code, "cp")
    for file in copy.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    flushed = time.monotonic() - started
    num_bytes = sum(file.stat().st_size for file in copy.iterdir())
    _remove(copy)
    return _figures(num_bytes, seconds) | {"flushed_seconds": round(flushed, 2), "cold_caches": cold}


def _convert(source: Source, destination: Path) -> dict[str, Any]:
    _remove(destination)
    _remove(partial_directory(destination))
    usage, _ = _child("convert", str(source.folder.path), str(destination), reads=[source.folder.path])
    return _figures(source.num_bytes, usage["seconds"]) | usage


def _verify(source: Source, converted: Path) -> dict[str, Any]:
    reads = [converted, source.folder.path]
    usage, _ = _child("gptoss_jax.cli", "verify", *map(str, reads), reads=reads)
    return _figures(source.num_bytes, usage["seconds"]) | usage


def _restore(converted: Path, mesh: str) -> dict[str, Any]:
    usage, said = _child("convert.bench_restore", str(converted), "--mesh", mesh, reads=[converted])
    return {"process_seconds": usage.pop("seconds")} | usage | json.loads(said)


def _child(module: str, *arguments: str, reads: Sequence[Path]) -> tuple[dict[str, Any], str]:
    """Run a module with cold caches; its time and memory, and what it wrote to the standard output."""
    cold = _drop_caches(reads)
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=output)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - started
        output.seek(0)
        said = output.read()
    child.returncode = os.waitstatus_to_exitcode(status)
    _check_ended(child.returncode, f"python -m {module}")
    return {
        "seconds": round(seconds, 2),
        "peak_rss_mib": round(usage.ru_maxrss / 1024, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "cold_caches": cold,
    }, said


def _check_ended(code: int, command: str) -> None:
    if code:
        raise ConversionError(f"it ended with {code}", where=command, fix="see what it said above, and run this again")


def _figures(num_bytes: int, seconds: float) -> dict[str, Any]:
    return {"bytes": num_bytes, "seconds": round(seconds, 2), "mb_per_second": round(num_bytes / seconds / 1e6, 1)}


def _median(turns: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(turn[key] for turn in turns)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _drop_caches(reads: Sequence[Path]) -> bool:
    """Write out and forget what the system caches of files. Whether reading these will be reading from a disk: not
    where it needs rights we do not have, nor what lies in memory."""
    os.sync()
    if not os.access(_DROP_CACHES, os.W_OK):
        return False
    _DROP_CACHES.write_text("3\n")
    return all(_file_system(path) != "tmpfs" for path in reads)


def _largest_slice(source: Source) -> int:
    return max(
        parameter.num_bytes // parameter.shape[0] * chunk_shape(parameter)[0]
        for tensor in source.tensors.values()
        for parameter in tensor.holds
    )


def _file_system(path: Path) -> str:
    """Its type; what is on tmpfs is in memory."""
    return subprocess.run(
        ["stat", "-f", "-c", "%T", str(path)], check=True, capture_output=True, text=True
    ).stdout.strip()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
