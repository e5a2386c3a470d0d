"""Where a model lives: a mesh of three axes, and two tables from dim letter to mesh axis.

`data` splits the rows of a batch (and the cache's pages with them), `tensor` the attention heads, and `expert` and
`tensor` together the experts and the vocabulary. The letters are those of gptoss_jax/config.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import ShardingError

MODEL_AXES = ("expert", "tensor")
AXES = ("data", *MODEL_AXES)

Axes = Mapping[str, str | tuple[str, ...]]
WEIGHT_AXES: Axes = {"E": MODEL_AXES, "V": MODEL_AXES, "N": "tensor", "K": "tensor"}
ACTIVATION_AXES: Axes = {"B": "data", "P": "data", "V": MODEL_AXES, "N": "tensor", "K": "tensor"}
REPLICATED: Axes = {}


def spec(dims: str, axes: Axes) -> P:
    """The PartitionSpec of an array with these dims.

    Example:
        >>> spec("N H D", WEIGHT_AXES)
        P('tensor', None, None)
    """
    return P(*(axes.get(dim) for dim in dims.split()))


def activation(dims: str) -> P:
    """The PartitionSpec of an activation with these dims."""
    return spec(dims, ACTIVATION_AXES)


def make_mesh(*, data: int = 1, expert: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the three axes, over the first data * expert * tensor devices.

    Raises ShardingError if there are too few devices.

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
    grid = np.array(available[:count]).reshape(data, expert, tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


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


def place(rows: Any, mesh: Mesh) -> Any:
    """Put a pytree of host arrays on the mesh, split by row (their first dim)."""
    return jax.device_put(rows, NamedSharding(mesh, P("data")))


def split_rows(rows: Any) -> Any:
    """`place` inside a traced function: split a pytree by row, whatever it was split over before."""
    return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, P("data")), rows)


def per_row(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function whose arguments and results all have the batch as first dim on each device's own rows.

    Arrays that were split over further axes are gathered first. Needs an ambient mesh.
    """

    def run(*args: Any) -> Any:
        return jax.shard_map(function, in_specs=P("data"), out_specs=P("data"), check_vma=False)(*split_rows(args))

    return run
