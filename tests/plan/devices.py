"""CPU devices as a topology whose rates and memory are made up: nothing is measured, any memory may be asked for."""

import jax

from gptoss_jax.bench.roofline import Ceilings
from gptoss_jax.plan.chips import Chip
from gptoss_jax.plan.topologies import Topology
from tests.tiny import TINY

SMALL = TINY.first_layers(2)
"""One layer of each kind."""


def cpus(count: int, *, memory_bytes: int = 10**9) -> Topology:
    chip = Chip(
        name="CPU",
        platform="cpu",
        memory_bytes=memory_bytes,
        ceilings=Ceilings(read_bytes_per_s=1e10, dense_flops_per_s=1e12),
        link_bytes_per_s=1e9,
        collective_s=1e-5,
    )
    return Topology(name=f"cpu:{count}", chip=chip, devices=tuple(jax.devices()[:count]), memory_bytes=memory_bytes)
