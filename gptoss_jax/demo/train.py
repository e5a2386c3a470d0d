"""Train the demo model from random weights: the corpus, the run, and the two files that are shipped.

`python -m gptoss_jax.demo.train OUT --seed 1 --steps 5000 --conversations 200000`; the same line takes up a run that
was interrupted. OUT/
    corpus.npz             the corpus as token ids
    run/                   a run as gptoss-jax finetune makes them: checkpoints, and in metrics.jsonl the loss curve
    weights.safetensors    the trained weights with the used rows of the vocabulary alone (gptoss_jax.demo.compact)
    weights.json           what they were made with, and their SHA-256
"""

import argparse
import dataclasses
import datetime
import json
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Int32

from gptoss_jax.bench.report import commit
from gptoss_jax.compilation import enable_cache
from gptoss_jax.config import ModelConfig
from gptoss_jax.demo import corpus
from gptoss_jax.demo.compact import DESCRIPTION, WEIGHTS, write_compact
from gptoss_jax.demo.model import demo_config, initial_weights
from gptoss_jax.errors import DataError
from gptoss_jax.finetune.batches import Batch, Batches
from gptoss_jax.finetune.data import Example, read_examples
from gptoss_jax.finetune.metrics import METRICS, line
from gptoss_jax.finetune.optimizer import optimizer
from gptoss_jax.finetune.placement import training_mesh
from gptoss_jax.finetune.runs import Description, is_run
from gptoss_jax.finetune.settings import FineTuning
from gptoss_jax.finetune.step import make_program
from gptoss_jax.finetune.trained import open_run
from gptoss_jax.finetune.trainer import check_directory, train
from gptoss_jax.sharding import make_mesh, put

CORPUS = "corpus.npz"
RUN = "run"
SETTINGS = FineTuning(
    method="qat", steps=5000, batch_size=32, sequence_length=1024, learning_rate=2e-3, warmup_steps=200,
    weight_decay=0.1, balance=0.01, save_every=500, keep=2,
)  # fmt: skip
"""32,768 tokens an update."""


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A corpus as token ids of the published vocabulary."""

    seed: int
    conversations: int
    used_ids: Int32[np.ndarray, " ids"]
    """Ascending; the rows that the shipped weights have."""
    examples: list[Example]

    def write(self, path: Path) -> None:
        """Write a compressed file, a twentieth of the ids' size in memory."""
        ids = np.concatenate([example.ids for example in self.examples])
        partial = path.with_suffix(".partial.npz")
        np.savez_compressed(
            partial,
            made_with=np.array([self.seed, self.conversations]),
            used_ids=self.used_ids,
            places=np.searchsorted(self.used_ids, ids).astype(np.uint16),
            trained=np.packbits(np.concatenate([example.trained for example in self.examples])),
            lengths=np.array([len(example.ids) for example in self.examples], np.uint16),
            lines=np.array([example.line for example in self.examples], np.int32),
        )
        partial.rename(path)

    @classmethod
    def read(cls, path: Path) -> "Rendered":
        """Read such a file; raises DataError if it is none."""
        try:
            with path.open("rb") as file, np.load(file) as stored:
                ids = stored["used_ids"][stored["places"]]
                trained = np.unpackbits(stored["trained"], count=len(ids)).astype(bool)
                ends = np.cumsum(stored["lengths"], dtype=np.int64)[:-1]
                parts = zip(np.split(ids, ends), np.split(trained, ends), stored["lines"].tolist(), strict=True)
                seed, conversations = stored["made_with"].tolist()
                return cls(seed, conversations, stored["used_ids"], [Example(*part) for part in parts])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as broken:
            raise DataError(f"no rendered corpus ({broken})", where=str(path), fix="remove it") from broken


class CompactBatches(Batches):
    """Batches whose tokens and targets are places among the used ids."""

    def __init__(self, rendered: Rendered, settings: FineTuning) -> None:
        super().__init__(
            rendered.examples,
            batch_size=settings.batch_size,
            sequence_length=settings.sequence_length,
            seed=settings.seed,
        )
        self._used_ids = rendered.used_ids

    def at(self, step: int) -> Batch:
        batch = super().at(step)
        tokens, targets = (
            np.searchsorted(self._used_ids, ids).astype(np.int32) for ids in (batch.tokens, batch.targets)
        )
        return dataclasses.replace(batch, tokens=tokens, targets=targets)


