"""The text of an optimized HLO module, taken apart into computations and instructions."""

import dataclasses
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shape: str
    """Of its result, as it is written: `bf16[8,2880]{1,0}`, or a tuple of such in parentheses."""
    rest: str
    """Operands and attributes."""

    def attribute(self, names: str) -> str:
        """The computation or value that an attribute names; `names` may be alternatives, `to_apply|calls`."""
        found = re.search(rf"\b(?:{names})=%?([\w.\-]+)", self.rest)
        if found is None:
            raise ValueError(f"HLO {self.opcode} {self.name} has no {names}")
        return found.group(1)

    @property
    def called(self) -> str:
        """The computation that a call, a fusion or an asynchronous start runs."""
        return self.attribute("to_apply|calls|called_computation")

    @property
    def branches(self) -> list[str]:
        """The computations of which a conditional runs one."""
        if listed := re.search(r"branch_computations=\{([^}]*)\}", self.rest):
            return [name.strip().removeprefix("%") for name in listed.group(1).split(",")]
        return [self.attribute("true_computation"), self.attribute("false_computation")]

    @property
    def turns(self) -> int:
        """How often a loop is known to turn; 1 where that is unknown."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.rest)
        return int(known.group(1)) if known else 1


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, instructions in order."""

    computations: dict[str, list[Instruction]]
    entry: str

    @property
    def loops(self) -> list[Instruction]:
        """The loops of the entry computation."""
        return [instruction for instruction in self.computations[self.entry] if instruction.opcode == "while"]


def parse(text: str) -> Module:
    """The module that `compiled.as_text()` shows."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    entry = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header.group(2), [])
            if header.group(1):
                entry = header.group(2)
        elif found := _INSTRUCTION.match(line):
            name, definition = found.groups()
            shape, rest = _split_shape(definition)
            opcode, _, rest = rest.partition("(")
            current.append(Instruction(name, opcode, shape, rest))
    return Module(computations, entry)


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
