"""Make an Orbax checkpoint out of arrays that are already on disk.

Orbax writes its own metadata and commits as it always does; only the writing of the arrays is replaced, by moving them
in. Saving through Orbax itself would need every array in memory.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from flax import traverse_util


@dataclasses.dataclass(frozen=True)
class WrittenArray:
    """Stands in the tree for an array already written as a Zarr folder."""

    directory: Path


class _MoveIn(ocp.type_handlers.TypeHandler):
    """Saves a WrittenArray by renaming its folder."""

    def typestr(self) -> str:
        # Recorded in the checkpoint. Orbax restores such a leaf as whatever the caller asks for (sharded jax.Array
        # included), and without being asked as numpy, where "jax.Array" would demand the sharding it was saved with.
        return "np.ndarray"

    async def serialize(
        self,
        values: Sequence[WrittenArray],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[Any]:
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            value.directory.rename(Path(info.path))
        return []

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        raise NotImplementedError("checkpoints are restored by Orbax's own handlers")

    async def metadata(self, infos: Any) -> Any:
        raise NotImplementedError("checkpoints are read by Orbax's own handlers")


def commit(arrays: Path, paths: Iterable[str], checkpoint: Path) -> None:
    """Move the Zarr folders `arrays`/`path` into a new Orbax checkpoint, as a tree keyed by the path components."""
    tree = traverse_util.unflatten_dict({path: WrittenArray(arrays / path) for path in paths}, sep=".")
    registry = ocp.type_handlers.create_type_handler_registry((WrittenArray, _MoveIn()))
    with _quiet():
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
        checkpointer = ocp.Checkpointer(handler)
        checkpointer.save(str(checkpoint.resolve()), args=ocp.args.PyTreeSave(tree))
        checkpointer.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax from warning that it stores no array metadata and merges no per-process files: both are meant."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
