"""Both programs of one batch and context, compiled: what they need, send, and would take."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable
from typing import Literal

import jax
from jax.sharding import Mesh
from jax.stages import Compiled

from gptoss_jax.bench.roofline import Work
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import out_of_memory
from gptoss_jax.generation.generate import cache_room, chunk_size, prefill_chunk
from gptoss_jax.model.cache import Cache
from gptoss_jax.plan.collectives import Collective, program_collectives, step_collectives
from gptoss_jax.plan.floor import decode_floor, prefill_floor
from gptoss_jax.plan.memory import Usage, shard_bytes
from gptoss_jax.plan.programs import abstract_cache, abstract_model, estimated_seconds, lowered_decode, lowered_prefill
from gptoss_jax.plan.topologies import Topology
from gptoss_jax.sharding import check_batch

StepName = Literal["decode", "prefill"]
_MOST_ESTIMATED_MS = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A decode step, or a chunk of prefill."""

    usage: Usage
    floor: Work
    """One device's part of what no program can leave out."""
    estimated_seconds: float | None
    """The compiler's own; None from a compiler that estimates nothing."""
    collectives: list[Collective]
    compile_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A batch and a context, and what one device needs for them."""

    batch: int
    context: int
    """Tokens that each row may come to hold."""
    chunk: int
    """Tokens of each row that are read at a time."""
    weights: int
    cache: int
    steps: dict[StepName, Step]
    """Empty where weights and cache alone are too large, or the compiler refused the programs."""
    refusal: str | None = None
    """Why there are none."""

    @property
    def needed(self) -> int:
        """Bytes in all: what is always there, both programs, and what the hungrier one takes while it runs.

        Without programs, the bytes of weights and cache: it needs more than that.
        """
        usages = [step.usage for step in self.steps.values()]
        programs = sum(usage.code for usage in usages) + max((usage.passing for usage in usages), default=0)
        return self.weights + self.cache + programs

    def fits(self, memory_bytes: int) -> bool:
        """Whether it was compiled, and `memory_bytes` are enough."""
        return self.refusal is None and self.needed <= memory_bytes


class Planner:
    """Compiles for one model on one mesh.

    Raises ShardingError if the mesh does not divide the model.

    Example:
        >>> from gptoss_jax.plan.topologies import find
        >>> from gptoss_jax.config import gpt_oss_20b
        >>> topology = find("cpu:1")
        >>> planner = Planner(gpt_oss_20b(), topology, topology.mesh())
        >>> round(planner.weights / 1e9, 1), round(planner.cache(batch=1, context=8192).nbytes / 1e9, 2)
        (13.8, 0.22)
    """

    def __init__(
        self,
        config: ModelConfig,
        topology: Topology,
        mesh: Mesh,
        *,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.config, self.topology, self.mesh = config, topology, mesh
        self._progress = progress
        self._model = abstract_model(config, mesh)
        self.weights = shard_bytes(self._model)
        """Bytes of one device, without what a TPU fills up."""

    def cache(self, *, batch: int, context: int, max_chunk: int | None = None) -> Cache:
        """The abstract cache that `generate` would make, unless `max_chunk` says how much of a row is read at a time.

        Raises ShardingError if the rows do not divide.
        """
        check_batch(batch, self.mesh)
        if max_chunk is None:
            max_chunk = prefill_chunk(self._model, batch, limit=self.topology.memory_bytes)
        return abstract_cache(
            self._model,
            batch=batch,
            max_length=cache_room(context, self.config.max_context),
            max_chunk=max_chunk,
        )

    def held(self, *, batch: int, context: int) -> int:
        """Bytes of weights and cache on one device, exactly but for what a TPU fills up."""
        return self.weights + shard_bytes(self.cache(batch=batch, context=context))

    def point(self, *, batch: int, context: int, max_chunk: int | None = None) -> Point:
        """Compile both programs, unless weights and cache alone are too large."""
        cache = self.cache(batch=batch, context=context, max_chunk=max_chunk)
        chunk = chunk_size(context, cache.max_chunk)
        without = Point(
            batch=batch, context=context, chunk=chunk, weights=self.weights, cache=shard_bytes(cache), steps={}
        )
        if without.needed > self.topology.memory_bytes:
            return dataclasses.replace(without, refusal="weights and cache alone are larger")
        self._progress(f"compiling {self.config.num_layers} layers: {batch} rows of {context} tokens")
        # Traced one after the other, compiled at once: XLA leaves some of its time to other threads.
        lowered: dict[StepName, jax.stages.Lowered] = {
            "decode": lowered_decode(self._model, cache),
            "prefill": lowered_prefill(self._model, cache, chunk),
        }
        floors = {
            "decode": decode_floor(self.config, self.mesh, batch=batch, context=context),
            "prefill": prefill_floor(self.config, self.mesh, batch=batch, num_tokens=chunk),
        }
        try:
            with concurrent.futures.ThreadPoolExecutor() as pool:
                compiled = dict(zip(lowered, pool.map(_timed, lowered.values()), strict=True))
        except jax.errors.JaxRuntimeError as error:
            refusal = out_of_memory(error)
            if refusal is None:
                raise
            return dataclasses.replace(without, refusal=refusal)
        steps: dict[StepName, Step] = {
            name: Step(
                usage=Usage.of(program, self._model, cache),
                floor=floors[name],
                estimated_seconds=self._estimated_seconds(program, floors[name]),
                collectives=_READ[name](program.as_text() or "", self.config.num_layers),
                compile_seconds=seconds,
            )
            for name, (program, seconds) in compiled.items()
        }
        usage = steps["decode"].usage  # padded as the programs have it
        return dataclasses.replace(without, weights=usage.weights, cache=usage.cache, steps=steps)

    def _estimated_seconds(self, program: Compiled, floor: Work) -> float | None:
        """The compiler's estimate, which is known but for whole seconds; None where there is none."""
        known = self.topology.chip.platform == "tpu" and self.topology.ceilings.floor_ms(floor) < _MOST_ESTIMATED_MS
        return estimated_seconds(program) if known else None


_READ = {"decode": step_collectives, "prefill": program_collectives}


def _timed(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
    began = time.perf_counter()
    return lowered.compile(), time.perf_counter() - began
