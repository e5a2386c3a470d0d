"""A batch and a context that cannot be compiled for, and why."""

import jax
import pytest

from gptoss_jax.errors import ShardingError
from gptoss_jax.generation.generate import prefill_chunk
from gptoss_jax.plan import points
from gptoss_jax.plan.points import Planner
from gptoss_jax.plan.programs import abstract_model
from tests.plan.devices import SMALL, cpus


def test_nothing_is_compiled_for_a_cache_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(points, "_timed")
    topology = cpus(1, memory_bytes=1_000_000)
    planner = Planner(SMALL, topology, topology.mesh())
    point = planner.point(batch=64, context=8192)
    assert point.refusal == "weights and cache alone are larger"
    assert not point.fits(topology.memory_bytes)
    assert point.needed == planner.held(batch=64, context=8192) > topology.memory_bytes


def test_program_that_the_compiler_refuses_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(lowered: jax.stages.Lowered) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 40.00G exceeds available HBM (31.24G)\nmore")

    monkeypatch.setattr(points, "_timed", refuse)
    topology = cpus(1)
    point = Planner(SMALL, topology, topology.mesh()).point(batch=1, context=64)
    assert point.refusal == "RESOURCE_EXHAUSTED: 40.00G exceeds available HBM (31.24G)"
    assert not point.fits(topology.memory_bytes)


def test_other_faults_of_the_compiler_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(lowered: jax.stages.Lowered) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: no such layout")

    monkeypatch.setattr(points, "_timed", fail)
    topology = cpus(1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no such layout"):
        Planner(SMALL, topology, topology.mesh()).point(batch=1, context=64)


def test_rows_and_meshes_that_do_not_divide() -> None:
    topology = cpus(8)
    with pytest.raises(ShardingError, match="3 rows do not divide over data = 2"):
        Planner(SMALL, topology, topology.mesh(data=2)).point(batch=3, context=64)
    with pytest.raises(ShardingError, match="10 experts do not divide over expert \\* tensor = 4"):
        Planner(SMALL, topology, topology.mesh(expert=4))


def test_chunks_are_cut_for_the_planned_devices_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = abstract_model(SMALL, cpus(1).mesh())
    assert prefill_chunk(model, 1, limit=10**9) == prefill_chunk(model, 1) == 512
    monkeypatch.setattr("gptoss_jax.generation.generate.platform", lambda: "hopper")
    assert prefill_chunk(model, 1, limit=10**11) == 8192
    assert prefill_chunk(model, 1, limit=10**8) < 8192
