"""Where a run begins: a checkpoint's parameters as masters, or kept frozen beside new adapters."""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.checkpoint import restore
from gptoss_jax.finetune.adapters import adapter_dims, initial_adapter
from gptoss_jax.finetune.placement import dense_path, frozen_specs
from gptoss_jax.finetune.step import Program
from gptoss_jax.parameters import parameters
from gptoss_jax.sharding import put
from pallas_kernels.mxfp4 import MXFP4, dequantize


def frozen_parameters(made: Program, checkpoint: Path) -> dict[str, jax.Array]:
    """All parameters of a checkpoint, the experts packed, for a run that trains adapters."""
    return restore(checkpoint, _abstract(made, made.form.dtype))


def new_adapters(made: Program, seed: int) -> dict[str, jax.Array]:
    """The adapters of a run that has made no update yet: they change nothing."""
    assert made.form.lora is not None
    dims = adapter_dims(made.form.config, made.form.lora)
    return {
        path: put(
            initial_adapter(path, dims[path], shape, seed=seed), NamedSharding(made.mesh, made.trained_specs[path])
        )
        for path, shape in made.shapes.items()
    }


def masters(made: Program, checkpoint: Path) -> dict[str, jax.Array]:
    """A checkpoint's parameters in float32, the experts dequantized; a layer's packed experts at a time."""
    stored = _abstract(made, jnp.float32)
    dense = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(made.mesh, made.trained_specs[path]))
        for path, leaf in stored.items()
        if path in made.shapes
    }
    found = restore(checkpoint, dense)
    for path in stored:
        if not path.endswith(".blocks"):
            continue
        scales = path.removesuffix("blocks") + "scales"
        packed = restore(checkpoint, {path: stored[path], scales: stored[scales]})
        place = NamedSharding(made.mesh, made.trained_specs[dense_path(path)])
        found[dense_path(path)] = jax.jit(dequantize, out_shardings=place)(MXFP4(packed[path], packed[scales]))
    return {path: found[path] for path in made.shapes}


def _abstract(made: Program, dtype: jnp.dtype | type) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter of the checkpoint, placed as one that is frozen; packed bytes as they are."""
    specs: dict[str, P] = frozen_specs(made.form.config, made.mesh)
    return {
        path: jax.ShapeDtypeStruct(
            parameter.shape,
            jnp.uint8 if parameter.dtype == "uint8" else dtype,
            sharding=NamedSharding(made.mesh, specs[path]),
        )
        for path, parameter in parameters(made.form.config).items()
    }
