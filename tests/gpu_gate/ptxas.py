"""What ptxas says of the kernels it assembled: registers and spills, from the output of MOSAIC_GPU_DUMP_PTXAS=1."""

import dataclasses
import re

_KERNEL = re.compile(r"Compiling entry function '([^']+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel as assembled."""

    name: str
    registers: int
    spill_bytes: int
    """Stores and loads."""


def kernels(text: str) -> list[Kernel]:
    """Every different kernel that `text` tells of, in order of name; of equal names the worst.

    Raises ValueError for a kernel without its registers or its spills: what was not read must not count as zero.
    """
    found: dict[str, Kernel] = {}
    parts = _KERNEL.split(text)[1:]
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        spills, registers = _SPILLS.search(body), _REGISTERS.search(body)
        if not spills or not registers:
            raise ValueError(f"what ptxas says of {name} cannot be read")
        kernel = Kernel(
            name.removesuffix("_mosaic_gpu_kernel"), int(registers.group(1)), sum(map(int, spills.groups()))
        )
        known = found.get(kernel.name, kernel)
        worst = max(known.registers, kernel.registers), max(known.spill_bytes, kernel.spill_bytes)
        found[kernel.name] = Kernel(kernel.name, *worst)
    return [found[name] for name in sorted(found)]
