"""Convert a published checkpoint to an Orbax checkpoint, one slice of one tensor at a time.

Everything is written into DESTINATION.partial and renamed at the very end, so an interrupted conversion is never taken
for a complete one, and can be continued parameter by parameter.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

from convert.destination import check_destination, check_space, named_disk_errors, rename, replaced_directory
from convert.journal import Journal, identify, read_done
from convert.layouts import SourceTensor
from convert.orbax_tree import commit
from convert.progress import Progress, Stream
from convert.slices import parameter_slices
from convert.source import Source, open_source
from convert.zarr import ArrayWriter, read_chunk_rows, row_major_bytes
from gptoss_jax.errors import ConversionError
from gptoss_jax.manifest import (
    CONFIG,
    MANIFEST,
    PARAMETERS,
    UNREADABLE,
    Manifest,
    chunk_shape,
    is_converted,
    partial_directory,
)
from gptoss_jax.parameters import Parameter, parameters

_ARRAYS = "arrays"
_AGAIN = "run again with --resume"


def convert(
    source: str | Path,
    destination: Path,
    *,
    progress: Stream | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quantize: bool = False,
) -> Manifest:
    """Convert the checkpoint `source` (a folder or hf://owner/name) into the new directory `destination`.

    `resume` continues an interrupted conversion if there is one. Raises CheckpointError or ConversionError, and then
    leaves `destination` as it was; what was written so far stays in `destination`.partial.
    """
    destination = destination.resolve()
    partial = partial_directory(destination)
    _check_destination(destination, partial, resume=resume, overwrite=overwrite)
    opened = open_source(source)
    _check_quantize(opened, quantize)
    with named_disk_errors(partial, again=_AGAIN):
        journal = _start(partial, opened, quantize=quantize, resume=resume, stream=progress)
        check_space(_num_bytes_left(opened, journal), partial, again=_AGAIN)
        _write_arrays(opened, partial, journal, progress)
        manifest = Manifest(
            converter=f"gptoss-jax {importlib.metadata.version('gptoss-jax')}",
            layout=opened.layout,
            quantized=quantize,
            source_files=opened.files(),
            sha256={path: journal.done[path] for path in parameters(opened.config)},
        )
        _complete(partial, opened, manifest)
        rename(partial, destination)
        journal.remove_from(destination)
    return manifest


def _check_destination(destination: Path, partial: Path, *, resume: bool, overwrite: bool) -> None:
    check_destination(destination, overwrite=overwrite, is_ours=is_converted, kind="converted checkpoint")
    if partial.exists() and not _is_ours(partial):
        raise ConversionError(
            "no interrupted conversion, so it is not removed", where=str(partial), fix="move it out of the way"
        )
    replaced = replaced_directory(destination)
    if replaced.exists() and not ((resume or overwrite) and is_converted(replaced)):
        raise ConversionError(
            "in the way of replacing checkpoints", where=str(replaced), fix="move it out of the way, or remove it"
        )
    if partial.exists() and not (resume or overwrite):
        raise ConversionError(
            "an earlier conversion was interrupted",
            where=str(partial),
            fix="continue it with --resume, or start again with --overwrite",
        )


def _is_ours(partial: Path) -> bool:
    """Whether a conversion made it: it holds a journal, or nothing yet."""
    return partial.is_dir() and (Journal.is_in(partial) or not any(partial.iterdir()))


def _check_quantize(source: Source, quantize: bool) -> None:
    where = str(source.folder.path)
    if source.layout == "bf16" and not quantize:
        raise ConversionError(
            "its experts are dequantized to bfloat16",
            where=where,
            fix="quantize them to MXFP4 with --quantize, or convert the published MXFP4 checkpoint",
        )
    if source.layout != "bf16" and quantize:
        raise ConversionError("its experts are MXFP4 already", where=where, fix="leave out --quantize")


def _start(partial: Path, source: Source, *, quantize: bool, resume: bool, stream: Stream | None) -> Journal:
    """Make the partial directory, or take up an interrupted one: keep the parameters that are whole."""
    identity = identify(source, quantize=quantize)
    if not (resume and partial.is_dir()):
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        journal = Journal(partial, identity, {})  # first: it says whose directory this is
        (partial / _ARRAYS).mkdir()
        return journal
    done = read_done(partial, identity)
    _take_back(partial)
    arrays = partial / _ARRAYS
    tree = parameters(source.config)
    with Progress("checked", sum(tree[path].num_bytes for path in done), stream if done else None) as progress:
        kept = {
            path: checksum
            for path, checksum in done.items()
            if _is_whole(arrays / path, tree[path], checksum, progress)
        }
    for folder in arrays.iterdir():
        if folder.name not in kept:
            shutil.rmtree(folder)
    return Journal(partial, identity, kept)


def _take_back(partial: Path) -> None:
    """Undo the last steps of a conversion interrupted in them, so that there is one state to resume from."""
    (partial / _ARRAYS).mkdir(exist_ok=True)
    for checkpoint in partial.glob(f"{PARAMETERS}*"):
        for metadata in checkpoint.glob("*/.zarray"):
            metadata.parent.rename(partial / _ARRAYS / metadata.parent.name)
        shutil.rmtree(checkpoint)
    (partial / MANIFEST).unlink(missing_ok=True)


def _num_bytes_left(source: Source, journal: Journal) -> int:
    return sum(p.num_bytes for path, p in parameters(source.config).items() if path not in journal.done)


def _write_arrays(source: Source, partial: Path, journal: Journal, stream: Stream | None) -> None:
    total = sum(parameter.num_bytes for parameter in parameters(source.config).values())
    with Progress("converted", total, stream) as progress, ThreadPoolExecutor(max_workers=1) as hasher:
        for tensor in source.in_file_order():
            if all(parameter.path in journal.done for parameter in tensor.holds):
                progress.skip(sum(parameter.num_bytes for parameter in tensor.holds))
                continue
            for path, checksum in _write_tensor(source, tensor, partial / _ARRAYS, hasher, progress).items():
                journal.add(path, checksum)


def _write_tensor(
    source: Source, tensor: SourceTensor, arrays: Path, hasher: Executor, progress: Progress
) -> dict[str, str]:
    """Write the parameters of one tensor; return their checksums.

    Hashing and writing both let other threads run, so a slice is hashed while it is written.
    """
    writers, hashes = {}, {}
    for parameter in tensor.holds:
        folder = arrays / parameter.path
        if folder.exists():  # whole, but its neighbour in the same tensor was not
            shutil.rmtree(folder)
        writers[parameter.path] = ArrayWriter(folder, parameter, chunk_shape(parameter))
        hashes[parameter.path] = hashlib.sha256()
    for parameter, rows in parameter_slices(source.folder, tensor):
        hashed = hasher.submit(hashes[parameter.path].update, row_major_bytes(rows))
        writers[parameter.path].write(rows)
        hashed.result()
        progress.add(rows.nbytes)
    return {path: digest.hexdigest() for path, digest in hashes.items()}


def _complete(partial: Path, source: Source, manifest: Manifest) -> None:
    """Turn the arrays into a checkpoint, the manifest last, all of it on the disk before anything is renamed.

    One sync of everything: flushing thousands of chunks one by one takes longer than all the rest together.
    """
    commit(partial / _ARRAYS, manifest.sha256, partial / PARAMETERS)
    (partial / _ARRAYS).rmdir()
    (partial / CONFIG).write_text(json.dumps(source.config.to_json(), indent=2) + "\n")
    os.sync()
    (partial / MANIFEST).write_text(json.dumps(manifest.to_json(), indent=2) + "\n")
    os.sync()


def _is_whole(folder: Path, parameter: Parameter, checksum: str, progress: Progress) -> bool:
    """Whether a stored parameter is all there, whatever the crash did to the disk's caches."""
    digest = hashlib.sha256()
    try:
        for rows in read_chunk_rows(folder, parameter):
            digest.update(row_major_bytes(rows))
            progress.add(rows.nbytes)
    except UNREADABLE:
        return False
    return digest.hexdigest() == checksum
