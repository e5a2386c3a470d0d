"""Which backend runs a kernel: the one asked for, or the one of the platform in use."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Literal

import jax

Impl = Literal["auto", "reference"]

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


def choose[Backend: Callable](kernel: str, backends: Mapping[str, Backend], impl: str) -> Backend:
    """The backend that `impl` names, or for "auto" the platform's.

    `backends` maps each implementation and each platform to a function, and always has "reference". A platform
    without a kernel of its own gets the reference, with a warning: never silently.
    """
    if impl != "auto":
        if impl not in backends:
            raise Unsupported(f"{kernel}: no implementation {impl!r}, there are {sorted(backends)}")
        return backends[impl]
    current = platform()
    if current not in backends:
        _warn_once(kernel, current)
        return backends["reference"]
    return backends[current]


@functools.cache
def _warn_once(kernel: str, current: str) -> None:
    log.warning("%s: no kernel for platform %r yet, running the slow reference", kernel, current)
