"""What is known of each device that a plan can be made for: memory, rates, links, and what XLA needs to compile for it.

Rates are the data sheets'. Memory is what JAX may take: of a TPU what its compiler grants a program, which it says when
one takes too much; of a GPU a share of what CUDA reports. Knows no JAX.
"""

import dataclasses
from typing import Literal

from gptoss_jax.bench.roofline import Ceilings, Number

Platform = Literal["tpu", "cuda", "cpu"]
_GIB = 2**30
_GB = 10**9
_TERA = 10**12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device as JAX counts them: of a tpu7x, half a chip."""

    name: str
    platform: Platform
    memory_bytes: int
    """Of a TPU what programs may take, of a GPU what CUDA reports in all."""
    ceilings: Ceilings | None
    """Its data sheet's rates, bfloat16 without sparsity; None for a device of no table, which must be measured."""
    link_bytes_per_s: Number | None
    """What one device sends to its neighbours, one way, over all its links; None if nobody knows."""
    collective_s: float | None
    """What the smallest collective takes."""


def _tpu(name: str, memory_gib: Number, tera_bytes: Number, tera_flops: Number, link_gb: Number) -> Chip:
    return Chip(
        name=name,
        platform="tpu",
        memory_bytes=int(memory_gib * _GIB),
        ceilings=Ceilings(read_bytes_per_s=tera_bytes * _TERA, dense_flops_per_s=tera_flops * _TERA),
        link_bytes_per_s=link_gb * _GB,
        collective_s=5e-6,  # an assumption: nothing here ran on a TPU
    )


def _gpu(name: str, memory_gb: Number, tera_bytes: Number, tera_flops: Number) -> Chip:
    return Chip(
        name=name,
        platform="cuda",
        memory_bytes=int(memory_gb * _GB),
        ceilings=Ceilings(read_bytes_per_s=tera_bytes * _TERA, dense_flops_per_s=tera_flops * _TERA),
        link_bytes_per_s=450 * _GB,  # NVLink 4
        collective_s=15e-6,  # a sum of one row over two H200s was measured at 12 to 18 us
    )


# Cloud TPU's pages on v5e, v5p, v6e and tpu7x; of a tpu7x the half. Memory: libtpu 0.0.48.1.
TPUS = {
    "v5e": _tpu("TPU v5e", 15.75, 0.819, 197, 200 / 2),
    "v5p": _tpu("TPU v5p", 95.73, 2.765, 459, 1200 / 2),
    "v6e": _tpu("TPU v6e", 31.24, 1.638, 918, 800 / 2),
    "tpu7x": _tpu("TPU7x", 94.74, 7.380 / 2, 2307 / 2, 1200 / 4),
}
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
SLICES = {"v5e": _FLAT, "v5p": _SOLID, "v6e": _FLAT, "tpu7x": _SOLID}
"""The shapes that are rented out, up to 256 chips."""

# NVIDIA's data sheets of the SXM cards. Memory as CUDA reports it: of the H200 measured.
GPUS = {
    "h100": _gpu("NVIDIA H100 80GB HBM3", 84.9, 3.35, 989),
    "h200": _gpu("NVIDIA H200", 150.11, 4.8, 989),
}
NUM_GPUS = (1, 2, 4, 8)
"""On one host, all linked by NVLink."""


def gpu_target(chip: Chip) -> str:
    """What XLA must know of a Hopper card to compile for it: a GpuTargetConfigProto as text.

    Field names: openxla/xla, xla/stream_executor/device_description.proto. Limits per block and per multiprocessor: the
    CUDA programming guide's table for compute capability 9.0.
    """
    assert chip.ceilings is not None
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.ceilings.read_bytes_per_s)}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {chip.memory_bytes}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  device_address_bits: 64
  name: "{chip.name}"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
device_description_str: "{chip.name}"
"""
