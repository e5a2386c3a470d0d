"""Export a converted checkpoint, or what a fine-tuning run has made of one, to safetensors in a published layout.

Everything is written into DESTINATION.partial, one slice of one tensor at a time, and renamed at the very end. There is
nothing to resume: an export that fails takes away what it wrote.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convert.destination import check_destination, check_space, named_disk_errors, rename, replaced_directory
from convert.export_report import Exported
from convert.export_weights import Weights
from convert.layouts import LayoutName, source_tensors
from convert.peft import ADAPTER, ADAPTER_CONFIG, adapter_config, adapter_tensors, adapter_values
from convert.progress import Progress, Stream
from convert.published import shard_names, write_configs
from convert.safetensors_writer import Tensor, write_json, write_shards
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import ConversionError
from gptoss_jax.finetune.runs import is_run
from gptoss_jax.finetune.trained import Trained, open_run
from gptoss_jax.manifest import CONFIG, SourceFile, is_converted, partial_directory, read_manifest

Layout = Literal["hf", "original"]
Dtype = Literal["mxfp4", "bf16"]

REPORT = "export.json"
MAX_SHARD_BYTES = 5 * 10**9
_LAYOUTS: dict[tuple[Layout, Dtype], LayoutName] = {
    ("hf", "mxfp4"): "hugging_face",
    ("hf", "bf16"): "bf16",
    ("original", "mxfp4"): "original",
}
_AGAIN = "run again"


def export(
    checkpoint: Path,
    destination: Path,
    *,
    layout: Layout = "hf",
    dtype: Dtype = "mxfp4",
    peft: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    base: Path | None = None,
    step: int | None = None,
    progress: Stream | None = None,
) -> Exported:
    """Write `checkpoint`, a converted directory or a fine-tuning run, into the new directory `destination`.

    `dtype` is that of the experts' matrices; no file holds more than `max_shard_bytes`, unless a tensor alone does.
    `peft` writes the run's LoRA alone, as a PEFT adapter. `base` and `step` say where the checkpoint is now that a run
    started from, which only merging a LoRA reads, and which of the run's checkpoints to take. Raises CheckpointError or
    ConversionError, and then leaves `destination` as it was.

    Example:
        >>> print(export(Path("gpt-oss-20b"), Path("gpt-oss-20b-hf")))  # doctest: +SKIP
    """
    destination = destination.resolve()
    partial = partial_directory(destination)
    _check_options(layout, dtype, peft=peft)
    _check_destination(destination, partial, overwrite=overwrite)
    run = _open_run(checkpoint, base=base, step=step)
    if run is not None and base is not None and (peft or run.lora is None):
        raise ConversionError("only merging a LoRA reads the base", where=f"--base {base}", fix="leave it out")
    weights = None if peft else Weights(checkpoint, run)
    if weights is None:
        contents = _adapter(run, checkpoint)
    else:
        config = ModelConfig.read(checkpoint / CONFIG) if run is None else run.config
        contents = _model(config, _LAYOUTS[layout, dtype], weights, max_shard_bytes)
    tensors = [tensor for shard in contents.shards.values() for tensor in shard]
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    with named_disk_errors(partial, again=_AGAIN), _made(partial):
        check_space(num_bytes, partial, again=_AGAIN)
        contents.write_configs(partial)
        with Progress("exported", num_bytes, progress) as shown:
            write_shards(partial, contents.shards, functools.partial(_counted, contents.slices, shown))
        exported = Exported(
            source=str(checkpoint),
            destination=str(destination),
            exporter=f"gptoss-jax {importlib.metadata.version('gptoss-jax')}",
            form="peft" if peft else layout,
            dtype="float32" if peft else dtype,
            method=None if run is None else run.method,
            step=None if run is None else run.step,
            num_tensors=len(tensors),
            num_bytes=num_bytes,
            files=tuple(SourceFile(name, (partial / name).stat().st_size) for name in contents.shards),
            differences=() if weights is None else weights.differences,
        )
        write_json(partial / REPORT, exported.to_json())
        os.sync()
        rename(partial, destination)
    return exported


@dataclasses.dataclass(frozen=True)
class _Contents:
    """What is to be written: tensors by file, where their values come from, and the files beside them."""

    shards: dict[str, list[Any]]
    slices: Callable[[Any], Iterable[np.ndarray]]
    write_configs: Callable[[Path], None]


def _model(config: ModelConfig, layout: LayoutName, weights: Weights, max_shard_bytes: int) -> _Contents:
    shards = _split(list(source_tensors(config, layout).values()), max_shard_bytes)
    names = shard_names(layout, len(shards))
    return _Contents(
        dict(zip(names, shards, strict=True)),
        weights.slices,
        functools.partial(write_configs, config=config, layout=layout),
    )


def _adapter(run: Trained | None, checkpoint: Path) -> _Contents:
    if run is None or run.lora is None:
        raise ConversionError("no LoRA to export as an adapter", where=str(checkpoint), fix="leave out --peft")
    content = adapter_config(run.lora)
    return _Contents(
        {ADAPTER: list(adapter_tensors(run))},
        functools.partial(adapter_values, run),
        lambda directory: write_json(directory / ADAPTER_CONFIG, content),
    )


def _open_run(directory: Path, *, base: Path | None, step: int | None) -> Trained | None:
    """The fine-tuning run in `directory`, or None if it is a converted checkpoint."""
    if not is_converted(directory) and is_run(directory):
        return open_run(directory, base=base, step=step)
    read_manifest(directory)
    if base is not None or step is not None:
        raise ConversionError(
            "a converted checkpoint, no fine-tuning run", where=str(directory), fix="leave out --base and --step"
        )
    return None


def _check_options(layout: Layout, dtype: Dtype, *, peft: bool) -> None:
    where = f"--layout {layout}, --dtype {dtype}"
    if peft and (layout, dtype) != ("hf", "mxfp4"):
        raise ConversionError("a PEFT adapter is no checkpoint", where=where, fix="leave out --peft, or these options")
    if (layout, dtype) not in _LAYOUTS:
        raise ConversionError(
            "the original/ layout keeps its experts in MXFP4", where=where, fix="leave out one of the two"
        )


def _check_destination(destination: Path, partial: Path, *, overwrite: bool) -> None:
    check_destination(
        destination, overwrite=overwrite, is_ours=lambda path: (path / REPORT).is_file(), kind="export of ours"
    )
    for path in (partial, replaced_directory(destination)):
        if path.exists():
            raise ConversionError(
                "in the way, perhaps of an interrupted export",
                where=str(path),
                fix="move it out of the way, or remove it",
            )


@contextlib.contextmanager
def _made(directory: Path) -> Iterator[None]:
    """Make the directory, and take it away again when what follows fails."""
    directory.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _split[T: Tensor](tensors: Sequence[T], max_bytes: int) -> list[list[T]]:
    """Cut the list into shards of at most `max_bytes` each; a larger tensor has one to itself."""
    shards: list[list[T]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.num_bytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= tensor.num_bytes
    return shards


def _counted(slices: Callable[[Any], Iterable[np.ndarray]], shown: Progress, tensor: Tensor) -> Iterator[np.ndarray]:
    for values in slices(tensor):
        yield values
        shown.add(values.nbytes)
