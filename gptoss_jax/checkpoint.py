"""Restore a converted checkpoint onto any devices: each process reads only the bytes of its own shards."""

import contextlib
import functools
import hashlib
import json
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.sharding import Mesh
from jax.typing import DTypeLike

from gptoss_jax import distributed
from gptoss_jax.compilation import enable_cache
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import CheckpointError
from gptoss_jax.manifest import CONFIG, MANIFEST, PARAMETERS, read_manifest, read_parameters, zarr_metadata
from gptoss_jax.model.transformer import Transformer, abstract, fill, leaves, prepare
from gptoss_jax.parameters import Parameter
from pallas_kernels.dispatch import Impl

# Restoring may widen: bfloat16 weights into float32. Packed bytes come as they are.
_RESTORABLE = {"bfloat16": (jnp.bfloat16, jnp.float32), "uint8": (jnp.uint8,)}


def load(
    path: str | Path, *, mesh: Mesh | None = None, dtype: DTypeLike = jnp.bfloat16, impl: Impl = "auto"
) -> Transformer:
    """The model in a converted directory, each parameter read straight onto the devices that hold it.

    Without `mesh`, on one device. `dtype` is that of everything but the packed experts: bfloat16 as published, or
    float32 for exact comparisons. Raises CheckpointError for what is not a whole converted checkpoint, or not the same
    one in every process, ShardingError for a mesh that does not divide the model.

    Example:
        >>> model = load("gpt-oss-20b", mesh=make_mesh(expert=2))  # doctest: +SKIP
    """
    enable_cache()
    directory = Path(path)
    read_manifest(directory)
    _check_same(directory)
    model = abstract(ModelConfig.read(directory / CONFIG), mesh=mesh, dtype=dtype, impl=impl)
    return prepare(fill(model, restore(directory, leaves(model))))


def restore(directory: Path, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Restore the parameters named in `abstract` (dotted paths), each as its shape, dtype and sharding say.

    A gigabyte or two are read at a time. On GPUs what was read and waits for them takes host memory too: 13 GiB of a
    120b restored onto two (docs/performance.md). Raises CheckpointError for an incomplete checkpoint, a parameter it
    does not hold, or one it holds in another shape or dtype.

    Example:
        >>> on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        >>> sinks = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=on_device)
        >>> restore(Path("gpt-oss-20b"), {"layers.0.attention.sinks": sinks})  # doctest: +SKIP
    """
    stored = read_parameters(directory)
    _check(stored, abstract, where=str(directory))
    _check_files(directory / PARAMETERS, [stored[path] for path in abstract])
    _check_metadata(directory / PARAMETERS, abstract)
    arguments = {
        path: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
        for path, leaf in abstract.items()
    }
    # Orbax refuses a read that alone exceeds its limit on bytes in flight.
    largest = max(stored[path].num_bytes for path in abstract)
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=1 + largest // 10**9)
    with _named_damage(directory / PARAMETERS), ocp.Checkpointer(handler) as checkpointer:
        tree = checkpointer.restore(
            str((directory / PARAMETERS).resolve()),
            args=ocp.args.PyTreeRestore(
                item=traverse_util.unflatten_dict(dict(abstract), sep="."),
                restore_args=traverse_util.unflatten_dict(arguments, sep="."),
                partial_restore=True,
            ),
        )
    return {path: functools.reduce(operator.getitem, path.split("."), tree) for path in abstract}


def _check_same(directory: Path) -> None:
    """See that the other processes have the same checkpoint, each perhaps on a disk of its own."""
    digest = hashlib.sha256((directory / MANIFEST).read_bytes() + (directory / CONFIG).read_bytes()).hexdigest()
    first, *others = distributed.exchange("checkpoint", digest)
    for index, other in enumerate(others, 1):
        if other != first:
            raise CheckpointError(
                f"process {index} has another checkpoint than process 0",
                where=str(directory),
                fix="give all processes copies of one converted directory",
            )


def _check(stored: Mapping[str, Parameter], abstract: Mapping[str, jax.ShapeDtypeStruct], *, where: str) -> None:
    faults = [f"{path} is not in the checkpoint" for path in abstract if path not in stored]
    for path, leaf in abstract.items():
        if path not in stored:
            continue
        if leaf.shape != stored[path].shape:
            faults.append(f"{path} is {list(stored[path].shape)}, not {list(leaf.shape)}")
        if leaf.dtype not in _RESTORABLE[stored[path].dtype]:
            faults.append(f"{path} is {stored[path].dtype}, which cannot become {leaf.dtype}")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(
            "; ".join(faults[:3]) + more, where=where, fix="build the model from the checkpoint's config.json"
        )


def _check_files(checkpoint: Path, parameters: Iterable[Parameter]) -> None:
    """See that every chunk is there in full; what Orbax says about one that is not names no parameter.

    Chunks are uncompressed, so their size is known (convert/zarr.py).
    """
    damaged = [parameter.path for parameter in parameters if not _is_whole(checkpoint / parameter.path, parameter)]
    if damaged:
        raise _damaged(f"{damaged[0]} is missing or damaged", checkpoint)


def _check_metadata(checkpoint: Path, paths: Iterable[str]) -> None:
    """See that Orbax's list of the arrays names ours: it would pass over one that is left out."""
    try:
        tree = json.loads((checkpoint / "_METADATA").read_text())["tree_metadata"]
        listed = {".".join(part["key"] for part in leaf["key_metadata"]) for leaf in tree.values()}
    except FileNotFoundError as missing:
        raise _damaged("the Orbax metadata is missing", checkpoint) from missing
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as broken:
        raise _damaged(f"damaged Orbax metadata ({broken!r})", checkpoint) from broken
    if absent := sorted(set(paths) - listed):
        raise _damaged(f"damaged Orbax metadata ({absent[0]} is not in it)", checkpoint)


def _is_whole(folder: Path, parameter: Parameter) -> bool:
    expected = zarr_metadata(parameter)
    try:
        if json.loads((folder / ".zarray").read_text()) != expected:
            return False
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):  # no file, or no JSON
        return False
    num_chunks = math.prod(size // chunk for size, chunk in zip(parameter.shape, expected["chunks"], strict=True))
    sizes = [file.stat().st_size for file in folder.iterdir() if file.name != ".zarray"]
    return sizes == [parameter.num_bytes // num_chunks] * num_chunks


@contextlib.contextmanager
def _named_damage(checkpoint: Path) -> Iterator[None]:
    """Turn what Orbax says about files it cannot use into a CheckpointError, for what the checks did not see."""
    try:
        yield
    except (ValueError, KeyError, FileNotFoundError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise _damaged(f"Orbax cannot restore it ({reason:.200})", checkpoint) from error


def _damaged(what: str, checkpoint: Path) -> CheckpointError:
    return CheckpointError(what, where=str(checkpoint), fix="convert again with --overwrite")
