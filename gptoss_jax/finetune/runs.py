"""A run's directory, and what the run was started with, which is compared when it is taken up again.

RUN/
    run.json         the base, its config, the settings and the data
    checkpoints/     Orbax, one folder for each kept step (checkpoints.py)
    metrics.jsonl    one line for each update and evaluation (metrics.py)
    tensorboard/     the same for TensorBoard, if asked for
"""

import dataclasses
import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import CheckpointError, TrainingError
from gptoss_jax.finetune.settings import MAY_CHANGE, FineTuning
from gptoss_jax.manifest import MANIFEST, read_manifest

RUN = "run.json"
FORMAT_VERSION = 1


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
                raise _other(_DIFFERS.get(name, f"{name} is {value}, was {there[name]}"), directory)


_DIFFERS = {
    "base_digest": "another checkpoint",
    "data_digest": "other conversations, or another --evaluation file, or one only this time or only then",
}


def is_run(directory: Path) -> bool:
    """Whether `gptoss-jax finetune` made it."""
    return (directory / RUN).is_file()


def digest_of(checkpoint: Path) -> str:
    """What tells a converted checkpoint from another: the SHA-256 of its manifest, which has those of its bytes."""
    read_manifest(checkpoint)
    return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()


def _other(what: str, directory: Path) -> TrainingError:
    return TrainingError(
        f"not the run that was started ({what})",
        where=str(directory),
        fix="use the same checkpoint, data and settings, or start another run",
    )
