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


@pytest.fixture
def device(monkeypatch):
    def present(platform, kind):
        device = type("Device", (), {"platform": platform, "device_kind": kind})()
        monkeypatch.setattr(jax, "devices", lambda: [device])

    return present


@pytest.mark.parametrize(
    ("maker", "kind", "expected"),
    [
        ("gpu", "NVIDIA H200", "hopper"),
        ("gpu", "NVIDIA GH200 480GB", "hopper"),
        ("gpu", "NVIDIA A100-SXM4-80GB", "gpu"),
        ("gpu", "B200", "gpu"),
        ("tpu", "TPU v5 lite", "tpu"),
        ("tpu", "TPU7x", "tpu"),
        ("tpu", "TPU v4", "other tpu"),
        ("tpu", "TPU v3", "other tpu"),
    ],
)
def test_only_devices_that_kernels_are_for_get_them(maker, kind, expected, device):
    device(maker, kind)
    assert platform() == expected


@pytest.mark.parametrize(
    ("impl", "maker", "kind", "meant"),
    [("tpu", "tpu", "TPU v3", "v5e, v5p, v6e, tpu7x"), ("hopper", "gpu", "NVIDIA A100-SXM4-80GB", "H100, H200")],
)
def test_a_named_backend_on_another_generation_is_refused_by_name(impl, maker, kind, meant, device):
    device(maker, kind)
    with pytest.raises(Unsupported, match=f"double: the kernels of '{impl}' are for {meant}.*, not for a {kind}"):
        choose("double", {"reference": picky, impl: picky}, impl)
    assert choose("double", {"reference": picky, impl: picky}, "reference") is picky
