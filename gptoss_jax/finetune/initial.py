"""Where a run begins: a checkpoint's parameters as masters, or kept frozen beside new adapters."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.checkpoint import restore
from gptoss_jax.finetune.adapters import adapter_dims, initial_adapter
from gptoss_jax.finetune.forward import expert_paths, published_experts
from gptoss_jax.finetune.placement import EMBEDDING, UNEMBEDDING, dense_path, frozen_specs
from gptoss_jax.finetune.step import Frozen, Program
from gptoss_jax.model.layers import rearranged
from gptoss_jax.parameters import parameters
from gptoss_jax.sharding import MODEL_AXES, put
from pallas_kernels.experts import ExpertWeights, HopperExperts, preparable, prepare, prepared_order
from pallas_kernels.experts.hopper_trainable import NARROWEST
from pallas_kernels.mxfp4 import MXFP4, dequantize

Read = Callable[[dict[str, jax.ShapeDtypeStruct]], dict[str, jax.Array]]


def frozen_parameters(program: Program, checkpoint: Path) -> Frozen:
    """All parameters of a checkpoint, the experts packed, for a run that trains adapters."""
    return read_frozen(program, functools.partial(restore, checkpoint))


def read_frozen(program: Program, read: Read) -> Frozen:
    """What `read` makes of a checkpoint's leaves, as the program takes it.

    A layer's experts at a time are brought into the order that Hopper's kernels read, if they can take them, and before
    all else is there: the most memory that this takes is little more than what stays.
    """
    leaves = checkpoint_leaves(program, program.form.dtype)
    arrays, embedding = {}, None
    if program.vocabulary_on_host:
        [placed] = read({EMBEDDING: leaves.pop(EMBEDDING)}).values()
        embedding = np.array(placed)
        placed.delete()
        arrays |= read({UNEMBEDDING: leaves.pop(UNEMBEDDING)})
    for layer in range(program.form.config.num_layers):
        paths = expert_paths(f"layers.{layer}.")
        arrays |= _in_kernels_order(program, read({path: leaves.pop(path) for path in paths}), paths)
    return Frozen(arrays | read(leaves), embedding)


def _in_kernels_order(program: Program, experts: dict[str, jax.Array], paths: Sequence[str]) -> dict[str, jax.Array]:
    """Float32 models, narrow ones and other platforms keep the published order: there the experts' gradients come of
    XLA's own products."""
    config = program.form.config
    published = published_experts(experts, paths)
    with jax.set_mesh(program.mesh):
        narrow = min(config.hidden_size, config.intermediate_size) < NARROWEST
        if narrow or program.form.dtype != jnp.bfloat16 or prepared_order() is not HopperExperts:
            return experts
        if not preparable(published, experts_per_token=config.experts_per_token):
            return experts
        packed = rearranged(_pack(program.mesh), published)
    return dict(zip(paths, (getattr(packed, field.name) for field in dataclasses.fields(packed)), strict=True))


@functools.cache
def _pack(mesh: Mesh) -> Callable[[ExpertWeights], HopperExperts]:
    everywhere = P(MODEL_AXES)
    return jax.jit(jax.shard_map(prepare, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False))


def new_adapters(program: Program, seed: int) -> dict[str, jax.Array]:
    """The adapters of a run that has made no update yet: they change nothing."""
    assert program.form.lora is not None
    dims = adapter_dims(program.form.config, program.form.lora)
    return {
        path: put(initial_adapter(path, dims[path], leaf.shape, seed=seed), leaf.sharding)
        for path, leaf in program.trained_leaves.items()
    }


def masters(program: Program, checkpoint: Path) -> dict[str, jax.Array]:
    """A checkpoint's parameters in float32, the experts dequantized; a layer's packed experts at a time."""
    stored, trained = checkpoint_leaves(program, jnp.float32), program.trained_leaves
    found = restore(checkpoint, {path: leaf for path, leaf in trained.items() if path in stored})
    for path in stored:
        if not path.endswith(".blocks"):
            continue
        scales = path.removesuffix("blocks") + "scales"
        packed = restore(checkpoint, {path: stored[path], scales: stored[scales]})
        place = trained[dense_path(path)].sharding
        found[dense_path(path)] = jax.jit(dequantize, out_shardings=place)(MXFP4(packed[path], packed[scales]))
    return {path: found[path] for path in trained}


def checkpoint_leaves(program: Program, dtype: jnp.dtype | type) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter of a checkpoint in this dtype, placed as one that is frozen; packed bytes as they are.

    Of a vocabulary that is to be on the host, the embedding is whole everywhere, for `read_frozen` to take from there.
    """
    specs = frozen_specs(program.form.config, program.mesh)
    places = {path: NamedSharding(program.mesh, spec) for path, spec in specs.items()}
    if program.vocabulary_on_host:
        places[EMBEDDING] = NamedSharding(program.mesh, P())
        places[UNEMBEDDING] = places[UNEMBEDDING].with_memory_kind("pinned_host")
    return {
        path: jax.ShapeDtypeStruct(
            parameter.shape, jnp.uint8 if parameter.dtype == "uint8" else dtype, sharding=places[path]
        )
        for path, parameter in parameters(program.form.config).items()
    }
