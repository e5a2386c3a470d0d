"""Topologies by name: those that exist, and what is wrong with others."""

import importlib.util

import pytest

from gptoss_jax.errors import PlanError, ShardingError
from gptoss_jax.plan import topologies
from gptoss_jax.plan.chips import GPUS, TPUS, gpu_target
from gptoss_jax.plan.topologies import find, memory_share, names
from pallas_kernels.dispatch import HOPPER_NAMES


@pytest.mark.parametrize(
    "name", ["v6e", "v6e:3x5", "v7x:2x2x1", "h200:3", "h900:1", "cpu:", "cpu:0", "cpu:many", "cpu:257", ""]
)
def test_name_that_does_not_exist_is_answered_with_those_that_do(name: str) -> None:
    with pytest.raises(PlanError, match="no topology") as error:
        find(name)
    assert all(
        known in str(error.value) for known in ("v5e:2x2", "v6e:2x4", "tpu7x:2x2x1", "h200:8", "cpu:1 to cpu:256")
    )


@pytest.mark.parametrize(("name", "extra"), [("v6e:2x4", "tpu"), ("h200:8", "cuda")])
def test_missing_compiler_is_named_with_its_extra(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(PlanError, match=rf"no compiler .*{name}: install the extra `{extra}`"):
        find(name)


def test_cpu_devices_share_the_memory() -> None:
    two, eight = find("cpu:2"), find("cpu:8")
    assert len(two.devices) == 2
    assert two.memory_bytes // 4 == eight.memory_bytes
    with pytest.raises(PlanError, match="cpu:9 needs 9 CPU devices: 8 present"):
        find("cpu:9")


def test_without_an_accelerator_the_cpus_are_those_present() -> None:
    assert len(find("present").devices) == 8


def test_mesh_larger_than_the_topology() -> None:
    with pytest.raises(ShardingError, match="needs 4 devices: 2 cpu device"):
        find("cpu:2").mesh(expert=4)


def test_every_name_has_a_chip_with_rates() -> None:
    for name in set(names()) - {"present", "cpu:1 to cpu:256"}:
        chip = (TPUS | GPUS)[name.partition(":")[0]]
        assert chip.ceilings is not None
        assert chip.ceilings.dense_flops_per_s > 100 * chip.ceilings.read_bytes_per_s > 0
        assert 10e9 < chip.memory_bytes < 200e9


def test_gpus_of_the_table_run_the_kernels_for_hopper() -> None:
    for chip in GPUS.values():
        assert f'name: "{chip.name}"' in gpu_target(chip)
        assert any(name in chip.name for name in HOPPER_NAMES)


@pytest.mark.parametrize("name", topologies._MEMORY_SHARES)
def test_share_of_a_gpus_memory_is_jaxs_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in topologies._MEMORY_SHARES:
        monkeypatch.delenv(other, raising=False)
    assert memory_share() == 0.75
    monkeypatch.setenv(name, "0.9")
    assert memory_share() == 0.9
    for wrong in ("all", "0", "1.5"):
        monkeypatch.setenv(name, wrong)
        with pytest.raises(PlanError, match="is no share of the memory"):
            memory_share()
