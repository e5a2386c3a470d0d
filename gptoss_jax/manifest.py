"""What a converted checkpoint directory looks like, and the manifest that makes it complete.

    DIRECTORY/
        parameters/      an Orbax checkpoint: nested dicts keyed by the components of the parameter paths
        config.json      the architecture, as Hugging Face spells it
        manifest.json    where the bytes came from, and a checksum of every parameter

The manifest is written last, and a conversion under way lives in DIRECTORY.partial: a directory without a manifest is
never taken for a checkpoint, nor is one whose name ends in `.partial`.

Each array is an uncompressed Zarr (version 2) folder, named by its path and cut into chunks where meshes cut it.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import CheckpointError
from gptoss_jax.parameters import Parameter, parameters

PARAMETERS = "parameters"
CONFIG = "config.json"
MANIFEST = "manifest.json"
FORMAT_VERSION = 1
UNREADABLE = (ValueError, FileNotFoundError)
"""What tensorstore raises for an array whose metadata or chunks are missing, damaged or cut short."""
_PARTIAL = ".partial"
# The most parts that a sensible mesh cuts each dim into; a shard then reads no byte of its neighbour.
_MOST_PARTS = {"E": 32, "N": 8, "K": 8, "V": 128}
_SMALL_BYTES = 1 << 18
_ZARR_DTYPES = {"bfloat16": "bfloat16", "uint8": "|u1"}


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file the checkpoint was converted from."""

    name: str
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the checkpoint was made from, and what its bytes must be."""

    converter: str
    """Name and version of the program that wrote it."""
    layout: str
    """Layout of the source (convert/layouts.py)."""
    quantized: bool
    """Whether the experts were quantized here; otherwise they are the source's bytes."""
    source_files: tuple[SourceFile, ...]
    sha256: dict[str, str]
    """Of each parameter's bytes in row-major order, by path."""

    def to_json(self) -> dict[str, Any]:
        """What manifest.json holds."""
        return {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Manifest":
        """The inverse of `to_json`."""
        fields = {field.name: content[field.name] for field in dataclasses.fields(cls)}
        fields["source_files"] = tuple(SourceFile(**file) for file in fields["source_files"])
        return cls(**fields)


def partial_directory(directory: Path) -> Path:
    """Where an unfinished conversion to `directory` lives."""
    resolved = directory.resolve()  # "." has no name of its own
    return resolved.parent / f"{resolved.name}{_PARTIAL}"


def is_partial(directory: Path) -> bool:
    """Whether it is named as an unfinished conversion is."""
    return directory.resolve().name.endswith(_PARTIAL)


def is_converted(directory: Path) -> bool:
    """Whether it is a complete converted checkpoint."""
    return (directory / MANIFEST).is_file() and not is_partial(directory)


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a converted checkpoint.

    Raises CheckpointError for a directory that does not exist, an unfinished conversion, or a manifest that does not
    list the parameters of its config.json.
    """
    if not is_converted(directory):
        raise _not_a_checkpoint(directory)
    where = str(directory / MANIFEST)
    try:
        content = json.loads((directory / MANIFEST).read_text())
        version = content["format_version"]
        manifest = Manifest.from_json(content) if version == FORMAT_VERSION else None
    except (ValueError, KeyError, TypeError, RecursionError) as broken:
        raise CheckpointError(f"damaged manifest ({broken!r})", where=where, fix="convert again") from broken
    if manifest is None:
        raise CheckpointError(
            f"format version {version}, this program reads {FORMAT_VERSION}", where=where, fix="convert again"
        )
    expected = set(parameters(ModelConfig.read(directory / CONFIG)))
    if odd := sorted(expected.symmetric_difference(manifest.sha256)):
        raise CheckpointError(
            f"manifest and {CONFIG} disagree about {len(odd)} parameters, first {odd[0]}",
            where=where,
            fix="convert again",
        )
    return manifest


def read_parameters(directory: Path) -> dict[str, Parameter]:
    """The parameters a converted checkpoint holds, by path, after checking that it is complete."""
    read_manifest(directory)
    return parameters(ModelConfig.read(directory / CONFIG))


def chunk_shape(parameter: Parameter) -> tuple[int, ...]:
    """How it is cut into chunks: where meshes cut it; a small parameter not at all."""
    if parameter.num_bytes <= _SMALL_BYTES:
        return parameter.shape
    return tuple(
        size // _largest_divisor(size, _MOST_PARTS.get(dim, 1))
        for dim, size in zip(parameter.dims, parameter.shape, strict=True)
    )


def zarr_metadata(parameter: Parameter) -> dict[str, Any]:
    """What the `.zarray` file of its folder holds."""
    return {
        "zarr_format": 2,
        "shape": list(parameter.shape),
        "chunks": list(chunk_shape(parameter)),
        "dtype": _ZARR_DTYPES[parameter.dtype],
        "compressor": None,
        "filters": None,
        "fill_value": None,
        "order": "C",
        "dimension_separator": ".",
    }


def _largest_divisor(size: int, limit: int) -> int:
    return next(parts for parts in range(min(size, limit), 0, -1) if size % parts == 0)


def _not_a_checkpoint(directory: Path) -> CheckpointError:
    where = str(directory)
    if (directory.is_dir() and is_partial(directory)) or partial_directory(directory).is_dir():
        return CheckpointError(
            "the conversion was interrupted", where=where, fix="finish it with gptoss-jax convert ... --resume"
        )
    if not directory.is_dir():
        return CheckpointError("no such directory", where=where, fix="name a directory that gptoss-jax convert wrote")
    if any(directory.glob("*.safetensors")) or (directory / "original").is_dir():
        return CheckpointError(
            "not converted yet (safetensors)", where=where, fix="run gptoss-jax convert on it and name the result"
        )
    return CheckpointError(f"no {MANIFEST}", where=where, fix="name a directory that gptoss-jax convert wrote")
