"""What an update of a fine-tuning takes: tokens a second, memory, and the share of the card's rate that the model uses.

With random weights of a published shape, drawn where they stay, and rows of random tokens, all of them trained.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptoss_jax.bench.report import peak_bytes
from gptoss_jax.bench.roofline import Ceilings, training_flops
from gptoss_jax.bench.timing import measure
from gptoss_jax.bench.weights import random_arrays
from gptoss_jax.config import ModelConfig
from gptoss_jax.finetune.batches import Batch
from gptoss_jax.finetune.initial import new_adapters, read_frozen
from gptoss_jax.finetune.optimizer import optimizer
from gptoss_jax.finetune.placement import training_mesh
from gptoss_jax.finetune.settings import FineTuning
from gptoss_jax.finetune.step import Frozen, Program, make_program
from gptoss_jax.sharding import check_batch, check_mesh

_STEPS = 1000  # of the schedule, which costs the same whatever its length


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """One measurement: updates of `rows` rows of `sequence_length` tokens."""

    model: str
    method: str
    optimizer: str
    rank: int | None
    rows: int
    sequence_length: int
    ms: float
    """Median of an update."""
    spread: float
    """From the 10th to the 90th percentile, in milliseconds."""
    tokens_per_s: float
    flops: float
    """Of an update, as `roofline.training_flops` counts them."""
    flops_utilisation: float
    """`flops` over what the devices would multiply in the time, at the rate measured in the same run."""
    peak_bytes: int | None
    """The most that JAX has held on the first device up to the end of this row, weights included."""
    compile_s: float

    def __str__(self) -> str:
        peak = "-" if self.peak_bytes is None else f"{self.peak_bytes / 1e9:.2f}"
        return (
            f"{self.model:8} {self.method:5} {self.optimizer:9} {self.rows:4} x {self.sequence_length:<6} "
            f"{self.ms:10.1f} ms {self.tokens_per_s:10.0f} tokens/s {100 * self.flops_utilisation:6.1f} % "
            f"{peak:>7} GB, compiled in {self.compile_s:.0f} s"
        )


class Trainer:
    """A model's weights, drawn once, for rows of several lengths.

    Raises ShardingError for a mesh that does not divide the model or the settings' rows.
    """

    def __init__(self, config: ModelConfig, name: str, settings: FineTuning, mesh: Mesh) -> None:
        check_mesh(config, mesh)
        check_batch(settings.batch_size, mesh)
        self._name, self._settings, self._config = name, settings, config
        self._program: Program = make_program(
            config,
            training_mesh(mesh),
            lora=settings.lora,
            quantize=settings.method == "qat",
            dtype=jnp.bfloat16,
            update=optimizer(settings, _STEPS),
            vocabulary_on_host=settings.vocabulary_on_host,
        )
        if settings.lora is None:
            self._frozen = Frozen()
            trained = random_arrays(self._program.trained_leaves)
        else:
            seeds = itertools.count()
            self._frozen = read_frozen(self._program, lambda leaves: random_arrays(leaves, seed=next(seeds)))
            trained = new_adapters(self._program, seed=0)
        self._state: Any = self._program.start(trained)

    def row(self, *, sequence_length: int, ceilings: Ceilings) -> TrainingRow:
        """Measure updates of the settings' rows at this length; `ceilings` are those of all devices together."""
        settings = self._settings
        batch = self._program.place(
            _random_batch(self._config, settings.batch_size, sequence_length),
            parts=settings.accumulate,
            embedding=self._frozen.embedding,
        )
        step = self._program.compile_step()

        def update(_: None) -> jax.Array:
            self._state, report = step(self._state, self._frozen.arrays, batch)
            return report.loss

        times = measure(update)
        flops = training_flops(
            self._config,
            num_tokens=sequence_length,
            num_rows=settings.batch_size,
            adapter_values=_values_used(self._program) if settings.lora else None,
        )
        seconds = times.median / 1e3
        return TrainingRow(
            model=self._name,
            method=settings.method,
            optimizer=settings.optimizer,
            rank=settings.rank if settings.lora else None,
            rows=settings.batch_size,
            sequence_length=sequence_length,
            ms=times.median,
            spread=times.spread,
            tokens_per_s=settings.batch_size * sequence_length / seconds,
            flops=float(flops),
            flops_utilisation=float(flops / seconds / ceilings.dense_flops_per_s),
            peak_bytes=peak_bytes(),
            compile_s=(times.first - times.median) / 1e3,
        )


def _values_used(program: Program) -> int:
    """Values of adapters that one token is multiplied by: of an expert's, those of the experts it chooses."""
    config = program.form.config
    share = config.experts_per_token / config.num_experts
    return round(
        sum(math.prod(shape) * (share if ".experts." in path else 1) for path, shape in program.shapes.items())
    )


def _random_batch(config: ModelConfig, rows: int, sequence_length: int) -> Batch:
    random = np.random.default_rng(0)
    ids = random.integers(0, config.vocab_size, (rows, sequence_length + 1), np.int32)
    shape = rows, sequence_length
    return Batch(
        tokens=ids[:, :-1].copy(),
        targets=ids[:, 1:].copy(),
        weights=np.ones(shape, np.float32),
        segments=np.ones(shape, np.int32),
        positions=np.broadcast_to(np.arange(sequence_length, dtype=np.int32), shape).copy(),
    )
