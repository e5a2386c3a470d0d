"""Where a run begins: a checkpoint's parameters as masters, or kept frozen beside new adapters."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.checkpoint import restore
from gptoss_jax.finetune.adapters import adapter_dims, initial_adapter
from gptoss_jax.finetune.forward import expert_paths, published_experts
from gptoss_jax.finetune.placement import EMBEDDING, UNEMBEDDING, dense_path, frozen_specs
from gptoss_jax.finetune.step import Frozen, Program
from gptoss_jax.model.layers import rearranged
from gptoss_jax.parameters import parameters
from gptoss_jax.sharding import MODEL_AXES, put
from pallas_kernels.experts import HopperExperts, preparable, prepare, prepared_order
from pallas_kernels.experts.hopper_trainable import NARROWEST
from pallas_kernels.mxfp4 import MXFP4, dequantize


def frozen_parameters(made: Program, checkpoint: Path) -> Frozen:
    """All parameters of a checkpoint, the experts packed, for a run that trains adapters."""
    return prepared(made, restore(checkpoint, checkpoint_leaves(made, made.form.dtype)))


def prepared(made: Program, arrays: dict[str, jax.Array]) -> Frozen:
    """The same as the program takes them: the embedding on the host if it is to be there, the experts in the order that
    Hopper's kernels read if they can take them, a layer at a time; the arrays that this replaces are deleted."""
    embedding = None
    if made.vocabulary_on_host:
        placed = arrays.pop(EMBEDDING)
        embedding = np.array(placed)
        placed.delete()
    return Frozen(_in_kernels_order(made, arrays), embedding)


def _in_kernels_order(made: Program, frozen: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Float32 models, narrow ones and other platforms keep the published order: there the experts' gradients come of
    XLA's own products."""
    config = made.form.config
    with jax.set_mesh(made.mesh):
        narrow = min(config.hidden_size, config.intermediate_size) < NARROWEST
        if narrow or made.form.dtype != jnp.bfloat16 or prepared_order() is not HopperExperts:
            return frozen
        layers = [expert_paths(f"layers.{layer}.") for layer in range(config.num_layers)]
        if not all(
            preparable(published_experts(frozen, paths), experts_per_token=config.experts_per_token) for paths in layers
        ):
            return frozen
        everywhere = P(MODEL_AXES)
        pack = jax.jit(jax.shard_map(prepare, in_specs=everywhere, out_specs=everywhere, check_vma=False))
        for paths in layers:
            packed = rearranged(pack, published_experts(frozen, paths))
            frozen |= zip(paths, (getattr(packed, field.name) for field in dataclasses.fields(packed)), strict=True)
    return frozen


def new_adapters(made: Program, seed: int) -> dict[str, jax.Array]:
    """The adapters of a run that has made no update yet: they change nothing."""
    assert made.form.lora is not None
    dims = adapter_dims(made.form.config, made.form.lora)
    return {
        path: put(initial_adapter(path, dims[path], leaf.shape, seed=seed), leaf.sharding)
        for path, leaf in made.trained_leaves.items()
    }


def masters(made: Program, checkpoint: Path) -> dict[str, jax.Array]:
    """A checkpoint's parameters in float32, the experts dequantized; a layer's packed experts at a time."""
    stored, trained = checkpoint_leaves(made, jnp.float32), made.trained_leaves
    found = restore(checkpoint, {path: leaf for path, leaf in trained.items() if path in stored})
    for path in stored:
        if not path.endswith(".blocks"):
            continue
        scales = path.removesuffix("blocks") + "scales"
        packed = restore(checkpoint, {path: stored[path], scales: stored[scales]})
        place = trained[dense_path(path)].sharding
        found[dense_path(path)] = jax.jit(dequantize, out_shardings=place)(MXFP4(packed[path], packed[scales]))
    return {path: found[path] for path in trained}


def checkpoint_leaves(made: Program, dtype: jnp.dtype | type) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter of a checkpoint in this dtype, placed as one that is frozen; packed bytes as they are.

    Of a vocabulary that is to be on the host, the embedding is whole everywhere, for `prepared` to take from there.
    """
    places = {path: NamedSharding(made.mesh, spec) for path, spec in frozen_specs(made.form.config, made.mesh).items()}
    if made.vocabulary_on_host:
        places[EMBEDDING] = NamedSharding(made.mesh, P())
        places[UNEMBEDDING] = places[UNEMBEDDING].with_memory_kind("pinned_host")
    return {
        path: jax.ShapeDtypeStruct(
            parameter.shape, jnp.uint8 if parameter.dtype == "uint8" else dtype, sharding=places[path]
        )
        for path, parameter in parameters(made.form.config).items()
    }
