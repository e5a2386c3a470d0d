"""Read a converted checkpoint again and compare it, bit for bit with its source, or with its own checksums."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from convert.progress import Progress, Stream
from convert.slices import parameter_slices
from convert.source import Source, open_source
from convert.zarr import numpy_dtype, open_array, read_chunk_rows, read_rows, row_major_bytes
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import CheckpointError
from gptoss_jax.manifest import CONFIG, PARAMETERS, UNREADABLE, read_manifest
from gptoss_jax.parameters import Parameter, parameters


@dataclasses.dataclass(frozen=True)
class Verified:
    """What was compared, all of it equal."""

    against: str
    num_arrays: int
    num_bytes: int


def verify(directory: Path, source: str | Path | None = None, *, progress: Stream | None = None) -> Verified:
    """Compare every byte of the checkpoint in `directory` with `source`, or without one with its checksums.

    Memory holds one slice at a time. Raises CheckpointError naming the first parameter that differs, and where.
    """
    manifest = read_manifest(directory)
    config = ModelConfig.read(directory / CONFIG)
    tree = parameters(config)
    for parameter in tree.values():
        _check_array(directory, parameter)
    total = sum(parameter.num_bytes for parameter in tree.values())
    if source is None:
        with Progress("verified", total, progress) as shown:
            for parameter in tree.values():
                for rows in checked_rows(directory, parameter, manifest.sha256[parameter.path]):
                    shown.add(rows.nbytes)
        against = "the checksums of its manifest"
    else:
        opened = open_source(source)
        if opened.config != config:
            raise CheckpointError(
                "source and checkpoint are of different architectures",
                where=f"{directory} and {opened.folder.path}",
                fix="name the source it was converted from",
            )
        with Progress("verified", total, progress) as shown:
            _compare_with_source(directory, opened, shown)
        against = str(source)
    return Verified(against, len(tree), total)


def checked_rows(directory: Path, parameter: Parameter, checksum: str) -> Iterator[np.ndarray]:
    """A parameter of a converted checkpoint from its first row to its last, in the runs it was written in.

    Raises CheckpointError for one that cannot be read and, after the last row, for one that differs from its checksum.
    """
    digest = hashlib.sha256()
    with _named(directory, parameter):
        for rows in read_chunk_rows(_folder(directory, parameter), parameter):
            digest.update(row_major_bytes(rows))
            yield rows
    if digest.hexdigest() != checksum:
        raise _differs(directory, parameter, "differs from its checksum")


def _check_array(directory: Path, parameter: Parameter) -> None:
    with _named(directory, parameter):
        array = open_array(_folder(directory, parameter))
    shape, dtype = tuple(array.shape), array.dtype.numpy_dtype
    if shape != parameter.shape or dtype != numpy_dtype(parameter):
        raise _differs(directory, parameter, f"is {dtype} {list(shape)}, not {parameter.dtype} {list(parameter.shape)}")


def _compare_with_source(directory: Path, source: Source, shown: Progress) -> None:
    for tensor in source.in_file_order():
        arrays = {parameter.path: open_array(_folder(directory, parameter)) for parameter in tensor.holds}
        starts = {parameter.path: 0 for parameter in tensor.holds}
        for parameter, expected in parameter_slices(source.folder, tensor):
            start = starts[parameter.path]
            with _named(directory, parameter):
                found = read_rows(arrays[parameter.path], start, start + len(expected))
            # Compared as bits: NaN equals itself and 0.0 differs from -0.0.
            unequal = _bits(found) != _bits(expected)
            if unequal.any():
                row, *rest = (int(index) for index in np.argwhere(unequal)[0])
                raise _differs(directory, parameter, f"differs from {tensor.name} at index {[start + row, *rest]}")
            starts[parameter.path] += len(expected)
            shown.add(expected.nbytes)


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint16) if values.dtype.itemsize == 2 else values


@contextlib.contextmanager
def _named(directory: Path, parameter: Parameter) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as broken:
        raise _differs(directory, parameter, "is missing, or a chunk of it is missing or cut short") from broken


def _folder(directory: Path, parameter: Parameter) -> Path:
    return directory / PARAMETERS / parameter.path


def _differs(directory: Path, parameter: Parameter, what: str) -> CheckpointError:
    return CheckpointError(
        f"{parameter.path} {what}", where=str(_folder(directory, parameter)), fix="convert again with --overwrite"
    )
