"""The checkpoints of a run: masters or adapters, optimizer and step, each step's in a folder of its own."""

import contextlib
import dataclasses
import errno
import re
from collections.abc import Iterator
from pathlib import Path

import orbax.checkpoint as ocp

from gptoss_jax.errors import CheckpointError, TrainingError
from gptoss_jax.finetune.step import Program, State

CHECKPOINTS = "checkpoints"
TRAINED = "trained"
"""Of a `State`, the part that an export reads."""
_ITEM = "default"  # what Orbax calls a checkpoint's only part
_DISK_FULL = re.compile(r"No space left|Disk quota exceeded|File too large|RESOURCE_EXHAUSTED", re.IGNORECASE)


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


def saved_steps(directory: Path) -> list[int]:
    """The steps of a run's complete checkpoints."""
    return sorted(
        int(folder.name)
        for folder in (directory / CHECKPOINTS).glob("*")
        if folder.name.isdecimal() and (folder / "_CHECKPOINT_METADATA").is_file()
    )


def folder_of(directory: Path, step: int) -> Path:
    """Where the arrays of a run's checkpoint are."""
    return directory / CHECKPOINTS / str(step) / _ITEM


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
