import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.errors import ShardingError
from gptoss_jax.sharding import fetch, make_mesh, place


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh looks at of a device that is not here."""

    id: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "NVIDIA H200"
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0


def test_neighbours_along_tensor_are_of_one_process() -> None:
    devices = [Device(index, process_index=index // 4) for index in range(8)]
    mesh = make_mesh(expert=4, tensor=2, devices=devices)
    assert [[device.process_index for device in pair] for pair in mesh.devices[0]] == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_tpu_mesh_follows_the_torus() -> None:
    kind, places = "TPU v6 lite", [(index % 4, index // 4, 0) for index in range(16)]
    devices = [Device(index, platform="tpu", device_kind=kind, coords=coords) for index, coords in enumerate(places)]
    ring = make_mesh(expert=16, devices=devices).devices.flat
    for one, two in zip(ring, [*ring[1:], ring[0]], strict=True):
        assert sum(abs(a - b) for a, b in zip(one.coords, two.coords, strict=True)) == 1
    assert make_mesh(expert=8, tensor=2, devices=devices).shape["tensor"] == 2
    assert [device.id for device in make_mesh(tensor=3, devices=devices).devices.flat] == [0, 1, 2]


def test_process_without_a_device_of_the_mesh_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [Device(index, process_index=index // 4) for index in range(8)])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ShardingError, match=r"process 1 has none of the 4 devices of .*'expert': 4.*in 2 processes"):
        make_mesh(expert=4)


def test_what_is_placed_is_fetched() -> None:
    mesh = make_mesh(data=4)
    rows = {"ids": np.arange(8), "scores": np.ones((4, 2), np.float32)}
    placed = place(rows, mesh)
    assert placed["ids"].sharding == NamedSharding(mesh, P("data"))
    jax.tree.map(np.testing.assert_array_equal, fetch(placed, mesh), rows)
