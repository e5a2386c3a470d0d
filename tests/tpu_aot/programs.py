"""The programs: a decode step and a chunk of prefill of the published models, compiled for TPUs from shapes alone."""

import collections
import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterable
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
    kinds = config.layer_kinds[:num_layers]
    return dataclasses.replace(config, num_layers=len(kinds), layer_kinds=kinds)


def tpu_mesh(topology: str, **axes: int) -> Mesh:
    """A mesh of chips that can be compiled for, and nothing else.

    Raises RuntimeError, naming the extra, where libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError("no compiler for TPUs: install the extra `tpu` (pip install -e '.[tpu]'), or run `make aot`")
    # No TPU is asked for, so none need be looked for, and other processes may compile at the same time.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return make_mesh(devices=described.devices, **axes)


def lowered(step: str, config: ModelConfig, mesh: Mesh, *, chunk: int = CHUNK) -> Any:
    """The program of a step, lowered: a chunk of prefill has a row for each part of the data axis."""
    model = _model(config, mesh)
    if step == "prefill":
        batch = mesh.shape["data"]
        shape = batch, chunk // batch
        cache = _cache(config, mesh, batch=batch, chunk=shape[1])
        return prefill.lower(model, cache, _array(mesh, shape, jnp.int32, "data"), _rows(mesh, batch))
    cache = _cache(config, mesh, batch=BATCH, chunk=CHUNK // BATCH)
    stop_ids = _array(mesh, (2,), jnp.int32)
    logits = _array(mesh, (BATCH, config.vocab_size), jnp.float32)
    settings = jax.tree.map(
        lambda leaf: _array(mesh, leaf.shape, leaf.dtype, "data"), SamplingRows.of([Sampling(seed=0)] * BATCH)
    )
    rows, _ = start.eval_shape(model, logits, _rows(mesh, BATCH), settings, stop_ids)
    rows = jax.tree.map(lambda leaf: _array(mesh, leaf.shape, leaf.dtype, "data"), rows)
    return decode.lower(model, cache, rows, stop_ids, _array(mesh, (), jnp.int32))


def compiled(step: str, config: ModelConfig, mesh: Mesh, *, chunk: int = CHUNK) -> Compiled:
    """What the compiler says."""
    program = lowered(step, config, mesh, chunk=chunk).compile()
    memory, text = program.memory_analysis(), program.as_text()
    return Compiled(
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        # It takes off a second for each custom call of its own that it has no estimate for.
        estimated_seconds=program.cost_analysis()["optimal_seconds"] % 1.0,
        kernels=_counted(_KERNEL.findall(text)),
        collectives=collectives(text),
    )


def collectives(text: str) -> dict[str, int]:
    """How many of each kind and result there are in the text of an optimized program."""
    return _counted(f"{kind} {'+'.join(_ARRAY.findall(result))}" for result, kind in _COLLECTIVE.findall(text))


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(collections.Counter(names).items()))


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
