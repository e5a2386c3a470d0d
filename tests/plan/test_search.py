"""The search: every mesh that divides, those that fit first, the fastest of them first."""

import pytest

from gptoss_jax.errors import PlanError
from gptoss_jax.plan.points import Planner
from gptoss_jax.plan.search import meshes, search
from tests.plan.devices import cpus
from tests.tiny import TINY


def test_every_mesh_is_tried() -> None:
    found = list(meshes(12))
    assert len(found) == len({tuple(axes.values()) for axes in found}) == 18
    assert all(axes["data"] * axes["expert"] * axes["tensor"] == 12 for axes in found)


def test_meshes_are_ranked_by_their_decode_step() -> None:
    topology = cpus(2)
    found = search(TINY, topology, batch=1, context=64)
    assert sorted(tuple(candidate.axes.values()) for candidate in found.candidates) == [(1, 1, 2), (1, 2, 1)]
    times = [candidate.decode_ms for candidate in found.candidates]
    assert times == sorted(times)
    assert not found.is_estimated
    for candidate in found.candidates:
        planner = Planner(TINY, topology, topology.mesh(**candidate.axes))
        held = planner.held(batch=1, context=64)
        assert held < candidate.needed < topology.memory_bytes
    tensor = next(candidate for candidate in found.candidates if candidate.axes["tensor"] == 2)
    point = Planner(TINY, topology, topology.mesh(tensor=2)).point(batch=1, context=64)
    assert tensor.needed == pytest.approx(point.needed, rel=0.05), "few layers and a line say what all layers need"
    assert "tensor=2" in str(found)


def test_mesh_whose_weights_do_not_fit_is_last_and_not_compiled() -> None:
    held = {
        tuple(axes.values()): Planner(TINY, cpus(2), cpus(2).mesh(**axes)).held(batch=2, context=4096)
        for axes in meshes(2)
    }
    found = search(TINY, cpus(2, memory_bytes=min(held.values()) - 1), batch=2, context=4096)
    assert [candidate.fits for candidate in found.candidates] == [False] * 3
    assert [candidate.needed for candidate in found.candidates] == sorted(held.values())
    assert all(candidate.decode_ms is None for candidate in found.candidates)
    assert str(found).count("does not fit") == 3


def test_no_mesh_divides() -> None:
    with pytest.raises(PlanError, match="no mesh of 8 devices divides the model and 3 rows: cpu:8"):
        search(TINY, cpus(8), batch=3, context=64)
