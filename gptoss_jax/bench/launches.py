"""Which kernels a compiled program launches, read from the text of its optimized HLO."""

import dataclasses
import re
from collections.abc import Iterator

from gptoss_jax.bench.hlo import Instruction, Module, parse

# These cost nothing at run time: they name, group or reinterpret what is there.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "add-dependency",
    "opt-barrier",
    "partition-id",
    "replica-id",
}
_NO_VALUES = re.compile(r"[\[,]0[,\]]")


@dataclasses.dataclass(frozen=True)
class Launch:
    """One instruction that becomes a kernel (or a copy on the device)."""

    name: str
    kind: str
    """Its opcode; of a custom call, the target."""
    shape: str
    source: str
    """The JAX operation it comes from, as the compiler recorded it: `jit(decode)/while/body/...`."""
    times: int
    """More than 1 inside a loop whose number of turns the compiler knows."""


def program_launches(text: str) -> list[Launch]:
    """What one run of the program launches, in order.

    Counted are fusions, custom calls (a call into cuBLAS counts once, though it may split its sum and launch a second
    kernel), copies, collectives, and every other instruction that is no mere view. A loop counts as often as it is
    known to turn, once where that is unknown; its condition counts with it. Of a conditional's branches the one with
    the fewest launches is taken, and 1 for fetching the predicate.
    """
    module = parse(text)
    return list(_launches(module, module.entry, 1))


def step_launches(text: str) -> list[Launch]:
    """What one turn of the program's outermost loop launches: one decode step. Without a loop, the whole program.

    Counts as `program_launches` does, the loop's condition included.
    """
    module = parse(text)
    turns = [list(_turn(module, loop, 1)) for loop in module.loops]
    return max(turns, key=count) if turns else program_launches(text)


def count(launches: list[Launch]) -> int:
    """How many launches these are."""
    return sum(launch.times for launch in launches)


def _launches(module: Module, name: str, times: int) -> Iterator[Launch]:
    for instruction in module.computations[name]:
        opcode = instruction.opcode
        if opcode == "while":
            yield from _turn(module, instruction, times * instruction.turns)
        elif opcode == "conditional":
            yield _launch(instruction, times)
            yield from min((list(_launches(module, branch, times)) for branch in instruction.branches), key=count)
        elif opcode in ("call", "async-start"):
            yield from _launches(module, instruction.called, times)
        elif not (opcode in _FREE or opcode.endswith(("-done", "-update")) or _NO_VALUES.search(instruction.shape)):
            yield _launch(instruction, times)


def _turn(module: Module, loop: Instruction, times: int) -> Iterator[Launch]:
    yield from _launches(module, loop.attribute("body"), times)
    yield from _launches(module, loop.attribute("condition"), times)


def _launch(instruction: Instruction, times: int) -> Launch:
    target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    source = re.search(r'op_name="([^"]*)"', instruction.rest)
    return Launch(
        name=instruction.name,
        kind=target.group(1) if target and instruction.opcode == "custom-call" else instruction.opcode,
        shape=instruction.shape,
        source=source.group(1) if source else "",
        times=times,
    )
