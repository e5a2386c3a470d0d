"""Time: repeated runs of one call, and the rates the card reaches at the two things every floor is measured by."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gptoss_jax import distributed
from gptoss_jax.bench.roofline import Ceilings

_FEWEST, _MOST = 3, 10
_PATIENCE_SECONDS = 12.0
_WARM_UPS = 2


@dataclasses.dataclass(frozen=True)
class Times:
    """What several runs of the same took, in milliseconds."""

    median: float
    spread: float
    """From the 10th to the 90th percentile."""
    first: float
    """The run before all others, compilation included."""

    def __truediv__(self, parts: int) -> "Times":
        return Times(self.median / parts, self.spread / parts, self.first / parts)


def measure(run: Callable[[Any], Any], prepare: Callable[[], Any] = lambda: None) -> Times:
    """Time `run(prepare())` until its result is there, several times; what `prepare` makes is waited for untimed.

    Two runs more come first, untimed. Slow runs are repeated less often, but at least three times.
    """
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < _WARM_UPS + _FEWEST or (
        len(times) < _WARM_UPS + _MOST and distributed.tell(time.perf_counter() - began < _PATIENCE_SECONDS)
    ):
        ready = jax.block_until_ready(prepare())
        started = time.perf_counter()
        jax.block_until_ready(run(ready))
        times.append(1e3 * (time.perf_counter() - started))
    kept = times[_WARM_UPS:]
    low, high = np.percentile(kept, [10, 90])
    return Times(median=statistics.median(kept), spread=float(high - low), first=times[0])


def ceilings() -> Ceilings:
    """Measure how fast the default device reads memory and multiplies dense bfloat16 matrices of random values.

    Reading: the best of two reductions over 4 GiB (a CPU: 64 MiB). Multiplying: 8192 x 8192 x 8192 (a CPU: 512).
    Several calls are in flight at a time, so their start costs nothing.
    """
    on_cpu = jax.default_backend() == "cpu"
    return Ceilings(
        read_bytes_per_s=_read_rate(2**26 if on_cpu else 2**32),
        dense_flops_per_s=_dense_rate(512 if on_cpu else 8192),
    )


def _read_rate(num_bytes: int) -> float:
    # Words of random bits: what lies in memory must not be compressible.
    words = jax.jit(lambda: jax.random.bits(jax.random.key(1), (num_bytes // 2**16, 2**14), jnp.uint32))()
    reductions = (jnp.max, lambda words: jnp.max(words, axis=1))
    return max(num_bytes / _seconds_each(jax.jit(reduction), words) for reduction in reductions)


def _dense_rate(width: int) -> float:
    left, right = jax.jit(
        lambda: tuple(jax.random.normal(jax.random.key(seed), (width, width), jnp.bfloat16) for seed in (2, 3))
    )()
    return 2 * width**3 / _seconds_each(jax.jit(jnp.matmul), left, right)


def _seconds_each(call: Callable[..., Array], *arguments: Array, in_flight: int = 10) -> float:
    return measure(lambda _: [call(*arguments) for _ in range(in_flight)]).median / in_flight / 1e3
