"""Which backend runs: the one named or the platform's; the reference stands in for "auto" alone, and says so."""

import jax
import pytest

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Unsupported, choose, platform


def picky(x):
    if x > 2:
        raise Unsupported(f"double: {x} is more than 2")
    if x < 0:
        raise TypeError("a bug")
    return "kernel"


BACKENDS = {"reference": lambda x: "reference", "hopper": picky}


@pytest.fixture
def on(monkeypatch):
    dispatch._warn_once.cache_clear()
    return lambda name: monkeypatch.setattr(dispatch, "platform", lambda: name)


def test_auto_takes_the_platforms_kernel(on, caplog):
    on("hopper")
    assert choose("double", BACKENDS, "auto")(1) == "kernel"
    assert not caplog.records


def test_auto_falls_back_with_one_warning_that_has_the_numbers(on, caplog):
    on("hopper")
    assert [choose("double", BACKENDS, "auto")(3) for _ in range(2)] == ["reference"] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "double: double: 3 is more than 2: running the slow reference"
    ]


def test_auto_warns_on_a_platform_without_kernels(on, caplog):
    on("gpu")
    assert choose("double", BACKENDS, "auto")(1) == "reference"
    assert "no kernel for platform 'gpu'" in caplog.text


def test_a_named_backend_runs_or_raises(on, caplog):
    on("cpu")
    assert choose("double", BACKENDS, "hopper")(1) == "kernel"
    assert choose("double", BACKENDS, "reference")(3) == "reference"
    with pytest.raises(Unsupported, match="3 is more than 2"):
        choose("double", BACKENDS, "hopper")(3)
    with pytest.raises(Unsupported, match="no implementation 'abacus'"):
        choose("double", BACKENDS, "abacus")
    assert not caplog.records


def test_a_bug_in_a_kernel_is_not_hidden(on):
    on("hopper")
    with pytest.raises(TypeError, match="a bug"):
        choose("double", BACKENDS, "auto")(-1)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("NVIDIA H200", "hopper"), ("NVIDIA GH200 480GB", "hopper"), ("NVIDIA A100-SXM4-80GB", "gpu"), ("B200", "gpu")],
)
def test_only_hopper_cards_get_hopper_kernels(kind, expected, monkeypatch):
    device = type("Device", (), {"platform": "gpu", "device_kind": kind})()
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert platform() == expected
