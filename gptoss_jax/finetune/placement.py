"""Where the arrays of a fine-tuning live: split as for inference, and what is trained over `data` as well.

Masters, optimizer states and gradients are so large that the devices along `data` share them too (ZeRO, Rajbhandari et
al. 2019, arXiv 1910.02054): each weight is gathered where a layer needs it, and its gradient scattered back.
"""

import math
from collections.abc import Mapping

import jax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from gptoss_jax.config import ModelConfig
from gptoss_jax.finetune.adapters import LoRA, adapter_dims, adapter_shapes
from gptoss_jax.parameters import parameters
from gptoss_jax.sharding import AXES, MODEL_AXES, head_axes

DATA = "data"
EMBEDDING, UNEMBEDDING = "embedding.weight", "unembedding.weight"

_SMALLEST_SPLIT = 1 << 10
"""Values; smaller arrays are whole along `data`."""

Split = tuple[str | tuple[str, ...] | None, ...]
"""For each dim of an array, the mesh axes that split it."""


def training_mesh(mesh: Mesh) -> Mesh:
    """The same devices and axes, left to the compiler outside of `shard_map`, as optimizers need it."""
    return Mesh(mesh.devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def trained_dims(config: ModelConfig, lora: LoRA | None) -> dict[str, str]:
    """The dims of every trained array: the adapters', or every parameter's, an expert matrix being one dense weight."""
    if lora is not None:
        return adapter_dims(config, lora)
    dims = {}
    for path, parameter in parameters(config).items():
        if parameter.leaf == "blocks":
            rows = " ".join(parameter.dims[:2])
            dims[dense_path(path)] = f"{rows} {'D' if '.gate_up.' in path else 'F'}"
        elif parameter.leaf != "scales":
            dims[path] = " ".join(parameter.dims)
    return dims


def trained_shapes(config: ModelConfig, lora: LoRA | None) -> dict[str, tuple[int, ...]]:
    """The shape of every trained array, by path.

    Example:
        >>> from gptoss_jax.config import gpt_oss_20b
        >>> trained_shapes(gpt_oss_20b(), None)["layers.0.experts.down.weight"]
        (32, 2880, 2880)
    """
    if lora is not None:
        return adapter_shapes(config, lora)
    shapes = {}
    for path, parameter in parameters(config).items():
        if parameter.leaf == "blocks":
            *rows, num_blocks, num_bytes = parameter.shape
            shapes[dense_path(path)] = (*rows, num_blocks * num_bytes * 2)
        elif parameter.leaf != "scales":
            shapes[path] = parameter.shape
    return shapes


def dense_path(path: str) -> str:
    """The path of the dense weight that a packed one's blocks stand for."""
    return path.removesuffix("blocks") + "weight"


def split(path: str, dims: str, config: ModelConfig, mesh: Mesh) -> Split:
    """Which model axes split each dim of a parameter or an adapter array."""
    heads = head_axes(config.num_kv_heads, mesh)
    axes = {"V": MODEL_AXES, "N": heads, "K": heads, "E": None if ".router." in path else MODEL_AXES}
    return tuple(axes.get(dim) for dim in dims.split())


def gathered_dim(path: str, dims: str, shape: tuple[int, ...], config: ModelConfig, mesh: Mesh) -> int | None:
    """The dim that `data` splits as well: the largest that is whole and divides; None if there is none.

    Never that of an expert matrix along which MXFP4 blocks lie, so that each device quantizes its own blocks.
    """
    parts = mesh.shape[DATA]
    if parts == 1 or math.prod(shape) < _SMALLEST_SPLIT:
        return None
    taken = split(path, dims, config, mesh)
    candidates = range(len(shape) - (".experts." in path and len(shape) == 3))
    fitting = [dim for dim in candidates if taken[dim] is None and shape[dim] % parts == 0]
    return max(fitting, key=lambda dim: shape[dim], default=None)


def specs(
    dims: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, mesh: Mesh
) -> dict[str, P]:
    """The PartitionSpec of every trained array."""
    found = {}
    for path, names in dims.items():
        parts = list(split(path, names, config, mesh))
        if (dim := gathered_dim(path, names, shapes[path], config, mesh)) is not None:
            parts[dim] = DATA
        found[path] = P(*parts)
    return found


def frozen_specs(config: ModelConfig, mesh: Mesh) -> dict[str, P]:
    """The PartitionSpec of every parameter of a checkpoint that stays as it is."""
    return {
        path: P(*split(path, " ".join(parameter.dims), config, mesh)) for path, parameter in parameters(config).items()
    }


def varying(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The same local arrays, each marked as different on all devices on which one of them is.

    What `custom_vjp` asks for inside `shard_map`: an argument and its cotangent differ along the same mesh axes. The
    cotangents of what was the same everywhere are summed.
    """
    axes = frozenset().union(*(_axes(array) for array in arrays))
    return tuple(jax.lax.pcast(array, tuple(sorted(axes - _axes(array))), to="varying") for array in arrays)


def _axes(array: jax.Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying
