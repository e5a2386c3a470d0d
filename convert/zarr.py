"""Write one parameter as an uncompressed Zarr array, and read it back.

Orbax stores an array as a Zarr (version 2) folder: `.zarray` says its shape, dtype and chunks, and each chunk is a file
named by its place in the grid. Uncompressed, a chunk is its values in row-major order, which for a chunk of whole rows
are consecutive bytes of the published tensor: writing costs one copy from page to page. (4-bit codes do not compress.)
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
import tensorstore

from gptoss_jax.manifest import chunk_shape, zarr_metadata
from gptoss_jax.parameters import Parameter

# Megabytes in one go make Linux look for page-cache memory in one piece, at times for twice the processor time.
_WRITE_BYTES = 1 << 18
_NUMPY_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "uint8": np.dtype(np.uint8)}


def numpy_dtype(parameter: Parameter) -> np.dtype:
    """The dtype its values have in memory."""
    return _NUMPY_DTYPES[parameter.dtype]


class ArrayWriter:
    """Writes one parameter, handed over in order as runs of rows that fill chunks."""

    def __init__(self, directory: Path, parameter: Parameter, chunks: tuple[int, ...]) -> None:
        self.directory = directory
        self.parameter = parameter
        self.chunks = chunks
        self._next_chunk = 0
        directory.mkdir(parents=True)
        (directory / ".zarray").write_text(json.dumps(zarr_metadata(parameter) | {"chunks": chunks}))

    def write(self, rows: np.ndarray) -> None:
        """Write the next rows: a whole number of chunks of the first dim."""
        for start in range(0, rows.shape[0], self.chunks[0]):
            self._write_chunk_row(rows[start : start + self.chunks[0]])

    def _write_chunk_row(self, rows: np.ndarray) -> None:
        """Write the chunks that share one place along the first dim."""
        _, *column_chunks = self.chunks
        counts = [size // chunk for size, chunk in zip(rows.shape[1:], column_chunks, strict=True)]
        for place in itertools.product(*(range(count) for count in counts)):
            window = tuple(slice(i * chunk, (i + 1) * chunk) for i, chunk in zip(place, column_chunks, strict=True))
            name = ".".join(str(index) for index in (self._next_chunk, *place))
            with (self.directory / name).open("wb") as file:
                write_rows(file, rows[(slice(None), *window)])
        self._next_chunk += 1


def open_array(directory: Path) -> tensorstore.TensorStore:
    """Open a stored parameter through tensorstore, which Orbax reads it with too."""
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{directory.resolve()}/"},
        "fill_missing_data_reads": False,  # a chunk that is gone is an error, not zeros
    }
    return tensorstore.open(spec, open=True, read=True).result()


def read_rows(array: tensorstore.TensorStore, start: int, stop: int) -> np.ndarray:
    """Rows `start` to `stop`, contiguous."""
    return np.ascontiguousarray(array[start:stop].read().result())


def read_chunk_rows(directory: Path, parameter: Parameter) -> Iterator[np.ndarray]:
    """A stored parameter from its first row to its last, in the runs it was written in."""
    array = open_array(directory)
    num_rows = chunk_shape(parameter)[0]
    for start in range(0, parameter.shape[0], num_rows):
        yield read_rows(array, start, start + num_rows)


def write_rows(file: BinaryIO, rows: np.ndarray) -> None:
    """Write the bytes of `rows`, in pieces that the system takes without much ado."""
    content = row_major_bytes(rows)
    for start in range(0, len(content), _WRITE_BYTES):
        file.write(content[start : start + _WRITE_BYTES])


def row_major_bytes(rows: np.ndarray) -> memoryview:
    """The bytes that checksums are taken of."""
    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
