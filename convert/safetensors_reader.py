"""Read the safetensors files of one folder: what they hold, and any run of a tensor's bytes, mapped one at a time.

The header of a safetensors file is 8 bytes of length, then JSON with each tensor's dtype, shape and place. It is read
here rather than through the safetensors package, whose slices copy and whose errors name neither file nor tensor.
"""

import dataclasses
import json
import math
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_LENGTH_BYTES = 8
ITEM_BYTES = {
    "BF16": 2,
    "F16": 2,
    "F32": 4,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I32": 4,
    "I64": 8,
    "F64": 8,
}
_READ_AHEAD = 1 << 24
_DOWNLOAD_AGAIN = "download it again"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies."""

    name: str
    dtype: str
    """As safetensors spells it."""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Of its first byte, from the start of the file."""
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class SafetensorsFolder:
    """The checkpoint files of a folder and the tensors in them."""

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Bytes `start` to `stop` of a tensor, as uint8.

        Only these bytes are mapped, and unmapped when the last array that shows them is gone: resident memory grows by
        what is in use, not by the size of the files. The disk is set to reading the bytes that follow.
        """
        tensor = self.tensors[name]
        first = tensor.offset + start
        skipped = first % mmap.ALLOCATIONGRANULARITY
        # One call brings the pages in; faulting them in one by one takes several times longer.
        populate = getattr(mmap, "MAP_POPULATE", 0)
        with tensor.file.open("rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), tensor.offset + stop, _READ_AHEAD, os.POSIX_FADV_WILLNEED)
            mapped = mmap.mmap(
                file.fileno(),
                stop - start + skipped,
                flags=mmap.MAP_SHARED | populate,
                prot=mmap.PROT_READ,
                offset=first - skipped,
            )
        return np.frombuffer(mapped, np.uint8, stop - start, skipped)


def open_folder(path: Path) -> SafetensorsFolder:
    """Read the headers of the files that the index names, or of all there are when there is no index.

    Raises CheckpointError for a shard or a tensor the index names and the folder lacks, and for truncated files.
    """
    placed = _read_index(path / INDEX) if (path / INDEX).is_file() else None
    if placed is None:
        files = tuple(sorted(file for file in path.glob("*.safetensors") if file.is_file()))
    else:
        files = tuple(path / name for name in sorted(set(placed.values())))
        if absent := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(
                f"missing shard {', '.join(absent)}", where=str(path / INDEX), fix="download the files it names"
            )
    if not files:
        raise CheckpointError("no safetensors files", where=str(path), fix="name a checkpoint folder")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _read_header(file):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{tensor.name} is in {tensors[tensor.name].file.name} and again in {file.name}",
                    where=str(path),
                    fix="keep the files of one checkpoint only",
                )
            tensors[tensor.name] = tensor
    if placed is not None:
        _check_index(placed, tensors, path / INDEX)
    return SafetensorsFolder(path, files, tensors)


def _read_index(path: Path) -> dict[str, str]:
    try:
        placed = json.loads(path.read_text())["weight_map"]
        return {str(name): str(file) for name, file in placed.items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as broken:
        raise CheckpointError(f"damaged index ({broken!r})", where=str(path), fix=_DOWNLOAD_AGAIN) from broken


def _check_index(placed: dict[str, str], tensors: dict[str, StoredTensor], path: Path) -> None:
    for name, file in placed.items():
        if name not in tensors:
            raise CheckpointError(f"{name} is not in {file}", where=str(path), fix=_DOWNLOAD_AGAIN)
        if tensors[name].file.name != file:
            raise CheckpointError(
                f"{name} is in {tensors[name].file.name}, not in {file}", where=str(path), fix=_DOWNLOAD_AGAIN
            )
    if unlisted := [name for name in tensors if name not in placed]:
        raise CheckpointError(
            f"{unlisted[0]} is in {tensors[unlisted[0]].file.name}, but not in the index",
            where=str(path),
            fix=_DOWNLOAD_AGAIN,
        )


def _read_header(path: Path) -> list[StoredTensor]:
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if file_bytes < _LENGTH_BYTES or _LENGTH_BYTES + length > file_bytes:
            raise CheckpointError(
                f"truncated: {file_bytes} bytes do not hold its header", where=str(path), fix=_DOWNLOAD_AGAIN
            )
        encoded = file.read(length)
    data_start = _LENGTH_BYTES + length
    try:
        header = json.loads(encoded)
        tensors = [
            _stored_tensor(name, entry, path, data_start) for name, entry in header.items() if name != "__metadata__"
        ]
    except (
        ValueError,  # no JSON and no UTF-8 too
        RecursionError,
        KeyError,
        TypeError,
        OverflowError,
        AttributeError,
    ) as broken:
        raise CheckpointError(f"damaged header ({broken!r})", where=str(path), fix=_DOWNLOAD_AGAIN) from broken
    promised = max((tensor.offset + tensor.num_bytes for tensor in tensors), default=data_start)
    if file_bytes < promised:
        last = next(tensor.name for tensor in tensors if tensor.offset + tensor.num_bytes > file_bytes)
        raise CheckpointError(
            f"truncated: {file_bytes} bytes of {promised}, {last} is cut", where=str(path), fix=_DOWNLOAD_AGAIN
        )
    return tensors


def _stored_tensor(name: str, entry: dict[str, Any], path: Path, data_start: int) -> StoredTensor:
    start, stop = (int(offset) for offset in entry["data_offsets"])
    dtype = str(entry["dtype"])
    shape = tuple(int(size) for size in entry["shape"])
    if start < 0 or (dtype in ITEM_BYTES and math.prod(shape) * ITEM_BYTES[dtype] != stop - start):
        raise ValueError(f"{name}: {stop - start} bytes at {start} for {dtype} {list(shape)}")
    return StoredTensor(name, dtype, shape, path, data_start + start, stop - start)
