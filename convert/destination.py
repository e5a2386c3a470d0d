"""A directory that appears whole or not at all: written beside its place, renamed into it at the very end."""

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from convert.progress import format_bytes
from gptoss_jax.errors import ConversionError
from gptoss_jax.manifest import is_partial

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_destination(destination: Path, *, overwrite: bool, is_ours: Callable[[Path], bool], kind: str) -> None:
    """Raise ConversionError for a directory that is there already, unless it is to be replaced and one of `kind`."""
    where = str(destination)
    if is_partial(destination):
        raise ConversionError("the name of an interrupted conversion", where=where, fix="name another directory")
    if destination.exists() and not overwrite:
        raise ConversionError(
            "the destination exists", where=where, fix="name another directory, or replace it with --overwrite"
        )
    if destination.exists() and not is_ours(destination):
        raise ConversionError(
            f"the destination is no {kind}, so it is not overwritten",
            where=where,
            fix="name another directory, or remove it yourself",
        )


def rename(partial: Path, destination: Path) -> None:
    """Put what was written into its place; what may be replaced there has been checked at the start."""
    replaced = replaced_directory(destination)
    if destination.exists():
        if replaced.exists():  # left by a crash after the last renaming
            shutil.rmtree(replaced)
        destination.rename(replaced)
    partial.rename(destination)
    if replaced.exists():
        shutil.rmtree(replaced)


def replaced_directory(destination: Path) -> Path:
    """Where the directory that is being replaced lies for a moment."""
    return destination.with_name(destination.name + ".replaced")


def check_space(needed: int, partial: Path, *, again: str) -> None:
    """Raise ConversionError unless `needed` bytes are free; `again` says how to run again."""
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise ConversionError(
            f"{format_bytes(needed)} to write, {format_bytes(free)} free",
            where=str(partial),
            fix=f"free the disk and {again}",
        )


@contextlib.contextmanager
def named_disk_errors(partial: Path, *, again: str) -> Iterator[None]:
    """Turn what the system says about files into a ConversionError; `again` says how to run again."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not from the system: a bug
            raise
        is_full = error.errno in _DISK_FULL
        raise ConversionError(
            f"disk full ({error.strerror})" if is_full else f"cannot go on ({error.strerror})",
            where=str(partial if is_full else error.filename or partial),
            fix=f"free the disk and {again}" if is_full else f"put that right and {again}",
        ) from error
