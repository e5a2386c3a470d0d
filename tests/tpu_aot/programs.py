"""The programs: a decode step and a chunk of prefill of the published models, compiled for TPUs from shapes alone."""

import collections
import dataclasses
import re
from collections.abc import Iterable
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
AXES = {"20b": {"expert": 4}, "120b": {"expert": 8}}
OTHER_AXES = {"tensor": {"expert": 4, "tensor": 2}, "data": {"data": 2, "expert": 2, "tensor": 2}}
"""More ways to split a model over eight devices."""
GENERATIONS = tuple(TOPOLOGIES["20b"])
STEPS = ("decode", "prefill")
BATCH = 8
CONTEXT = 4096
CHUNK = 2048
_COLLECTIVE = re.compile(
    r" = (.*?) ((?:all-reduce|all-gather|reduce-scatter|(?:ragged-)?all-to-all|collective-\w+)(?:-start)?)\("
)
_ARRAY = re.compile(r"\w+\[[\d,]*\]")
_KERNEL = re.compile(r'custom_call_target="tpu_custom_call".*?op_name="(?:[^"]*/)?(\w+)/pallas_call"')


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program; bytes are of one device."""

    argument_bytes: int
    temporary_bytes: int
    estimated_seconds: float
    """The compiler's own, of a dispatch with one decode step or one chunk; our kernels count as they say they cost."""
    kernels: dict[str, int]
    """Calls of each Pallas kernel, by name."""
    collectives: dict[str, int]
    """How many of each kind and result in the program's text, where a decode step's loop has its body once."""


def published(name: str, num_layers: int | None = None) -> ModelConfig:
    """A published model, or its first few layers."""
    config = MODELS[name]()
    return config if num_layers is None else config.first_layers(num_layers)


def tpu_mesh(topology: str, **axes: int) -> Mesh:
    """A mesh of chips that can be compiled for, and nothing else. Raises PlanError where libtpu is not installed."""
    return find(topology).mesh(**axes)


def lowered(step: str, config: ModelConfig, mesh: Mesh, *, chunk: int = CHUNK) -> Any:
    """The program of a step, lowered: a chunk of prefill has a row for each part of the data axis."""
    model = abstract_model(config, mesh, impl="tpu")
    batch = mesh.shape["data"] if step == "prefill" else BATCH
    num_tokens = (chunk if step == "prefill" else CHUNK) // batch
    cache = abstract_cache(model, batch=batch, max_length=CONTEXT, max_chunk=num_tokens)
    return lowered_prefill(model, cache, num_tokens) if step == "prefill" else lowered_decode(model, cache)


def compiled(step: str, config: ModelConfig, mesh: Mesh, *, chunk: int = CHUNK) -> Compiled:
    """What the compiler says."""
    program = lowered(step, config, mesh, chunk=chunk).compile()
    memory, text = program.memory_analysis(), program.as_text()
    return Compiled(
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        estimated_seconds=estimated_seconds(program),
        kernels=_counted(_KERNEL.findall(text)),
        collectives=collectives(text),
    )


def collectives(text: str) -> dict[str, int]:
    """How many of each kind and result there are in the text of an optimized program."""
    return _counted(f"{kind} {'+'.join(_ARRAY.findall(result))}" for result, kind in _COLLECTIVE.findall(text))


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(collections.Counter(names).items()))
