"""The programs of the gate, compiled for one H200 from shapes alone: the decode step and a chunk of prefill.

`python -m tests.gpu_gate.programs NAME RESULT.json` compiles one of them at two depths, in a process of its own, so
that what ptxas says on the standard output belongs to it.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.bench.launches import Launch, count, program_launches, step_launches
from gptoss_jax.config import ModelConfig, gpt_oss_20b
from gptoss_jax.generation.generate import PREFILL_TOKENS
from gptoss_jax.generation.sampling import Sampling, SamplingRows
from gptoss_jax.generation.steps import decode, prefill, start
from gptoss_jax.model.cache import Cache
from gptoss_jax.model.transformer import Transformer, abstract, ambient_mesh, fill, leaves, prepare
from gptoss_jax.sharding import make_mesh

DEPTHS = (2, 4)
"""Layers: as many sliding as full ones. The difference is what layers cost, the rest what the step costs once."""
_CONTEXT = 1088


def h200_mesh() -> Mesh:
    """A mesh of one H200 that can be compiled for, and nothing else."""
    jax.devices()  # registers the plugin's compiler
    target = Path(__file__).with_name("h200.txtpb").read_text()
    topology = topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=target)
    return make_mesh(devices=topology.devices)


def compiled(name: str, depth: int, mesh: Mesh) -> Any:
    """The program called `name`, of the 20b at full width with `depth` layers."""
    kind, _, number = name.partition("-")
    published = gpt_oss_20b()
    config = dataclasses.replace(published, num_layers=depth, layer_kinds=published.layer_kinds[:depth])
    model = _model(config, mesh)
    if kind == "prefill":
        length = int(number)
        cache = _cache(config, mesh, batch=1, room=length, chunk=PREFILL_TOKENS["hopper"])
        tokens = _array(mesh, (1, length), jnp.int32, "data")
        return prefill.lower(model, cache, tokens, _array(mesh, (1,), jnp.int32, "data")).compile()
    batch = int(number)
    cache = _cache(config, mesh, batch=batch, room=_CONTEXT, chunk=PREFILL_TOKENS["hopper"] // batch)
    stop_ids = _array(mesh, (2,), jnp.int32)
    logits = _array(mesh, (batch, config.vocab_size), jnp.float32)
    sampling = Sampling(seed=0) if kind == "draw" else Sampling(temperature=0.0)
    settings = jax.tree.map(
        lambda leaf: _array(mesh, leaf.shape, leaf.dtype, "data"), SamplingRows.of([sampling] * batch)
    )
    rows, _ = start.eval_shape(model, logits, _array(mesh, (batch,), jnp.int32, "data"), settings, stop_ids)
    rows = jax.tree.map(lambda leaf: _array(mesh, leaf.shape, leaf.dtype, "data"), rows)
    return decode.lower(model, cache, rows, stop_ids, _array(mesh, (), jnp.int32)).compile()


def figures(name: str) -> dict[str, Any]:
    """Launches a layer and outside of the layers, temporaries of the deeper program, and the list of its launches."""
    mesh = h200_mesh()
    programs = [compiled(name, depth, mesh) for depth in DEPTHS]
    listed = [_launches(name, program.as_text()) for program in programs]
    shallow, deep = (count(launches) for launches in listed)
    per_layer = (deep - shallow) / (DEPTHS[1] - DEPTHS[0])
    return {
        "launches_per_layer": per_layer,
        "launches_outside": shallow - DEPTHS[0] * per_layer,
        "temporary_bytes": programs[1].memory_analysis().temp_size_in_bytes,
        "list": [dataclasses.asdict(launch) for launch in listed[0]],
    }


def _launches(name: str, text: str) -> list[Launch]:
    return program_launches(text) if name.startswith("prefill") else step_launches(text)


def _model(config: ModelConfig, mesh: Mesh) -> Transformer:
    model = prepare(abstract(config, mesh=mesh))
    return fill(model, leaves(model))  # with shardings over the mesh's devices


def _cache(config: ModelConfig, mesh: Mesh, *, batch: int, room: int, chunk: int) -> Cache:
    def create() -> Cache:
        return Cache.create(config, batch=batch, max_length=room, max_chunk=chunk)

    with ambient_mesh(mesh):
        shapes = jax.eval_shape(create)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, leaf.sharding.spec)),
        shapes,
    )


def _array(mesh: Mesh, shape: tuple[int, ...], dtype: Any, *axes: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(figures(sys.argv[1])))