def render(seed: int, conversations: int) -> Rendered:
    """The corpus of a seed.

    Example:
        >>> rendered = render(seed=1, conversations=2)
        >>> bool(np.isin(rendered.examples[0].ids, rendered.used_ids).all())
        True
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        corpus.main([str(path), "--seed", str(seed), "--count", str(conversations)])
        examples = read_examples(path)
    return Rendered(seed, conversations, corpus.used_ids(examples), examples)


def train_demo(
    directory: Path,
    rendered: Rendered,
    settings: FineTuning = SETTINGS,
    *,
    config: ModelConfig | None = None,
    dtype: Any = "bfloat16",
    report: Any = lambda metrics, steps: None,
) -> Path:
    """Train in `directory`, going on where an earlier call stopped, and return the file of compact weights.

    `config` is the demo's unless another is given; its vocabulary is the published one, of which the rows that the
    corpus does not use stay zero. Raises TrainingError and DataError as `fine_tune` does.
    """
    enable_cache()
    whole = config or demo_config()
    compact = dataclasses.replace(whole, vocab_size=len(rendered.used_ids))
    run = directory / RUN
    described = Description(
        base=run,  # it begins with nothing else
        base_digest=f"random weights, seed {settings.seed}",
        data_digest=f"demo corpus, seed {rendered.seed}, {rendered.conversations} conversations",
        date=datetime.date(corpus.FIRST_YEAR, 1, 1),  # told to no one: every conversation has a date
        config=compact,
        settings=settings,
        steps=settings.steps or 1,
        dtype=str(dtype),
    )
    program = make_program(
        compact,
        training_mesh(make_mesh()),
        lora=None,
        quantize=settings.method == "qat",
        dtype=described.dtype,
        update=optimizer(settings, described.steps),
        balance=settings.balance,
        absent_rows=whole.vocab_size - compact.vocab_size,
    )

    def initial() -> dict[str, jax.Array]:
        values = initial_weights(program.shapes, num_layers=whole.num_layers, seed=settings.seed)
        return {
            path: put(value, NamedSharding(program.mesh, program.trained_specs[path])) for path, value in values.items()
        }

    batches = CompactBatches(rendered, settings)
    check_directory(run, described, resume=is_run(run))
    result = train(described, run, program, batches, initial=initial, resume=is_run(run), report=report)
    *_, last = (run / METRICS).read_text().splitlines()
    return write_compact(
        directory / WEIGHTS,
        open_run(run),
        rendered.used_ids,
        vocab_size=whole.vocab_size,
        made_with={
            "seed": settings.seed,
            "corpus_seed": rendered.seed,
            "conversations": rendered.conversations,
            "steps": result.step,
            "loss": json.loads(last)["loss"],
            "settings": dataclasses.asdict(settings),
            "commit": commit(),
            "device": jax.devices()[0].device_kind,
        },
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gptoss_jax.demo.train", description="Train the demo model.")
    parser.add_argument("directory", type=Path, metavar="OUT")
    parser.add_argument("--seed", type=int, default=1, help="of the corpus, the weights and the order")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument("--conversations", type=int, default=200_000)
    parser.add_argument("--learning-rate", type=float, default=SETTINGS.learning_rate)
    parser.add_argument("--render-only", action="store_true", help="write OUT/corpus.npz and stop")
    options = parser.parse_args(arguments)
    directory: Path = options.directory
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / CORPUS).is_file():
        render(options.seed, options.conversations).write(directory / CORPUS)
    if options.render_only:
        return
    rendered = Rendered.read(directory / CORPUS)
    if (rendered.seed, rendered.conversations) != (options.seed, options.conversations):
        found = f"the corpus of seed {rendered.seed}, {rendered.conversations} conversations"
        raise DataError(found, where=str(directory / CORPUS), fix="name that seed and number, or another directory")
    settings = dataclasses.replace(
        SETTINGS, seed=options.seed, steps=options.steps, learning_rate=options.learning_rate
    )

    def report(metrics: dict[str, Any], steps: int) -> None:
        if metrics["step"] % 20 == 0:
            sys.stdout.write(line(metrics, steps) + "\n")
            sys.stdout.flush()

    weights = train_demo(directory, rendered, settings, report=report)
    sys.stdout.write(f"{weights}: {weights.stat().st_size:,} bytes; {weights.with_name(DESCRIPTION)}\n")


if __name__ == "__main__":
    main()
