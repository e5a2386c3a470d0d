"""The search: every mesh that divides, those that fit first, the fastest of them first."""

import dataclasses
from typing import Any

import pytest

from gptoss_jax.bench.roofline import Work
from gptoss_jax.errors import PlanError
from gptoss_jax.plan.memory import Usage
from gptoss_jax.plan.points import Planner, Point, Step
from gptoss_jax.plan.search import meshes, search
from tests.plan.devices import SMALL, cpus
from tests.tiny import TINY

SIX_LAYERS = dataclasses.replace(TINY, num_layers=6, layer_kinds=TINY.layer_kinds + TINY.layer_kinds[:2])


def test_every_mesh_is_tried() -> None:
    found = list(meshes(12))
    assert len(found) == len({tuple(axes.values()) for axes in found}) == 18
    assert all(axes["data"] * axes["expert"] * axes["tensor"] == 12 for axes in found)


@pytest.mark.slow
def test_meshes_are_ranked_by_their_decode_step() -> None:
    topology = cpus(2)
    found = search(SMALL, topology, batch=1, context=64)
    assert sorted(tuple(candidate.axes.values()) for candidate in found.candidates) == [(1, 1, 2), (1, 2, 1)]
    times = [candidate.decode_ms for candidate in found.candidates]
    assert times == sorted(times)
    assert not found.is_estimated
    assert found.depths == (2,), "the whole of a model of few layers"
    for candidate in found.candidates:
        held = Planner(SMALL, topology, topology.mesh(**candidate.axes)).held(batch=1, context=64)
        assert held < candidate.needed < topology.memory_bytes
    assert "tensor=2" in str(found)


def test_few_layers_and_a_line_say_what_all_layers_need(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(planner: Planner, *, batch: int, context: int, max_chunk: int) -> Point:
        layers = planner.config.num_layers
        usage = Usage(weights=1, cache=1, other_arguments=0, temporaries=100 + layers, results=0, code=10 * layers)
        step = Step(
            usage=usage, floor=Work(0, 0), estimated_seconds=1e-3 * (5 + layers), collectives=[], compile_seconds=0.0
        )
        steps: Any = {"decode": step, "prefill": step}
        return Point(batch=batch, context=context, chunk=max_chunk, weights=1000 * layers, cache=50, steps=steps)

    monkeypatch.setattr(Planner, "point", compiled)
    topology = cpus(1)
    found = search(SIX_LAYERS, topology, batch=1, context=64)
    [only] = found.candidates
    assert found.depths == (2, 4)
    assert only.needed == 6000 + 50 + 106 + 2 * 60
    assert only.decode_ms == pytest.approx(11)
    assert only.prefill_ms == pytest.approx(11)


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
