"""The run: load, train, evaluate, save, and take up again what was interrupted."""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptoss_jax import distributed
from gptoss_jax.compilation import enable_cache
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import DataError, TrainingError
from gptoss_jax.finetune.batches import Batch, Batches
from gptoss_jax.finetune.checkpoints import Checkpoints, named_disk_errors
from gptoss_jax.finetune.data import Example, read_examples, split
from gptoss_jax.finetune.forward import Arrays
from gptoss_jax.finetune.initial import frozen_parameters, masters, new_adapters
from gptoss_jax.finetune.metrics import Metrics, MetricsWriter
from gptoss_jax.finetune.optimizer import learning_rates, optimizer
from gptoss_jax.finetune.placement import training_mesh
from gptoss_jax.finetune.runs import Description, digest_of, is_run
from gptoss_jax.finetune.settings import FineTuning
from gptoss_jax.finetune.step import Frozen, Program, Report, State, make_program
from gptoss_jax.manifest import CONFIG, read_manifest
from gptoss_jax.sharding import check_mesh, fetch, make_mesh


@dataclasses.dataclass(frozen=True)
class Result:
    """Where a run ended."""

    step: int
    """Updates made."""
    loss: float
    """Of the last update's batch, before it; no number if a run was resumed that had made all its updates."""
    evaluation: float | None
    """Mean loss over the held-out conversations at the end, if there are any."""


def fine_tune(
    checkpoint: str | Path,
    data: str | Path,
    run: str | Path,
    settings: FineTuning,
    *,
    mesh: Mesh | None = None,
    evaluation: str | Path | None = None,
    dtype: Any = "bfloat16",
    resume: bool = False,
    tensorboard: bool = False,
    report: Callable[[Metrics, int], object] = lambda metrics, steps: None,
) -> Result:
    """Fine-tune the converted `checkpoint` on the conversations of `data`, into the new directory `run`.

    `evaluation` is a file of conversations to measure by; without one, `settings.evaluation` holds out a share of the
    data. `report` gets what is written to the run's metrics, as it is written, and the run's number of updates. With
    `resume` a run that was interrupted goes on from its newest checkpoint and takes the very updates it would have
    taken, on this mesh or another. `gptoss-jax export` turns a run into safetensors.

    Raises DataError for data that cannot be trained on, CheckpointError for the checkpoint, ShardingError for a mesh
    that does not divide the model, and TrainingError for settings that do not fit together, a run that exists, a loss
    that is no number any more, or a checkpoint that could not be written; what was saved before stays.

    Example:
        >>> fine_tune("gpt-oss-20b", "chats.jsonl", "run", FineTuning(rank=8), report=print)  # doctest: +SKIP
    """
    enable_cache()
    checkpoint, directory = Path(checkpoint), Path(run)
    files = [Path(data)] + ([] if evaluation is None else [Path(evaluation)])
    read_manifest(checkpoint)
    config = ModelConfig.read(checkpoint / CONFIG)
    mesh = make_mesh() if mesh is None else mesh
    check_mesh(config, mesh)
    _check_fits(settings, config, mesh)
    begun = Description.read(directory).date if resume and is_run(directory) else datetime.date.today()
    date = datetime.date.fromisoformat(distributed.tell(begun.isoformat()))  # hosts may be in different time zones
    batches, held_out = _batches(settings, files, date, config.vocab_size)
    described = Description(
        base=checkpoint,
        base_digest=digest_of(checkpoint),
        data_digest=hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest(),
        date=date,
        config=config,
        settings=settings,
        steps=settings.steps or _steps(batches, settings.epochs),
        dtype=str(dtype),
    )
    check_directory(directory, described, resume=resume)
    _check_same(described)
    program = make_program(
        config,
        training_mesh(mesh),
        lora=settings.lora,
        quantize=settings.method == "qat",
        dtype=described.dtype,
        update=optimizer(settings, described.steps),
        balance=settings.balance,
        vocabulary_on_host=settings.vocabulary_on_host,
    )
    return train(
        described,
        directory,
        program,
        batches,
        frozen=lambda: frozen_parameters(program, checkpoint) if settings.lora else Frozen(),
        initial=lambda: new_adapters(program, settings.seed) if settings.lora else masters(program, checkpoint),
        held_out=held_out,
        resume=resume,
        tensorboard=tensorboard,
        report=report,
    )


