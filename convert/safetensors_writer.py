"""Write safetensors files slice by slice, one or several with their index; the reader is safetensors_reader.py."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convert.safetensors_reader import INDEX, ITEM_BYTES
from convert.zarr import write_rows


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["BF16", "U8", "F32"]
    """As safetensors spells it; FP4 codes and E8M0 scales are both U8."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def write_safetensors[T: Tensor](path: Path, tensors: Sequence[T], slices: Callable[[T], Iterable[np.ndarray]]) -> None:
    """Write the tensors one after the other; `slices` gives the consecutive values of each."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            for values in slices(tensor):
                write_rows(file, values)


def write_shards[T: Tensor](
    directory: Path,
    shards: Mapping[str, Sequence[T]],
    slices: Callable[[T], Iterable[np.ndarray]],
    *,
    each: Callable[[Callable[[str], None], Iterable[str]], Iterable[None]] = map,
) -> None:
    """Write each shard under its file name, and the index if there are several.

    With the `map` of a thread pool, several shards at a time.
    """
    for _ in each(lambda name: write_safetensors(directory / name, shards[name], slices), shards):
        pass
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensors in shards.values() for tensor in tensors)},
            "weight_map": {tensor.name: name for name, tensors in shards.items() for tensor in tensors},
        }
        write_json(directory / INDEX, index)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as the published ones are indented."""
    path.write_text(json.dumps(content, indent=2) + "\n")
