"""Which rows a run of the benchmark measures. Knows no JAX: the command line shows the defaults at once."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which rows to measure."""

    batches: Sequence[int] = (1, 8, 32, 128)
    contexts: Sequence[int] = (1024,)
    prompts: Sequence[int] = (2048, 8192)
    kernel_tokens: Sequence[int] = ()
    """Token counts of the kernel rows; none without --kernels."""
    steps: int = 64
    """Tokens a dispatch of decode."""
    split: bool = False
    """Measure every decode and prefill row again with one stage left out, for each stage."""
    collectives: bool = False
    """Measure every decode and prefill row again without the sums over devices."""
