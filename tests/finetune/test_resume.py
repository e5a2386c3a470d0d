"""Runs that stop and go on take the very updates they would have taken, whatever is trained and wherever it lives."""

import dataclasses
import datetime
import json

import jax
import numpy as np
import pytest

from gptoss_jax.finetune.batches import Batches
from gptoss_jax.finetune.checkpoints import saved_steps
from gptoss_jax.finetune.data import Example
from gptoss_jax.finetune.metrics import METRICS
from gptoss_jax.finetune.optimizer import optimizer
from gptoss_jax.finetune.placement import training_mesh
from gptoss_jax.finetune.runs import Description
from gptoss_jax.finetune.settings import FineTuning
from gptoss_jax.finetune.step import Program, make_program
from gptoss_jax.finetune.trained import open_run
from gptoss_jax.finetune.trainer import train
from gptoss_jax.sharding import make_mesh, put
from tests.tiny import TINY

# Wide enough for adafactor to factor its moment.
CONFIG = dataclasses.replace(
    TINY.first_layers(2), hidden_size=128, num_heads=8, num_kv_heads=4, num_experts=8, vocab_size=128
)


class Interrupted(Exception):
    pass


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """XLA optimizes nothing, and nothing is evaluated."""
    monkeypatch.setattr(Program, "compile_evaluation", lambda self: None)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize(
    ("method", "rule", "dtype", "mesh"),
    [
        ("full", "adafactor", "float32", {}),
        ("full", "lion", "bfloat16", {}),
        ("qat", "adamw", "float32", {"data": 2, "expert": 2, "tensor": 2}),
    ],
)
def test_interrupted_run_goes_on_to_the_bit(tmp_path, monkeypatch, method, rule, dtype, mesh):
    settings = FineTuning(
        method=method, optimizer=rule, steps=4, batch_size=2, sequence_length=24, learning_rate=0.01, save_every=2
    )
    made = make_program(
        CONFIG,
        training_mesh(make_mesh(**mesh)),
        lora=None,
        quantize=method == "qat",
        dtype=dtype,
        update=optimizer(settings, 4),
    )
    update = made.compile_step()  # once for all starts: another process would compile the same
    monkeypatch.setattr(Program, "compile_step", lambda self: update)

    def run(name, **options):
        described = Description(
            tmp_path, "base", "data", datetime.date(2025, 8, 5), CONFIG, settings, steps=4, dtype=dtype
        )
        train(described, tmp_path / name, made, batches(), initial=lambda: masters(made), **options)
        return losses(tmp_path / name)

    def interrupt(metrics, steps):
        if metrics["step"] == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        run("interrupted", report=interrupt)
    assert saved_steps(tmp_path / "interrupted") == [2]
    assert run("interrupted", resume=True) == run("whole")
    found, expected = (open_run(tmp_path / name) for name in ("interrupted", "whole"))
    for path in expected.shapes:
        np.testing.assert_array_equal(found.read(path), expected.read(path), err_msg=path)


def batches():
    random = np.random.default_rng(1)
    lengths = random.integers(6, 20, 20)
    examples = [
        Example(random.integers(0, 128, n, np.int32), random.random(n) < 0.7, line) for line, n in enumerate(lengths, 1)
    ]
    return Batches(examples, batch_size=2, sequence_length=24, seed=3)


def masters(made):
    random = np.random.default_rng(2)
    return {
        path: put(random.normal(0, 0.1, leaf.shape).astype(np.float32), leaf.sharding)
        for path, leaf in made.trained_leaves.items()
    }


def losses(directory):
    lines = [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert len({line["loss"] for line in lines}) == 4
    return [(line["loss"], line["gradient_norm"]) for line in lines]
