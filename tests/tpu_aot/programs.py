"""The programs: a decode step and a chunk of prefill of the published models, compiled for TPUs from shapes alone."""

import collections
import dataclasses
import re
import time
from typing import Any

from jax.sharding import Mesh

from gptoss_jax.config import ModelConfig, gpt_oss_20b, gpt_oss_120b
from gptoss_jax.plan.programs import (
    abstract_cache,
    abstract_model,
    estimated_seconds,
    lowered_decode,
    lowered_prefill,
)
from gptoss_jax.plan.topologies import find

MODELS = {"20b": gpt_oss_20b, "120b": gpt_oss_120b}
TOPOLOGIES = {
    "20b": {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"},
    "120b": {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4", "tpu7x": "tpu7x:2x2x1"},
}
"""Of at least as many devices as the experts are split over: a tpu7x chip is two."""
EXPERT_AXIS = {"20b": 4, "120b": 8}
GENERATIONS = tuple(TOPOLOGIES["20b"])
STEPS = ("decode", "prefill")
BATCH = 8
CONTEXT = 4096
CHUNK = 2048
_KERNEL = re.compile(r'custom_call_target="tpu_custom_call".*?op_name="(?:[^"]*/)?(\w+)/pallas_call"')


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program; bytes are of one device."""

    seconds: float
    argument_bytes: int
    temporary_bytes: int
    estimated_seconds: float
    """The compiler's own, of a dispatch with one decode step or one chunk; our kernels count as they say they cost."""
    kernels: dict[str, int]
    """Calls of each Pallas kernel, by name."""


def published(name: str, num_layers: int | None = None) -> ModelConfig:
    """A published model, or its first few layers."""
    config = MODELS[name]()
    return config if num_layers is None else config.first_layers(num_layers)


def tpu_mesh(topology: str, *, expert: int = 1) -> Mesh:
    """A mesh of chips that can be compiled for, and nothing else. Raises PlanError where libtpu is not installed."""
    return find(topology).mesh(expert=expert)


def lowered(step: str, config: ModelConfig, mesh: Mesh) -> Any:
    """The program of a step, lowered."""
    model = abstract_model(config, mesh, impl="tpu")
    batch, chunk = (1, CHUNK) if step == "prefill" else (BATCH, CHUNK // BATCH)
    cache = abstract_cache(model, batch=batch, max_length=CONTEXT, max_chunk=chunk)
    return lowered_prefill(model, cache, chunk) if step == "prefill" else lowered_decode(model, cache)


def compiled(step: str, config: ModelConfig, mesh: Mesh) -> tuple[Compiled, str]:
    """What the compiler says, and the optimized program's text."""
    began = time.monotonic()
    program = lowered(step, config, mesh).compile()
    seconds = time.monotonic() - began
    memory, text = program.memory_analysis(), program.as_text()
    figures = Compiled(
        seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        estimated_seconds=estimated_seconds(program),
        kernels=dict(sorted(collections.Counter(_KERNEL.findall(text)).items())),
    )
    return figures, text