def train(
    described: Description,
    directory: Path,
    program: Program,
    batches: Batches,
    *,
    initial: Callable[[], dict[str, jax.Array]],
    frozen: Callable[[], Frozen] = Frozen,
    held_out: Batches | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    report: Callable[[Metrics, int], object] = lambda metrics, steps: None,
) -> Result:
    """Run a program on batches from what `initial` gives, or with `resume` from the directory's newest checkpoint.

    What `fine_tune` does once it knows what to train, the directory checked; `frozen` gives what is not trained. Raises
    TrainingError as it does.
    """
    with named_disk_errors(directory):
        if distributed.is_first():
            described.write(directory)  # before anything else: a start that fails can be taken up again
        with contextlib.closing(Checkpoints(directory, keep=described.settings.keep)) as checkpoints:
            resumed = checkpoints.latest if resume else None
            fixed = frozen()
            state = program.start(initial()) if resumed is None else checkpoints.restore(program)
            loop = _Loop(described, program, fixed, batches, held_out, checkpoints, report)
            with loop.writing(directory, resumed or 0, tensorboard=tensorboard):
                return loop.run(state)


class _Loop:
    """Updates from a state to the last, with what is measured and saved on the way.

    Dispatch runs one update ahead of what is read back, so that the devices need not wait for the host.
    """

    def __init__(
        self,
        described: Description,
        program: Program,
        frozen: Frozen,
        batches: Batches,
        held_out: Batches | None,
        checkpoints: Checkpoints,
        report: Callable[[Metrics, int], object],
    ) -> None:
        self._settings, self._steps = described.settings, described.steps
        self._program, self._frozen = program, frozen
        self._batches, self._held_out = batches, held_out
        self._checkpoints = checkpoints
        self._report = report
        self._rates = learning_rates(self._settings, self._steps)
        self._update = program.compile_step()
        self._evaluate = program.compile_evaluation()
        self._writer: MetricsWriter | None = None
        self._clock = time.perf_counter()

    @contextlib.contextmanager
    def writing(self, directory: Path, step: int, *, tensorboard: bool) -> Iterator[None]:
        """Metrics go to the directory, from the first process, and go on there from `step`."""
        if distributed.is_first():
            self._writer = MetricsWriter(directory, step=step, tensorboard=tensorboard)
        try:
            yield
        finally:
            if self._writer is not None:
                self._writer.close()

    def run(self, state: State) -> Result:
        settings, first = self._settings, int(state.step)
        pending: tuple[int, Report, int] | None = None
        loss, evaluation = math.nan, None
        for step in range(first, self._steps):
            rows = self._batches.at(step)
            state, found = self._update(state, self._frozen.arrays, self._placed(rows, parts=settings.accumulate))
            if pending is not None:
                loss = self._read(*pending)
            pending = step, found, int((rows.segments > 0).sum())
            done = step + 1
            is_last = done == self._steps
            evaluates = is_last or (settings.evaluate_every and done % settings.evaluate_every == 0)
            saves = is_last or done % settings.save_every == 0
            if saves or evaluates:
                loss, pending = self._read(*pending), None
            if evaluates and self._held_out is not None:
                evaluation = self._measure(done, state)
            if saves:
                self._check_sound(done, {"the largest value": float(_largest(state.trained))})
                self._checkpoints.save(done, state)
        self._checkpoints.wait()
        return Result(self._steps, loss, evaluation)

    def _read(self, step: int, found: Report, num_tokens: int) -> float:
        """Wait for an update, see that it is sound, and write down what it saw."""
        values = fetch(found, self._program.mesh)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        loss, norm = float(values.loss), float(values.gradient_norm)
        self._check_sound(step, {"loss": loss, "gradient norm": norm})
        counts = np.asarray(values.expert_counts, np.float64)
        mean = np.maximum(counts.mean(axis=1), 1e-9)
        self._write(
            {
                "kind": "train",
                "step": step + 1,
                "epoch": self._batches.epoch_of(step)[0],
                "loss": loss,
                "tokens": float(values.tokens),
                "gradient_norm": norm,
                "learning_rate": float(jnp.asarray(self._rates(step))),
                "balance": float(values.balance),
                "busiest_expert": float((counts.max(axis=1) / mean).mean()),
                "idle_experts": float((counts == 0).sum(axis=1).mean()),
                "tokens_per_s": num_tokens / seconds,
                "seconds": seconds,
            }
        )
        return loss

    def _check_sound(self, step: int, found: dict[str, float]) -> None:
        """Raise TrainingError if what was found in the state after `step` updates is no number.

        A checkpoint of that state is taken away: the ones before have been read soundly.
        """
        if all(math.isfinite(value) for value in found.values()):
            return
        self._checkpoints.remove(step)
        what = ", ".join(f"{name} {value}" for name, value in found.items())
        raise TrainingError(
            f"{what} at step {step + 1}",
            where=f"the last good checkpoint is of step {self._checkpoints.latest}",
            fix="look at the data of the steps before, or start another run with a lower learning rate",
        )

    def _measure(self, done: int, state: State) -> float:
        assert self._held_out is not None
        loss = tokens = 0.0
        for step in range(self._held_out.steps_per_epoch(0)):
            batch = self._placed(self._held_out.at(step), parts=1)
            found = fetch(self._evaluate(state.trained, self._frozen.arrays, batch), self._program.mesh)
            loss, tokens = loss + float(found.loss), tokens + float(found.tokens)
        self._check_sound(done, {"evaluation loss": loss / tokens})
        self._write({"kind": "evaluation", "step": done, "loss": loss / tokens, "tokens": tokens})
        self._clock = time.perf_counter()
        return loss / tokens

    def _placed(self, rows: Batch, *, parts: int) -> Batch:
        return self._program.place(rows, parts=parts, embedding=self._frozen.embedding)

    def _write(self, metrics: Metrics) -> None:
        if self._writer is not None:
            self._writer.write(metrics)
            self._report(metrics, self._steps)


