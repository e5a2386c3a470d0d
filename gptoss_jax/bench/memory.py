"""Holding the process to less device memory than the card has, as if it ran on a smaller one."""

import jax

from gptoss_jax.bench.report import nvidia_smi
from gptoss_jax.errors import BenchError

OUTSIDE_BYTES = 800_000_000
"""What the driver, the libraries and the programs themselves take beside JAX's arrays; an estimate, so measure it."""
_MIB = 2**20


def hold(limit_bytes: int | float) -> dict[str, int]:
    """Make JAX take `limit_bytes` less OUTSIDE_BYTES of the first GPU's memory, all at once, and never more.

    To be called before JAX starts: the option is one of its client's. Returns what is known now; `held` adds the rest.
    """
    total = nvidia_smi("memory.total")
    used = nvidia_smi("memory.used")
    if total is None or used is None:
        raise BenchError("no NVIDIA GPU to hold to a limit", where="--memory-limit-gb", fix="leave it out")
    total_bytes = int(total) * _MIB
    if not OUTSIDE_BYTES < limit_bytes <= total_bytes:  # nor is nan
        raise BenchError(
            f"{limit_bytes / 1e9:g} GB",
            where="--memory-limit-gb",
            fix=f"choose more than {OUTSIDE_BYTES / 1e9:g} and at most {total_bytes / 1e9:.1f}",
        )
    fraction = (limit_bytes - OUTSIDE_BYTES) / total_bytes
    jax.config.update("jax_pjrt_client_create_options", {"memory_fraction": fraction, "preallocate": True})
    return {"limit_bytes": round(limit_bytes), "used_before_bytes": int(used) * _MIB}


def held(before: dict[str, int]) -> dict[str, int]:
    """`before` with what JAX may take, what it took at most, and what the whole process holds on the card now."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    now = int(nvidia_smi("memory.used") or 0) * _MIB
    return before | {
        "jax_limit_bytes": statistics.get("bytes_limit", 0),
        "jax_peak_bytes": statistics.get("peak_bytes_in_use", 0),
        "process_bytes": now - before["used_before_bytes"],
    }
