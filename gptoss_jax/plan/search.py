"""Which mesh is best for a batch and a context: every one that divides, compiled with few layers, the rest linear."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from gptoss_jax.bench.roofline import Number
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import PlanError, ShardingError
from gptoss_jax.plan.collectives import sending_seconds
from gptoss_jax.plan.points import Planner, Point, Step
from gptoss_jax.plan.report import described, mesh_text, rows_text
from gptoss_jax.plan.topologies import Topology

_DEPTHS = (2, 4)  # each time as many sliding layers as full ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One mesh. All is of the model's full depth; what is not weights or cache is foreseen from shallow programs."""

    axes: dict[str, int]
    fits: bool
    needed: int
    """Bytes of one device; of a mesh whose weights and cache are too large, these alone."""
    decode_ms: float | None = None
    """As the compiler estimates; where it does not, the floor and the collectives' time. None where nothing fits."""
    prefill_ms: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Meshes over all devices of a topology, the best one first; `str` of it is a page."""

    topology: Topology
    batch: int
    context: int
    is_estimated: bool
    """Whether the times are the compiler's."""
    candidates: list[Candidate]
    depths: tuple[int, ...]
    """How many layers were compiled; to the model's own number all is on a line."""

    def to_json(self) -> dict[str, Any]:
        """For programs: the same figures."""
        return {
            **described(self.topology),
            "batch": self.batch,
            "context": self.context,
            "compiled_layers": self.depths,
            "is_estimated": self.is_estimated,
            "meshes": [dataclasses.asdict(candidate) for candidate in self.candidates],
        }

    def __str__(self) -> str:
        source = "the compiler's estimate" if self.is_estimated else "floor and collectives"
        lines = [
            f"{self.topology.name} ({self.topology.chip.name}): {rows_text(self.batch)} of {self.context:,} tokens",
            f"compiled with {' and '.join(map(str, self.depths))} layers, all else linear; ms by {source}",
            "",
            f"  {'mesh':<28} {'GB needed':>10} {'decode ms':>10} {'tokens/s':>10} {'prefill ms':>11}",
        ]
        for candidate in self.candidates:
            line = f"  {mesh_text(candidate.axes):<28} {candidate.needed / 1e9:10.2f}"
            if candidate.decode_ms is None or candidate.prefill_ms is None:
                lines.append(f"{line}  does not fit")
                continue
            rate = 1e3 * self.batch / candidate.decode_ms
            fits = "" if candidate.fits else "  does not fit"
            lines.append(f"{line} {candidate.decode_ms:10.2f} {rate:10,.0f} {candidate.prefill_ms:11.2f}{fits}")
        return "\n".join(lines)


def search(
    config: ModelConfig,
    topology: Topology,
    *,
    batch: int,
    context: int,
    progress: Callable[[str], None] = lambda line: None,
) -> Search:
    """Try every mesh over all of the topology's devices. Raises PlanError if none divides the model and the batch."""
    candidates = []
    for axes in meshes(len(topology.devices)):
        try:
            candidates.append(_candidate(config, topology, axes, batch=batch, context=context, progress=progress))
        except ShardingError:  # does not divide
            continue
    if not candidates:
        raise PlanError(
            f"no mesh of {len(topology.devices)} devices divides the model and {batch} rows",
            where=topology.name,
            fix="choose another batch, or a topology with fewer devices",
        )
    candidates.sort(key=lambda candidate: (not candidate.fits, candidate.decode_ms or 0, candidate.needed))
    return Search(
        topology=topology,
        batch=batch,
        context=context,
        is_estimated=topology.chip.platform == "tpu",
        candidates=candidates,
        depths=_depths(config),
    )


def meshes(num_devices: int) -> Iterator[dict[str, int]]:
    """Every way to share the devices out over the axes.

    Example:
        >>> len(list(meshes(8)))
        10
    """
    divisors = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    for data in divisors:
        for expert in divisors:
            if num_devices % (data * expert) == 0:
                yield {"data": data, "expert": expert, "tensor": num_devices // (data * expert)}


def _depths(config: ModelConfig) -> tuple[int, ...]:
    return _DEPTHS if config.num_layers > _DEPTHS[-1] else (config.num_layers,)


def _candidate(
    config: ModelConfig,
    topology: Topology,
    axes: dict[str, int],
    *,
    batch: int,
    context: int,
    progress: Callable[[str], None],
) -> Candidate:
    mesh = topology.mesh(**axes)
    whole = Planner(config, topology, mesh)
    cache, held = whole.cache(batch=batch, context=context), whole.held(batch=batch, context=context)
    if held > topology.memory_bytes:
        return Candidate(axes=axes, fits=False, needed=held)
    progress(mesh_text(axes))
    depths = _depths(config)
    points = [
        Planner(config.first_layers(depth), topology, mesh, progress=progress).point(
            batch=batch, context=context, max_chunk=cache.max_chunk
        )
        for depth in depths
    ]
    if not all(point.steps for point in points):
        return Candidate(axes=axes, fits=False, needed=held)

    def extended(figure: Callable[[Point], Number]) -> Number:
        first, last = figure(points[0]), figure(points[-1])
        missing = (config.num_layers - depths[-1]) / max(1, depths[-1] - depths[0])
        return last + (last - first) * missing

    needed = round(extended(lambda point: point.needed))
    return Candidate(
        axes=axes,
        fits=needed <= topology.memory_bytes,
        needed=needed,
        decode_ms=1e3 * extended(lambda point: _seconds(topology, point.steps["decode"], mesh.size)),
        prefill_ms=1e3 * extended(lambda point: _seconds(topology, point.steps["prefill"], mesh.size)),
    )


def _seconds(topology: Topology, step: Step, num_devices: int) -> float:
    if step.estimated_seconds is not None:
        return step.estimated_seconds
    return topology.ceilings.floor_ms(step.floor) / 1e3 + sending_seconds(step.collectives, topology.chip, num_devices)
