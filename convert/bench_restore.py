"""Restore a converted checkpoint once, in a process of its own, and write its figures as a line of JSON.

    python -m convert.bench_restore CKPT --mesh expert=2

It takes the steps of `gptoss_jax.load`, and times the restore by itself; bench_convert.py runs it with cold caches.
"""

import argparse
import collections
import json
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from convert.cli import run_guarded
from gptoss_jax.checkpoint import restore
from gptoss_jax.compilation import enable_cache
from gptoss_jax.config import ModelConfig
from gptoss_jax.manifest import CONFIG, read_manifest
from gptoss_jax.model.transformer import abstract, fill, leaves, prepare
from gptoss_jax.sharding import make_mesh, parse_axes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m convert.bench_restore")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--mesh", required=True, metavar="AXES")
    sys.exit(run_guarded(_run, parser.parse_args()))


def _run(options: argparse.Namespace) -> int:
    sys.stdout.write(json.dumps(measure(options.checkpoint, parse_axes(options.mesh))) + "\n")
    return 0


def measure(directory: Path, axes: Mapping[str, int]) -> dict[str, Any]:
    """Seconds from disk to devices, and until the model can run; peak resident memory before and after restoring."""
    read_manifest(directory)
    mesh = make_mesh(**axes, devices=None)
    enable_cache()
    resident = _peak_rss_mib()
    started = time.monotonic()
    model = abstract(ModelConfig.read(directory / CONFIG), mesh=mesh)
    described = time.monotonic()
    arrays = jax.block_until_ready(restore(directory, leaves(model)))
    restored = time.monotonic()
    num_bytes = sum(array.nbytes for array in arrays.values())
    figures = {
        "device": mesh.devices.flat[0].device_kind,
        "bytes": num_bytes,
        "bytes_of_each_device": _bytes_of_each_device(arrays.values()),
        "seconds": round(restored - described, 2),
        "mb_per_second": round(num_bytes / (restored - described) / 1e6, 1),
        "rss_before_mib": resident,
        "rss_restored_mib": _peak_rss_mib(),
    }
    ready = jax.block_until_ready(prepare(fill(model, arrays)))
    in_use = [(device.memory_stats() or {}).get("bytes_in_use") for device in ready.mesh.devices.flat]
    return figures | {"ready_seconds": round(time.monotonic() - started, 2), "in_use_of_each_device": in_use}


def _bytes_of_each_device(arrays: Iterable[jax.Array]) -> list[int]:
    sums = collections.Counter[int]()
    for array in arrays:
        for shard in array.addressable_shards:
            sums[shard.device.id] += shard.data.nbytes
    return [sums[device] for device in sorted(sums)]


def _peak_rss_mib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


if __name__ == "__main__":
    main()
