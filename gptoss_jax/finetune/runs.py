"""A run's directory: what it was started with, its checkpoints, and what has been trained so far.

RUN/
    run.json         the base, its config, the settings and the data, compared when the run is taken up again
    checkpoints/     Orbax, one folder for each kept step: masters or adapters, optimizer, step
    metrics.jsonl    one line for each update and evaluation
    tensorboard/     the same for TensorBoard, if asked for
"""

import contextlib
import dataclasses
import datetime
import errno
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import CheckpointError, TrainingError
from gptoss_jax.finetune.adapters import LoRA
from gptoss_jax.finetune.placement import trained_shapes
from gptoss_jax.finetune.settings import MAY_CHANGE, FineTuning
from gptoss_jax.finetune.step import Program, State
from gptoss_jax.manifest import MANIFEST, UNREADABLE, is_converted, read_manifest

RUN = "run.json"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
FORMAT_VERSION = 1
_TRAINED = "trained"
_ITEM = "default"  # what Orbax calls a checkpoint's only part
_DISK_FULL = re.compile(r"No space left|Disk quota exceeded|File too large|RESOURCE_EXHAUSTED", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Description:
    """What a run was started with."""

    base: Path
    """The converted checkpoint it began from."""
    base_digest: str
    """`digest_of` it."""
    data_digest: str
    """SHA-256 of the files of conversations."""
    date: datetime.date
    """That of the first start: what conversations without one are told."""
    config: ModelConfig
    settings: FineTuning
    steps: int
    """Updates of the whole run."""
    dtype: str
    """Of activations and products."""

    def write(self, directory: Path) -> None:
        """Make the run's directory."""
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / f"{RUN}.partial"
        partial.write_text(json.dumps(self.to_json(), indent=2) + "\n")
        partial.rename(directory / RUN)

    def to_json(self) -> dict[str, Any]:
        """What run.json holds."""
        return {
            "format_version": FORMAT_VERSION,
            "base": str(self.base.resolve()),
            "base_digest": self.base_digest,
            "data_digest": self.data_digest,
            "date": self.date.isoformat(),
            "config": self.config.to_json(),
            "settings": dataclasses.asdict(self.settings),
            "steps": self.steps,
            "dtype": self.dtype,
        }

    @classmethod
    def read(cls, directory: Path) -> "Description":
        """Read a run's description; raises CheckpointError if it is none."""
        path = directory / RUN
        if not path.is_file():
            raise CheckpointError("no fine-tuning run", where=str(directory), fix="name what gptoss-jax finetune wrote")
        try:
            content = json.loads(path.read_text())
            if content["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {content['format_version']}, this program reads {FORMAT_VERSION}")
            return cls(
                base=Path(content["base"]),
                base_digest=content["base_digest"],
                data_digest=content["data_digest"],
                date=datetime.date.fromisoformat(content["date"]),
                config=ModelConfig.from_json(content["config"], where=str(path)),
                settings=FineTuning.from_json(content["settings"], where=str(path)),
                steps=content["steps"],
                dtype=content["dtype"],
            )
        except (ValueError, KeyError, TypeError, RecursionError) as broken:
            raise CheckpointError(f"damaged run ({broken})", where=str(path), fix="start the run again") from broken

    def refuse_other(self, found: "Description", directory: Path) -> None:
        """Raise TrainingError unless the run found in the directory may be taken up with this description."""
        here, there = dataclasses.asdict(self), dataclasses.asdict(found)
        del here["base"], there["base"]  # it may have been moved: its digest counts
        for part in ("config", "settings"):
            for name in here[part]:
                if here[part][name] != there[part][name] and name not in MAY_CHANGE:
                    raise _other(f"{part}: {name} is {here[part][name]!r}, was {there[part][name]!r}", directory)
            del here[part], there[part]
        for name, value in here.items():
            if value != there[name]:
                raise _other(f"{name.replace('_', ' ')} differs", directory)


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
        store = {"driver": "ocdbt", "base": f"file://{self.folder.resolve()}/", "path": f"{_TRAINED}.{path}/"}
        try:
            array = tensorstore.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()
            return np.ascontiguousarray(array[rows].read().result())
        except UNREADABLE as damaged:
            raise CheckpointError(
                f"{path} is missing or damaged", where=str(self.folder), fix="name an earlier step, or train again"
            ) from damaged


def is_run(directory: Path) -> bool:
    """Whether `gptoss-jax finetune` made it."""
    return (directory / RUN).is_file()


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
        folder=directory / CHECKPOINTS / str(chosen) / _ITEM,
    )


def digest_of(checkpoint: Path) -> str:
    """What tells a converted checkpoint from another: the SHA-256 of its manifest, which has those of its bytes."""
    read_manifest(checkpoint)
    return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()


def saved_steps(directory: Path) -> list[int]:
    """The steps of a run's complete checkpoints."""
    return sorted(
        int(folder.name)
        for folder in (directory / CHECKPOINTS).glob("*")
        if folder.name.isdecimal() and (folder / "_CHECKPOINT_METADATA").is_file()
    )


@contextlib.contextmanager
def named_disk_errors(directory: Path) -> Iterator[None]:
    """Turn what the system says about the files of a run into a TrainingError."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not from the system: a bug
            raise
        raise TrainingError(
            f"cannot write ({error.strerror})",
            where=str(error.filename or directory),
            fix="put that right and --resume",
        ) from error


class Checkpoints:
    """Writes a run's states in the background and restores them onto any mesh."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        self._folder = (directory / CHECKPOINTS).resolve()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
            item_handlers=ocp.PyTreeCheckpointHandler(),
        )

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def remove(self, step: int) -> None:
        """Take away the checkpoint of a step, if there is one."""
        self.wait()
        if step in self._manager.all_steps():
            self._manager.delete(step)

    def save(self, step: int, state: State) -> None:
        """Begin to write; the state's buffers may change once this returns. Raises TrainingError if the one before
        could not be written."""
        with self._named_errors():
            self._manager.save(step, args=ocp.args.PyTreeSave(dataclasses.asdict(state)))  # pyright: ignore

    def wait(self) -> None:
        """Return when everything is on the disk; raises TrainingError if it is not."""
        with self._named_errors():
            self._manager.wait_until_finished()

    def restore(self, program: Program) -> State:
        """The newest state, each array as the program places it."""
        leaves = program.state_leaves
        content = {field.name: getattr(leaves, field.name) for field in dataclasses.fields(State)}
        step = self.latest
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.PyTreeRestore(
                    item=content, restore_args=ocp.checkpoint_utils.construct_restore_args(content)
                ),  # pyright: ignore
            )
        except (ValueError, KeyError, FileNotFoundError) as damaged:
            raise CheckpointError(
                f"the checkpoint of step {step} is damaged ({str(damaged).partition(chr(10))[0]:.200})",
                where=str(self._folder),
                fix=f"remove its folder {step} and resume from an earlier one",
            ) from damaged
        return State(**found)

    def close(self) -> None:
        """Let go of the threads."""
        self._manager.close()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Say by name that a checkpoint could not be written; Orbax leaves nothing that looks complete."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _DISK_FULL.search(str(error))
            last = max(saved_steps(self._folder.parent), default=None)
            raise TrainingError(
                f"disk full while saving ({reason:.200})" if full else f"a checkpoint could not be written ({reason})",
                where=f"{self._folder}, whose last complete step is {last}",
                fix="free the disk and continue with --resume",
            ) from error


def _other(what: str, directory: Path) -> TrainingError:
    return TrainingError(
        f"not the run that was started ({what})",
        where=str(directory),
        fix="use the same checkpoint, data and settings, or start another run",
    )
