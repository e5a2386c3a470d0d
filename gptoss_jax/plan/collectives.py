"""What a compiled program sends between devices, read from the text of its optimized HLO. Knows no JAX."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

from gptoss_jax.bench.hlo import Module, parse
from gptoss_jax.plan.chips import Chip

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
PEER_WRITES = "peer-writes"
"""Our own sums (pallas_kernels.exchange): every device writes its rows into each other device's memory, in a kernel."""
_PASSES = {"all-reduce": 2}
"""How often a ring passes each byte of the result on."""
_PEER_WRITE_S = 2.5e-6
"""What one adds to a step for few rows, on two H200s (docs/sharding.md, "2.4 us each")."""
_PEER_BYTES = 4
"""Sent for each byte of the result: float32 and a number in place of bfloat16."""
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_BITS_A_BYTE = 8


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind and size."""

    kind: str
    bytes: int
    """Of one's result, on one device."""
    count: int
    """In the whole program, or in one decode step."""
    per_layer: int
    """How many of them each layer has, if all layers are alike; the rest is outside of the layers."""


def program_collectives(text: str, num_layers: int) -> list[Collective]:
    """The collectives of one run of the program. Loops count as often as they are known to turn, once if unknown."""
    module = parse(text)
    return _counted(_found(module, module.entry, 1), num_layers)


def step_collectives(text: str, num_layers: int) -> list[Collective]:
    """The collectives of one turn of the program's outermost loop: one decode step. Without a loop, all of them."""
    module = parse(text)
    turns = [list(_found(module, loop.attribute("body"), 1)) for loop in module.loops]
    return _counted(max(turns, key=len), num_layers) if turns else program_collectives(text, num_layers)


def sending_seconds(collectives: Iterable[Collective], chip: Chip, num_devices: int) -> float:
    """What the collectives take, each after the other, in rings over all devices; 0 where nothing is known of links."""
    if chip.link_bytes_per_s is None or chip.collective_s is None:
        return 0.0
    share = (num_devices - 1) / num_devices
    return math.fsum(
        collective.count
        * (
            _PEER_WRITE_S + (num_devices - 1) * _PEER_BYTES * collective.bytes / chip.link_bytes_per_s
            if collective.kind == PEER_WRITES
            else chip.collective_s + _PASSES.get(collective.kind, 1) * share * collective.bytes / chip.link_bytes_per_s
        )
        for collective in collectives
    )


def _found(module: Module, name: str, times: int) -> Iterator[tuple[str, int, int]]:
    """Kind, bytes and count of each that the computation runs; of a conditional's branches, those of the busiest."""
    for instruction in module.computations[name]:
        opcode = instruction.opcode
        if opcode == "while":
            yield from _found(module, instruction.attribute("body"), times * instruction.turns)
        elif opcode == "conditional":
            yield from max((list(_found(module, branch, times)) for branch in instruction.branches), key=len)
        elif opcode in ("call", "fusion", "async-start"):
            yield from _found(module, instruction.called, times)
        elif (kind := opcode.removesuffix("-done")) in KINDS:  # of a pair the start's shape has the operands too
            yield kind, _num_bytes(instruction.shape), times
        elif opcode == "custom-call" and "uses_xla_collective_metadata = true" in instruction.rest:
            rows = next(_ARRAY.finditer(instruction.shape)).group()  # the mailbox follows, which is no result
            yield PEER_WRITES, _num_bytes(rows), times


def _num_bytes(shape: str) -> int:
    return sum(
        math.prod(int(size) for size in dims.split(",") if size) * int(bits or _BITS_A_BYTE) // _BITS_A_BYTE
        for _, bits, dims in _ARRAY.findall(shape)
    )


def _counted(found: Iterable[tuple[str, int, int]], num_layers: int) -> list[Collective]:
    counts: collections.Counter[tuple[str, int]] = collections.Counter()
    for kind, num_bytes, times in found:
        counts[kind, num_bytes] += times
    return [Collective(kind, num_bytes, count, count // num_layers) for (kind, num_bytes), count in counts.items()]
