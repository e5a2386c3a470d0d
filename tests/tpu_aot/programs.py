"""The programs: a decode step and a chunk of prefill of the published models, compiled for TPUs from shapes alone."""

import collections
import dataclasses
import importlib.util
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.config import ModelConfig, gpt_oss_20b, gpt_oss_120b
from gptoss_jax.generation.sampling import Sampling, SamplingRows
from gptoss_jax.generation.steps import decode, prefill, start
from gptoss_jax.model.cache import Cache
from gptoss_jax.model.transformer import Transformer, abstract, ambient_mesh, fill, leaves, prepare
from gptoss_jax.sharding import make_mesh

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
    kinds = config.layer_kinds[:num_layers]
    return dataclasses.replace(config, num_layers=len(kinds), layer_kinds=kinds)


def tpu_mesh(topology: str, *, expert: int = 1) -> Mesh:
    """A mesh of chips that can be compiled for, and nothing else.

    Raises RuntimeError, naming the extra, where libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError("no compiler for TPUs: install the extra `tpu` (pip install -e '.[tpu]'), or run `make aot`")
    # No TPU is asked for, so none need be looked for, and other processes may compile at the same time.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return make_mesh(devices=described.devices, expert=expert)


def lowered(step: str, config: ModelConfig, mesh: Mesh) -> Any:
    """The program of a step, lowered."""
    model = _model(config, mesh)
    if step == "prefill":
        cache = _cache(config, mesh, batch=1, chunk=CHUNK)
        return prefill.lower(model, cache, _array(mesh, (1, CHUNK), jnp.int32, "data"), _rows(mesh, 1))
    cache = _cache(config, mesh, batch=BATCH, chunk=CHUNK // BATCH)
    stop_ids = _array(mesh, (2,), jnp.int32)
    logits = _array(mesh, (BATCH, config.vocab_size), jnp.float32)
    settings = jax.tree.map(
        lambda leaf: _array(mesh, leaf.shape, leaf.dtype, "data"), SamplingRows.of([Sampling(seed=0)] * BATCH)
    )
    rows, _ = start.eval_shape(model, logits, _rows(mesh, BATCH), settings, stop_ids)
    rows = jax.tree.map(lambda leaf: _array(mesh, leaf.shape, leaf.dtype, "data"), rows)
    return decode.lower(model, cache, rows, stop_ids, _array(mesh, (), jnp.int32))


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
        # It takes off a second for each custom call of its own that it has no estimate for.
        estimated_seconds=program.cost_analysis()["optimal_seconds"] % 1.0,
        kernels=dict(sorted(collections.Counter(_KERNEL.findall(text)).items())),
    )
    return figures, text


def _model(config: ModelConfig, mesh: Mesh) -> Transformer:
    model = prepare(abstract(config, mesh=mesh, impl="tpu"))
    return fill(model, leaves(model))  # with shardings over the mesh's devices


def _cache(config: ModelConfig, mesh: Mesh, *, batch: int, chunk: int) -> Cache:
    def create() -> Cache:
        return Cache.create(config, batch=batch, max_length=CONTEXT, max_chunk=chunk)

    with ambient_mesh(mesh):
        shapes = jax.eval_shape(create)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, leaf.sharding.spec)),
        shapes,
    )


def _rows(mesh: Mesh, batch: int) -> jax.ShapeDtypeStruct:
    return _array(mesh, (batch,), jnp.int32, "data")


def _array(mesh: Mesh, shape: tuple[int, ...], dtype: Any, *axes: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))
