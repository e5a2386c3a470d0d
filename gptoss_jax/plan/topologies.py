"""The devices that a plan is for, by name: TPUs and GPUs that need not be there, those present, or CPU devices."""

import dataclasses
import functools
import importlib.util
import os
import threading
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from gptoss_jax.bench.roofline import Ceilings
from gptoss_jax.bench.timing import ceilings
from gptoss_jax.errors import PlanError
from gptoss_jax.plan.chips import GPUS, NUM_GPUS, SLICES, TPUS, Chip, Platform, gpu_target
from gptoss_jax.sharding import make_mesh

PRESENT = "present"
"""The name of the devices that JAX finds."""
MOST_CPUS = 256
_MEMORY_SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_DEFAULT_SHARE = 0.75  # JAX's own
_CPU_NAMES = f"cpu:1 to cpu:{MOST_CPUS}"
_LIBTPU = threading.Lock()  # JAX loads it at the first use, and of two threads that load it one fails


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices of one kind that a program can be compiled for."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    memory_bytes: int
    """What JAX may take of each device."""

    @functools.cached_property
    def ceilings(self) -> Ceilings:
        """The rates of one device, as known, or else measured now as the benchmark does."""
        return self.chip.ceilings or ceilings()

    def mesh(self, *, data: int = 1, expert: int = 1, tensor: int = 1) -> Mesh:
        """A mesh over the first of the devices. Raises ShardingError if there are too few."""
        return make_mesh(data=data, expert=expert, tensor=tensor, devices=self.devices)


def names() -> list[str]:
    """Every name that `find` knows, the last one with a number of your choice in it."""
    slices = [f"{generation}:{shape}" for generation, shapes in SLICES.items() for shape in shapes]
    return [PRESENT, *slices, *(f"{gpu}:{count}" for gpu in GPUS for count in NUM_GPUS), _CPU_NAMES]


def find(name: str) -> Topology:
    """The topology called `name`.

    Raises PlanError, with the names that exist, for another one; and where no compiler for it is installed, or too few
    CPU devices were asked of JAX.

    Example:
        >>> find("cpu:1").mesh().size
        1
    """
    kind, _, rest = name.partition(":")
    if name == PRESENT:
        return _present()
    if kind == "cpu" and rest.isdecimal() and 1 <= int(rest) <= MOST_CPUS:
        return _cpus(int(rest))
    if name not in names():
        raise PlanError(f"no topology {name!r}", where="--topology", fix=f"choose of {', '.join(names())}")
    return _tpu_slice(kind, rest) if kind in TPUS else _gpus(kind, int(rest))


def _tpu_slice(generation: str, shape: str) -> Topology:
    name, chip = f"{generation}:{shape}", TPUS[generation]
    _need("libtpu", name, "TPUs", "tpu")
    # libtpu takes these from nowhere else. No TPU is asked for, so none need be looked for, and other processes may
    # compile at the same time.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    host = {"chips_per_host_bounds": (1, 1, 1)} if shape == "1x1" else {}
    with _LIBTPU:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **host)
    return Topology(name=name, chip=chip, devices=tuple(described.devices), memory_bytes=chip.memory_bytes)


def _gpus(kind: str, count: int) -> Topology:
    name, chip = f"{kind}:{count}", GPUS[kind]
    _need("jax_cuda13_plugin", name, "NVIDIA GPUs", "cuda")
    jax.devices()  # registers the plugin's compiler
    described = topologies.get_topology_desc("", "cuda", topology=f"1x1x{count}", target_config=gpu_target(chip))
    return Topology(
        name=name,
        chip=chip,
        devices=tuple(described.devices),
        memory_bytes=int(chip.memory_bytes * memory_share()),
    )


def _present() -> Topology:
    """What JAX finds, held to what it may take of it."""
    devices = tuple(jax.devices())
    first = devices[0]
    if first.platform == "cpu":
        return _cpus(len(devices))
    limit = (first.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        raise PlanError(f"{first.device_kind} does not say how much memory it has", where="the device", fix="name it")
    known = next((chip for chip in (*GPUS.values(), *TPUS.values()) if chip.name == first.device_kind), None)
    chip = known or _unlisted(first.device_kind, "tpu" if first.platform == "tpu" else "cuda", limit)
    return Topology(name=PRESENT, chip=chip, devices=devices, memory_bytes=limit)


def _cpus(count: int) -> Topology:
    """CPU devices share the machine's memory evenly."""
    devices = tuple(jax.devices("cpu"))
    if count > len(devices):
        raise PlanError(
            f"cpu:{count} needs {count} CPU devices",
            where=f"{len(devices)} present",
            fix="set jax_num_cpu_devices, as the command does, before JAX starts",
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // count
    return Topology(
        name=f"cpu:{count}", chip=_unlisted("CPU", "cpu", memory), devices=devices[:count], memory_bytes=memory
    )


def memory_share() -> float:
    """The share of a GPU's memory that JAX takes: what its own variable says."""
    chosen = next((os.environ[name] for name in _MEMORY_SHARES if os.environ.get(name)), None)
    try:
        share = _DEFAULT_SHARE if chosen is None else float(chosen)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise PlanError(f"{chosen!r} is no share of the memory", where=_MEMORY_SHARES[0], fix="set it to 0.9, say")
    return share


def _unlisted(name: str, platform: Platform, memory_bytes: int) -> Chip:
    """A device of no table."""
    return Chip(
        name=name,
        platform=platform,
        memory_bytes=memory_bytes,
        ceilings=None,
        link_bytes_per_s=None,
        collective_s=None,
    )


def _need(module: str, name: str, what: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise PlanError(
            f"no compiler for {what}", where=name, fix=f"install the extra `{extra}`: pip install 'gptoss-jax[{extra}]'"
        )
