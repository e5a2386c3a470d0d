"""What a plan says, as a page and as one object."""

import dataclasses
from typing import Any

from gptoss_jax.plan.collectives import Collective
from gptoss_jax.plan.largest import Largest, largest_batch, largest_context
from gptoss_jax.plan.points import Planner, Point, Step, StepName
from gptoss_jax.plan.topologies import Topology

_GB = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A model on a mesh; `str` of it is a page."""

    topology: Topology
    axes: dict[str, int]
    point: Point
    batch: Largest
    context: Largest

    @classmethod
    def of(cls, planner: Planner, *, batch: int, context: int) -> "Plan":
        """Compile for this batch and context, then for the largest of each that fit beside the other."""
        point = planner.point(batch=batch, context=context)
        return cls(
            topology=planner.topology,
            axes=dict(planner.mesh.shape),
            point=point,
            batch=largest_batch(planner, context=context, known=[point]),
            context=largest_context(planner, batch=batch, known=[point]),
        )

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of one device, by what they are for. Where nothing was compiled, what programs take is missing."""
        point, limit = self.point, self.topology.memory_bytes
        usages = [step.usage for step in point.steps.values()]
        taken = {}
        if usages:
            hungrier = max(usages, key=lambda usage: usage.passing)
            taken = {
                "temporary": hungrier.temporaries,
                "other": hungrier.passing - hungrier.temporaries,
                "code": sum(usage.code for usage in usages),
            }
        return {
            "limit": limit,
            "weights": point.weights,
            "cache": point.cache,
            **taken,
            "needed": point.needed,
            "headroom": limit - point.needed,
        }

    def to_json(self) -> dict[str, Any]:
        """For programs: the same figures."""
        point = self.point
        return {
            **described(self.topology),
            "mesh": self.axes,
            "batch": point.batch,
            "context": point.context,
            "chunk": point.chunk,
            "memory": {f"{name}_bytes": size for name, size in self.memory.items()},
            "fits": point.fits(self.topology.memory_bytes),
            "refusal": point.refusal,
            **{name: self._step_json(name, step) for name, step in point.steps.items()},
            "largest_batch": dataclasses.asdict(self.batch),
            "largest_context": dataclasses.asdict(self.context),
        }

    def _step_json(self, name: StepName, step: Step) -> dict[str, Any]:
        return {
            "argument_bytes": step.usage.arguments,
            "temporary_bytes": step.usage.temporaries,
            "floor_bytes": step.floor.bytes,
            "floor_flops": step.floor.flops,
            "floor_ms": self.topology.ceilings.floor_ms(step.floor),
            "estimated_ms": None if step.estimated_seconds is None else 1e3 * step.estimated_seconds,
            "collectives": [dataclasses.asdict(collective) for collective in step.collectives],
            "compile_s": step.compile_seconds,
        }

    def __str__(self) -> str:
        point = self.point
        lines = [
            f"{self.topology.name} ({self.topology.chip.name}): {mesh_text(self.axes)}",
            f"{rows_text(point.batch)} of {point.context:,} tokens; prompts are read {point.chunk:,} of each at a time",
            "",
            *self._memory_lines(),
            "",
            f"largest batch for {point.context:,} tokens    {_largest(self.batch)}",
            f"largest context for {rows_text(point.batch)}    {_largest(self.context)}",
        ]
        if point.steps:
            lines += ["", *self._time_lines(point.steps)]
            for name, step in point.steps.items():
                lines += ["", *_collective_lines(name, step.collectives)]
        return "\n".join(lines)

    def _memory_lines(self) -> list[str]:
        chip = self.topology.chip
        share = f" of {chip.memory_bytes / _GB:.1f} (XLA_CLIENT_MEM_FRACTION)" if chip.platform == "cuda" else ""
        notes = {"limit": f"JAX may take this{share}", "other": "ids, logits, settings", "code": "both programs"}
        rows = [
            f"  {name:<12} {size / _GB:10.3f}  {notes.get(name, '')}".rstrip() for name, size in self.memory.items()
        ]
        verdict = "fits" if self.point.fits(self.topology.memory_bytes) else "DOES NOT FIT"
        why = f": {self.point.refusal}" if self.point.refusal else ""
        return ["memory of one device, GB", *rows, f"  {verdict}{why}"]

    def _time_lines(self, steps: dict[StepName, Step]) -> list[str]:
        lines = ["time, ms              floor    compiler's estimate"]
        for name, step in steps.items():
            floor = self.topology.ceilings.floor_ms(step.floor)
            estimate = "none" if step.estimated_seconds is None else f"{1e3 * step.estimated_seconds:.2f}"
            lines.append(f"  {_TITLES[name]:<16} {floor:9.2f}    {estimate}")
        return lines


_TITLES = {"decode": "decode step", "prefill": "prefill chunk"}


def mesh_text(axes: dict[str, int]) -> str:
    """`data=1 expert=8 tensor=1`."""
    return " ".join(f"{axis}={size}" for axis, size in axes.items())


def rows_text(batch: int) -> str:
    """`1 row`, `1,024 rows`."""
    return f"{batch:,} row{'s' if batch > 1 else ''}"


def described(topology: Topology) -> dict[str, Any]:
    """The devices, for programs."""
    ceilings = topology.ceilings
    return {
        "topology": topology.name,
        "device": topology.chip.name,
        "devices": len(topology.devices),
        "read_bytes_per_s": ceilings.read_bytes_per_s,
        "dense_flops_per_s": ceilings.dense_flops_per_s,
    }


def _largest(found: Largest) -> str:
    if found.value == 0:
        return "none fits"
    bound = ", the most that is considered" if found.is_bound else ""
    return f"{found.value:,}{bound}: {found.needed / _GB:.2f} GB, compiled"


def _collective_lines(name: StepName, collectives: list[Collective]) -> list[str]:
    if not collectives:
        return [f"collectives of one {_TITLES[name]}: none"]
    total = sum(collective.count * collective.bytes for collective in collectives)
    count = sum(collective.count for collective in collectives)
    lines = [f"collectives of one {_TITLES[name]}: {count}, {total / 1e6:,.2f} MB on each device"]
    for collective in collectives:
        layers = f"{collective.per_layer} a layer" if collective.per_layer else "outside of the layers"
        lines.append(f"  {collective.count:>4} {collective.kind:<20} {collective.bytes:>14,} B    {layers}")
    return lines
