"""Which kernels a compiled program launches, read from the text of its optimized HLO."""

import dataclasses
import re
from collections.abc import Iterator, Mapping

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
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
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


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    shape: str
    rest: str


def program_launches(text: str) -> list[Launch]:
    """What one run of the program launches, in order.

    Counted are fusions, custom calls (a call into cuBLAS counts once, though it may split its sum and launch a second
    kernel), copies, collectives, and every other instruction that is no mere view. A loop counts as often as it is
    known to turn, once where that is unknown; its condition counts with it. Of a conditional's branches the one with
    the fewest launches is taken, and 1 for fetching the predicate.
    """
    computations = _parse(text)
    return list(_launches(computations, _entry(text), 1))


def step_launches(text: str) -> list[Launch]:
    """What one turn of the program's outermost loop launches: one decode step. Without a loop, the whole program.

    Counts as `program_launches` does, the loop's condition included.
    """
    computations = _parse(text)
    loops = [instruction for instruction in computations[_entry(text)] if instruction.opcode == "while"]
    turns = [list(_turn(computations, loop, 1)) for loop in loops]
    return max(turns, key=count) if turns else program_launches(text)


def count(launches: list[Launch]) -> int:
    """How many launches these are."""
    return sum(launch.times for launch in launches)


def _parse(text: str) -> dict[str, list[_Instruction]]:
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header.group(2), [])
        elif found := _INSTRUCTION.match(line):
            name, definition = found.groups()
            shape, rest = _split_shape(definition)
            opcode, _, rest = rest.partition("(")
            current.append(_Instruction(name, opcode, shape, rest))
    return computations


def _entry(text: str) -> str:
    return next(found.group(2) for line in text.splitlines() if (found := _COMPUTATION.match(line)) and found.group(1))


def _split_shape(definition: str) -> tuple[str, str]:
    """A shape is one word, or for a tuple what its parentheses enclose."""
    if not definition.startswith("("):
        shape, _, rest = definition.partition(" ")
        return shape, rest
    depth = 0
    for position, character in enumerate(definition):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return definition[: position + 1], definition[position + 2 :]
    raise ValueError(f"unbalanced parentheses in HLO: {definition:.80}")


def _launches(computations: Mapping[str, list[_Instruction]], name: str, times: int) -> Iterator[Launch]:
    for instruction in computations[name]:
        opcode = instruction.opcode
        if opcode == "while":
            turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
            yield from _turn(computations, instruction, times * int(turns.group(1)) if turns else times)
        elif opcode == "conditional":
            yield _launch(instruction, times)
            branches = [list(_launches(computations, branch, times)) for branch in _branches(instruction)]
            yield from min(branches, key=count)
        elif opcode in ("call", "async-start"):
            yield from _launches(computations, _attribute(instruction, "to_apply|calls|called_computation"), times)
        elif not (opcode in _FREE or opcode.endswith(("-done", "-update")) or _NO_VALUES.search(instruction.shape)):
            yield _launch(instruction, times)


def _turn(computations: Mapping[str, list[_Instruction]], loop: _Instruction, times: int) -> Iterator[Launch]:
    yield from _launches(computations, _attribute(loop, "body"), times)
    yield from _launches(computations, _attribute(loop, "condition"), times)


def _launch(instruction: _Instruction, times: int) -> Launch:
    target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    source = re.search(r'op_name="([^"]*)"', instruction.rest)
    return Launch(
        name=instruction.name,
        kind=target.group(1) if target and instruction.opcode == "custom-call" else instruction.opcode,
        shape=instruction.shape,
        source=source.group(1) if source else "",
        times=times,
    )


def _attribute(instruction: _Instruction, names: str) -> str:
    found = re.search(rf"\b(?:{names})=%?([\w.\-]+)", instruction.rest)
    if found is None:
        raise ValueError(f"HLO {instruction.opcode} {instruction.name} has no {names}")
    return found.group(1)


def _branches(instruction: _Instruction) -> list[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", instruction.rest):
        return [name.strip().removeprefix("%") for name in listed.group(1).split(",")]
    return [_attribute(instruction, "true_computation"), _attribute(instruction, "false_computation")]
