"""Where a model lives: a mesh of three axes, and two tables from dim letter to mesh axis.

`data` splits the rows of a batch (and the cache's pages with them), `expert` and `tensor` together the experts, the
vocabulary and, where there are enough of them, the attention heads. The letters are those of gptoss_jax/config.py.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import ShardingError

MODEL_AXES = ("expert", "tensor")
AXES = ("data", *MODEL_AXES)

AxisNames = tuple[str, ...]
Axes = Mapping[str, str | AxisNames]
WEIGHT_AXES: Axes = {"E": MODEL_AXES, "V": MODEL_AXES}
ACTIVATION_AXES: Axes = {"B": "data", "P": "data", "V": MODEL_AXES}
"""Heads, N and K, lie as `head_axes` says, weights and activations alike."""
REPLICATED: Axes = {}
DEVICES = P(AXES)
"""The PartitionSpec of an array with a row for each device."""


def spec(dims: str, axes: Axes) -> P:
    """The PartitionSpec of an array with these dims.

    Example:
        >>> spec("E D", WEIGHT_AXES)
        P(('expert', 'tensor'), None)
    """
    return P(*(axes.get(dim) for dim in dims.split()))


def activation(dims: str, heads: AxisNames = ()) -> P:
    """The PartitionSpec of an activation with these dims, `heads` as `head_axes` has them."""
    return spec(dims, {**ACTIVATION_AXES, "N": heads, "K": heads})


def head_axes(num_kv_heads: int, mesh: Mesh | AbstractMesh) -> AxisNames:
    """The axes that split attention heads: both model axes, or `tensor` alone where there are too few heads for both.

    Example:
        >>> head_axes(8, make_mesh(expert=1)), head_axes(8, AbstractMesh((1, 16, 2), AXES))
        (('expert', 'tensor'), ('tensor',))
    """
    both = math.prod(mesh.shape.get(axis, 1) for axis in MODEL_AXES)
    return MODEL_AXES if num_kv_heads % both == 0 else ("tensor",)


def make_mesh(*, data: int = 1, expert: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the three axes, over the first data * expert * tensor devices.

    Neighbours along `tensor`, then along `expert`, are devices of one process where it has enough of them; on a TPU, if
    the mesh takes all devices, neighbours in its torus. Raises ShardingError if there are too few devices, or some
    process would have none in the mesh.

    Example:
        >>> dict(make_mesh().shape)
        {'data': 1, 'expert': 1, 'tensor': 1}
    """
    sizes = {"data": data, "expert": expert, "tensor": tensor}
    for axis, size in sizes.items():
        if size < 1:
            raise ShardingError(f"axis {axis} has size {size}", where="mesh", fix="give every axis a size of 1 or more")
    available = list(jax.devices() if devices is None else devices)
    count = data * expert * tensor
    if count > len(available):
        raise ShardingError(
            f"data={data} x expert={expert} x tensor={tensor} needs {count} devices",
            where=f"{len(available)} {available[0].platform} device(s) present",
            fix="choose smaller axes",
        )
    shape, chosen = (data, expert, tensor), available[:count]
    if devices is None:
        idle = {device.process_index for device in available} - {device.process_index for device in chosen}
        if idle:
            raise ShardingError(
                f"process {min(idle)} has none of the {count} devices of {sizes}",
                where=f"{len(available)} {available[0].platform} devices in {jax.process_count()} processes",
                fix="choose a mesh of all devices (--mesh), or start fewer processes",
            )
    if available[0].platform == "tpu" and count == len(available):
        grid = mesh_utils.create_device_mesh(shape, chosen, allow_split_physical_axes=True)
    else:
        grid = np.array(chosen).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


@contextlib.contextmanager
def ambient_mesh(mesh: Mesh) -> Iterator[None]:
    """Make `mesh` the one that shardings refer to, inside a traced function or outside."""
    token = _CONCRETE.set(mesh)
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield
    finally:
        _CONCRETE.reset(token)


def concrete_mesh() -> Mesh | None:
    """The mesh of `ambient_mesh` with its devices, for kernels that reach into other devices' memory; else None."""
    return _CONCRETE.get()


_CONCRETE: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("concrete_mesh", default=None)


def parse_axes(text: str) -> dict[str, int]:
    """The sizes of a mesh's axes as the command line takes them; raises ShardingError for what cannot be read.

    Example:
        >>> parse_axes("expert=2")
        {'data': 1, 'expert': 2, 'tensor': 1}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in sizes or not size.isdecimal():
            raise ShardingError(
                f"cannot read {part!r}", where="--mesh", fix=f"write it as expert=2,tensor=1; axes: {', '.join(AXES)}"
            )
        sizes[axis] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Raise ShardingError unless the mesh has the three axes and divides the model."""
    if mesh.axis_names != AXES or set(mesh.axis_types) != {AxisType.Explicit}:
        raise ShardingError(
            f"mesh axes {mesh.axis_names} of {sorted({kind.name for kind in mesh.axis_types})} type",
            where="mesh",
            fix=f"use make_mesh, whose axes are {AXES}, all Explicit",
        )
    model_devices = mesh.shape["expert"] * mesh.shape["tensor"]
    for what, size, axis, parts in (
        ("kv heads", config.num_kv_heads, "tensor", mesh.shape["tensor"]),
        ("experts", config.num_experts, "expert * tensor", model_devices),
        ("vocabulary rows", config.vocab_size, "expert * tensor", model_devices),
    ):
        if size % parts:
            raise ShardingError(
                f"{size} {what} do not divide over {axis} = {parts}",
                where=f"mesh {dict(mesh.shape)}",
                fix=f"choose {axis} among the divisors of {size}",
            )


def check_batch(batch: int, mesh: Mesh) -> None:
    """Raise ShardingError unless the rows divide over the mesh's data axis."""
    if batch % mesh.shape["data"]:
        raise ShardingError(
            f"{batch} rows do not divide over data = {mesh.shape['data']}",
            where=f"mesh {dict(mesh.shape)}",
            fix="add rows or use a smaller data axis",
        )


def put(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """Put a host array, equal in all processes, on the devices of the sharding."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def place(rows: Any, mesh: Mesh) -> Any:
    """Put a pytree of host arrays, equal in all processes, on the mesh, split by row (their first dim)."""
    return jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, P("data"))), rows)


def fetch(arrays: Any, mesh: Mesh) -> Any:
    """A pytree of arrays on the mesh as host arrays, whole, in every process; all of them call this."""
    return jax.device_get(jax.device_put(arrays, NamedSharding(mesh, P())))


def split_rows(rows: Any) -> Any:
    """`place` inside a traced function: split a pytree by row, whatever it was split over before."""
    return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, P("data")), rows)


def join_rows(rows: Any) -> Any:
    """The inverse of `split_rows`: each device gets all rows, so that every process can read them."""
    return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, P()), rows)


def per_row(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function whose arguments and results all have the batch as first dim on each device's own rows.

    Arrays that were split over further axes are gathered first. Needs an ambient mesh.
    """

    def run(*args: Any) -> Any:
        return jax.shard_map(function, in_specs=P("data"), out_specs=P("data"), check_vma=False)(*split_rows(args))

    return run
