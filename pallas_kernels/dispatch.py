"""Which backend runs a kernel: the one asked for, or the one of the platform in use."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

Impl = Literal["auto", "reference", "hopper"]

log = logging.getLogger(__name__)


class Unsupported(ValueError):
    """A backend cannot run these arguments; the message has the constraint and the numbers."""


def platform() -> str:
    """The platform ("cpu", "gpu", "tpu") the current computation is for.

    That of the ambient mesh's devices where one is set, so that a program can be compiled for a machine that is not
    there; else that of the default device.
    """
    abstract_device = jax.sharding.get_abstract_mesh().abstract_device
    name = None if abstract_device is None else abstract_device.platform
    if name is None:
        name = jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def choose(kernel: str, backends: Mapping[str, Callable[..., Any]], impl: str) -> Callable[..., Any]:
    """The backend that `impl` names, or for "auto" the platform's.

    `backends` maps each implementation and each platform to a function, and always has "reference". A named
    implementation runs or raises Unsupported. Under "auto" the reference stands in, with a warning, where the
    platform has no kernel of its own or its kernel does not support the arguments: never silently.

    Example:
        >>> choose("double", {"reference": lambda x: 2 * x}, "reference")(4)
        8
    """
    if impl != "auto":
        if impl not in backends:
            raise Unsupported(f"{kernel}: no implementation {impl!r}, there are {sorted(backends)}")
        return backends[impl]
    current = platform()
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


@functools.cache
def _warn_once(kernel: str, why: str) -> None:
    log.warning("%s: %s: running the slow reference", kernel, why)
