"""Which backend runs a kernel: the one asked for, or the one of the platform in use."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

Impl = Literal["auto", "reference", "hopper", "tpu"]

HOPPER_NAMES = ("H100", "H200", "H800", "H20")
"""In the device kinds of NVIDIA's cards with compute capability 9.0; GH200 is one of them."""

TPU_GENERATIONS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}
"""By device kind: those that the TPU kernels are compiled for ahead of time (`make aot`)."""

_ELSEWHERE = {
    "hopper": ("gpu", ", ".join(HOPPER_NAMES)),
    "tpu": ("other tpu", ", ".join(TPU_GENERATIONS.values())),
}
"""By implementation, the platform on which it cannot run, and what it is for instead."""

log = logging.getLogger(__name__)


class Unsupported(ValueError):
    """A backend cannot run these arguments; the message has the constraint and the numbers."""


def platform() -> str:
    """What the current computation is for: "cpu", "hopper" (NVIDIA compute capability 9.0) or another "gpu", "tpu" (one
    of `TPU_GENERATIONS`) or an "other tpu".

    That of the ambient mesh's devices where one is set, so that a program can be compiled for a machine that is not
    there; else that of the default device.
    """
    device = _device()
    if device.platform == "tpu":
        return "tpu" if device.device_kind in TPU_GENERATIONS else "other tpu"
    if device.platform not in ("gpu", "cuda", "rocm"):
        return device.platform
    return "hopper" if any(name in device.device_kind for name in HOPPER_NAMES) else "gpu"


def choose(kernel: str, backends: Mapping[str, Callable[..., Any]], impl: str) -> Callable[..., Any]:
    """The backend that `impl` names, or for "auto" the platform's.

    `backends` maps each implementation and each platform to a function, and always has "reference". A named
    implementation runs or raises Unsupported. Under "auto" the reference stands in, with a warning, where the
    platform has no kernel of its own or its kernel does not support the arguments: never silently.

    Example:
        >>> choose("double", {"reference": lambda x: 2 * x}, "reference")(4)
        8
    """
    current = platform()
    if impl != "auto":
        if impl not in backends:
            raise Unsupported(f"{kernel}: no implementation {impl!r}, there are {sorted(backends)}")
        unfit, meant = _ELSEWHERE.get(impl, (None, None))
        if current == unfit:
            raise Unsupported(f"{kernel}: the kernels of {impl!r} are for {meant}, not for a {_device().device_kind}")
        return backends[impl]
    if current not in backends:
        _warn_once(kernel, f"no kernel for platform {current!r} yet")
        return backends["reference"]

    def backend_or_reference(*args: Any, **kwargs: Any) -> Any:
        try:
            return backends[current](*args, **kwargs)
        except Unsupported as unsupported:
            _warn_once(kernel, str(unsupported))
        return backends["reference"](*args, **kwargs)

    return backend_or_reference


def _device() -> Any:
    """The ambient mesh's abstract device, else the default one; both have a platform and a device kind."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


@functools.cache
def _warn_once(kernel: str, why: str) -> None:
    log.warning("%s: %s: running the slow reference", kernel, why)
