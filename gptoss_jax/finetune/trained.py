"""What a run has made of a checkpoint, for those who export it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorstore

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import CheckpointError
from gptoss_jax.finetune.adapters import LoRA
from gptoss_jax.finetune.checkpoints import TRAINED, folder_of, saved_steps
from gptoss_jax.finetune.placement import trained_shapes
from gptoss_jax.finetune.runs import Description, digest_of
from gptoss_jax.manifest import UNREADABLE, is_converted


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run has made of a checkpoint, read from disk as it is asked for."""

    base: Path
    """Where the checkpoint is that it began from; looked at by `check_base` alone."""
    base_digest: str
    config: ModelConfig
    method: str
    lora: LoRA | None
    step: int
    shapes: Mapping[str, tuple[int, ...]]
    """Trained arrays by path: adapters, or every parameter, an expert matrix as one dense `weight`."""
    folder: Path

    def check_base(self) -> None:
        """Raise CheckpointError unless `base` is the checkpoint that the run began from."""
        where, fix = str(self.base), "say with --base where it is"
        if not is_converted(self.base):
            raise CheckpointError("the run's base is not there", where=where, fix=fix)
        if digest_of(self.base) != self.base_digest:
            raise CheckpointError("not the checkpoint that the run was trained on", where=where, fix=fix)

    def read(self, path: str, rows: slice = slice(None)) -> np.ndarray:
        """Rows of a trained array, in float32."""
        store = {"driver": "ocdbt", "base": f"file://{self.folder.resolve()}/", "path": f"{TRAINED}.{path}/"}
        try:
            array = tensorstore.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()
            return np.ascontiguousarray(array[rows].read().result())
        except UNREADABLE as damaged:
            raise CheckpointError(
                f"{path} is missing or damaged", where=str(self.folder), fix="name an earlier step, or train again"
            ) from damaged


def open_run(directory: Path, *, base: Path | None = None, step: int | None = None) -> Trained:
    """The newest checkpoint of a run, or that of a step; `base` says where its base lies now.

    Raises CheckpointError if there is no run, or no such checkpoint.
    """
    described = Description.read(directory)
    kept = saved_steps(directory)
    chosen = max(kept, default=None) if step is None else step
    if chosen not in kept:
        which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise CheckpointError(
            which, where=str(directory), fix=f"choose among {kept}" if kept else "train until one is saved"
        )
    return Trained(
        base=described.base if base is None else base,
        base_digest=described.base_digest,
        config=described.config,
        method=described.settings.method,
        lora=described.settings.lora,
        step=chosen,
        shapes=trained_shapes(described.config, described.settings.lora),
        folder=folder_of(directory, chosen),
    )