def _batches(
    settings: FineTuning, files: Sequence[Path], date: datetime.date, vocab_size: int
) -> tuple[Batches, Batches | None]:
    """What is trained on, and what is held out."""
    data, *others = (
        read_examples(file, channels=settings.channels, reasoning=settings.reasoning, date=date) for file in files
    )
    held_out: list[Example] = others[0] if others else []
    largest = max(int(example.ids.max()) for example in [*data, *held_out])
    if largest >= vocab_size:
        raise DataError(
            f"token id {largest}, the model's vocabulary has {vocab_size}",
            where=str(files[0]),
            fix="name a checkpoint with the vocabulary of harmony",
        )
    if settings.evaluate_every and not (others or settings.evaluation):
        raise TrainingError(
            "evaluate_every without conversations to measure by",
            where="settings",
            fix="name a file with --evaluation, or give evaluation, a share of the data",
        )
    if not others and settings.evaluation:
        data, held_out = split(data, settings.evaluation, settings.seed)

    def batches(examples: list[Example], file: Path, *, shuffle: bool, batch_size: int) -> Batches:
        return Batches(
            examples,
            batch_size=batch_size,
            sequence_length=settings.sequence_length,
            seed=settings.seed,
            shuffle=shuffle,
            truncate=settings.truncate,
            source=file,
        )

    part = settings.batch_size // settings.accumulate
    evaluated = batches(held_out, files[-1], shuffle=False, batch_size=part) if held_out else None
    return batches(data, files[0], shuffle=True, batch_size=settings.batch_size), evaluated


def _steps(batches: Batches, epochs: float) -> int:
    """Updates in so many epochs; the last one may be a part."""
    whole = int(epochs)
    steps = sum(batches.steps_per_epoch(epoch) for epoch in range(whole))
    part = round((epochs - whole) * batches.steps_per_epoch(whole), 6)  # 0.1 of 10 is 1, not a little more
    return steps + math.ceil(part)


@jax.jit
def _largest(trained: Arrays) -> jax.Array:
    """The largest magnitude, which is no number if one of them is none."""
    return jnp.max(jnp.stack([jnp.max(jnp.abs(values)) for values in trained.values()]))


def _check_fits(settings: FineTuning, config: ModelConfig, mesh: Mesh) -> None:
    if settings.lora and settings.rank > config.hidden_size:
        raise TrainingError(
            f"rank = {settings.rank}", where="settings", fix=f"give at most the model's width, {config.hidden_size}"
        )
    rows, data = settings.batch_size // settings.accumulate, mesh.shape["data"]
    if rows % data:
        raise TrainingError(
            f"{rows} rows at once do not divide over data = {data}",
            where=f"batch_size {settings.batch_size}, accumulate {settings.accumulate}",
            fix="choose a batch_size that accumulate times the data axis divides",
        )


def _check_same(described: Description) -> None:
    """See that all processes are about to do the same; none writes before all have looked at the directory."""
    content = described.to_json()
    del content["base"]  # its path may be another on each host
    first, *others = distributed.exchange("run", json.dumps(content, sort_keys=True))
    for index, other in enumerate(others, 1):
        if other != first:
            raise TrainingError(
                f"process {index} has other data, settings or another checkpoint than process 0",
                where="the processes",
                fix="give all of them the same",
            )


def check_directory(directory: Path, described: Description, *, resume: bool) -> None:
    """Raise TrainingError unless a run can start in the directory, or with `resume` go on."""
    where = str(directory)
    if not resume and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        fix = "continue it with --resume, or name another directory" if is_run(directory) else "name a new directory"
        raise TrainingError("the directory is not empty", where=where, fix=fix)
    if resume:
        if not is_run(directory):
            raise TrainingError("no run to resume", where=where, fix="leave out --resume, or name a run's directory")
        described.refuse_other(Description.read(directory), directory)
