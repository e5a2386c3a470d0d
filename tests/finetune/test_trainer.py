"""Whole runs on the demo checkpoint: training, evaluation, interruption, resumption, and what stops them."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.cli import main
from gptoss_jax.errors import CheckpointError, DataError, TrainingError
from gptoss_jax.finetune.checkpoints import saved_steps
from gptoss_jax.finetune.metrics import METRICS
from gptoss_jax.finetune.settings import FineTuning
from gptoss_jax.finetune.trained import open_run
from gptoss_jax.finetune.trainer import Result, fine_tune
from gptoss_jax.sharding import make_mesh

SETTINGS = FineTuning(
    rank=2, targets=("attention", "router", "experts"), steps=4, batch_size=2, sequence_length=128,
    learning_rate=0.02, warmup_steps=1, save_every=2, keep=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Thirty sums, about a hundred tokens each."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    lines = []
    for number in range(30):
        messages = [
            {"role": "user", "content": f"{number} + 1?"},
            {"role": "assistant", "thinking": "Count on.", "content": str(number + 1)},
        ]
        lines.append(json.dumps({"messages": messages, "date": "2025-08-05"}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def finished(random_checkpoint, chats, tmp_path_factory):
    """A run that nothing interrupted, and its result."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    shown = []
    result = fine_tune(
        random_checkpoint, chats, directory, SETTINGS, dtype="float32", report=lambda *line: shown.append(line)
    )
    return directory, result, shown


def lines(directory, kind="train"):
    found = [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def losses(directory):
    return [(line["step"], line["loss"]) for line in lines(directory)]


def test_loss_falls_and_every_update_is_written_down(finished):
    directory, result, shown = finished
    written = lines(directory)
    assert [line["step"] for line in written] == [1, 2, 3, 4]
    assert written[-1]["loss"] < written[0]["loss"] - 0.5
    assert result.loss == written[-1]["loss"]
    assert [metrics for metrics, _ in shown] == written
    assert {steps for _, steps in shown} == {4}
    assert written[0]["learning_rate"] == pytest.approx(0.02)
    assert all(line["tokens"] > 0 and 1 <= line["busiest_expert"] <= 8 for line in written)


def test_vocabulary_on_the_host_changes_no_loss(random_checkpoint, chats, tmp_path):
    settings = dataclasses.replace(SETTINGS, accumulate=2, evaluation=0.1, evaluate_every=2)
    for name, on_host in (("hosted", True), ("plain", False)):
        one = dataclasses.replace(settings, vocabulary_on_host=on_host)
        fine_tune(random_checkpoint, chats, tmp_path / name, one, dtype="float32")
    assert losses(tmp_path / "hosted") == losses(tmp_path / "plain")
    hosted, plain = (lines(tmp_path / name, "evaluation") for name in ("hosted", "plain"))
    assert hosted == plain
    assert [line["step"] for line in hosted] == [2, 4]


def test_newest_checkpoints_are_kept(finished):
    directory, _, _ = finished
    assert saved_steps(directory) == [2, 4]


def test_run_is_read_back_by_rows(finished):
    directory, _, _ = finished
    trained, earlier = open_run(directory), open_run(directory, step=2)
    assert (trained.method, trained.step, earlier.step) == ("lora", 4, 2)
    path = "layers.1.experts.down.lora_b"
    assert trained.read(path).shape == trained.shapes[path]
    assert np.abs(trained.read(path)).max() > 0
    assert not np.array_equal(trained.read(path), earlier.read(path))
    np.testing.assert_array_equal(trained.read(path, slice(3, 5)), trained.read(path)[3:5])


def test_absent_step_and_absent_run_are_named(finished, tmp_path):
    directory, _, _ = finished
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3: .*\[2, 4\]"):
        open_run(directory, step=3)
    with pytest.raises(CheckpointError, match="no fine-tuning run"):
        open_run(tmp_path)


def test_killed_run_goes_on_with_the_same_losses_to_the_bit(finished, random_checkpoint, chats, tmp_path):
    directory = tmp_path / "run"
    settings = tmp_path / "settings.json"
    # A save waits for the one before: once step 3 is reported, that of step 1 is complete.
    settings.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(SETTINGS, save_every=1))))
    command = [sys.executable, "-m", "gptoss_jax.cli", "finetune", str(random_checkpoint), str(chats), str(directory)]
    command += ["--settings", str(settings), "--dtype", "float32", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if json.loads(line)["step"] == 3:
                os.kill(process.pid, signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert 1 <= max(saved_steps(directory)) < 4
    result = fine_tune(random_checkpoint, chats, directory, SETTINGS, dtype="float32", resume=True)
    assert result.step == 4
    assert losses(directory) == losses(finished[0])


def test_run_goes_on_on_another_mesh(finished, random_checkpoint, chats, tmp_path):
    directory = rewound(finished[0], tmp_path)
    mesh = make_mesh(data=2, expert=2)
    fine_tune(random_checkpoint, chats, directory, SETTINGS, dtype="float32", resume=True, mesh=mesh)
    for (step, loss), (_, expected) in zip(losses(directory), losses(finished[0]), strict=True):
        assert loss == pytest.approx(expected, rel=1e-4), step


def rewound(directory, tmp_path):
    """A copy of a run that was interrupted after step 2."""
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    shutil.rmtree(copy / "checkpoints" / "4")
    return copy


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 0.01}, "learning_rate is 0.01, was 0.02"),
        ({"rank": 3}, "rank is 3, was 2"),
        ({"steps": 5}, "steps is 5, was 4"),
    ],
)
def test_other_settings_are_refused(finished, random_checkpoint, chats, tmp_path, change, named):
    directory = rewound(finished[0], tmp_path)
    with pytest.raises(TrainingError, match=f"not the run that was started .settings: {named}"):
        fine_tune(
            random_checkpoint, chats, directory, dataclasses.replace(SETTINGS, **change), dtype="float32", resume=True
        )
    assert saved_steps(directory) == [2]


def test_other_dtype_is_refused(finished, random_checkpoint, chats, tmp_path):
    with pytest.raises(TrainingError, match="dtype is bfloat16, was float32"):
        fine_tune(random_checkpoint, chats, rewound(finished[0], tmp_path), SETTINGS, dtype="bfloat16", resume=True)


def test_other_data_is_refused(finished, random_checkpoint, chats, tmp_path):
    directory = rewound(finished[0], tmp_path)
    other = tmp_path / "other.jsonl"
    other.write_text(chats.read_text().replace("Count on", "Count up"))
    with pytest.raises(TrainingError, match="other conversations, or another --evaluation file"):
        fine_tune(random_checkpoint, other, directory, SETTINGS, dtype="float32", resume=True)


def test_existing_run_is_not_written_over(finished, random_checkpoint, chats, tmp_path):
    with pytest.raises(TrainingError, match=r"not empty: .*--resume"):
        fine_tune(random_checkpoint, chats, finished[0], SETTINGS)
    with pytest.raises(TrainingError, match="no run to resume"):
        fine_tune(random_checkpoint, chats, tmp_path, SETTINGS, resume=True)


def test_loss_that_is_no_number_stops_the_run_and_keeps_what_was_good(random_checkpoint, chats, tmp_path, monkeypatch):
    """The second update goes astray, which only the third one sees: its checkpoint is no good."""
    monkeypatch.setattr(
        "gptoss_jax.finetune.optimizer.learning_rates",
        lambda settings, steps: lambda step: jnp.where(step == 1, 1e30, 0.01),
    )
    wild = dataclasses.replace(SETTINGS, optimizer="sgd", clip_norm=1e30, save_every=1)
    with pytest.raises(TrainingError, match=r"loss nan.* at step 3: the last good checkpoint is of step 1"):
        fine_tune(random_checkpoint, chats, tmp_path / "run", wild, dtype="float32")
    assert saved_steps(tmp_path / "run") == [1]
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2]


def test_last_state_is_not_saved_if_it_is_no_good(random_checkpoint, chats, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "gptoss_jax.finetune.optimizer.learning_rates", lambda settings, steps: lambda step: jnp.float32(jnp.inf)
    )
    settings = dataclasses.replace(SETTINGS, optimizer="sgd", steps=1)
    with pytest.raises(
        TrainingError, match=r"the largest value .* at step 2: the last good checkpoint is of step None"
    ):
        fine_tune(random_checkpoint, chats, tmp_path / "run", settings, dtype="float32")
    assert saved_steps(tmp_path / "run") == []


def test_start_that_failed_can_be_made_again(random_checkpoint, chats, tmp_path, monkeypatch):
    """As when it is killed before the first checkpoint."""
    settings = dataclasses.replace(SETTINGS, steps=1)
    with monkeypatch.context() as patch:
        patch.setattr("gptoss_jax.finetune.trainer.frozen_parameters", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fine_tune(random_checkpoint, chats, tmp_path / "run", settings)
    assert fine_tune(random_checkpoint, chats, tmp_path / "run", settings, resume=True).step == 1


def test_vocabulary_without_the_conversations_tokens_is_refused(chats, tmp_path):
    from convert.converter import convert
    from convert.synthetic import _small, write_checkpoint

    write_checkpoint(tmp_path / "published", _small(vocab_size=256))
    convert(tmp_path / "published", tmp_path / "small")
    with pytest.raises(DataError, match=r"token id 2000\d\d, the model's vocabulary has 256"):
        fine_tune(tmp_path / "small", chats, tmp_path / "run", SETTINGS)


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 15), (0.2, 3), (2.1, 32)])
def test_epochs_are_counted_in_updates(random_checkpoint, chats, tmp_path, monkeypatch, epochs, steps):
    described = []

    def no_run(run, *_, **__):
        described.append(run)
        return Result(run.steps, 0.0, None)

    monkeypatch.setattr("gptoss_jax.finetune.trainer.train", no_run)
    settings = dataclasses.replace(SETTINGS, steps=None, epochs=epochs)
    fine_tune(random_checkpoint, chats, tmp_path / "run", settings)
    assert described[0].steps == steps


def test_command_trains_for_a_share_of_an_epoch(random_checkpoint, chats, tmp_path, capsys):
    options = ["--epochs", "0.2", "--targets", "router", "--batch-size", "2", "--sequence-length", "128"]
    command = ["finetune", str(random_checkpoint), str(chats), str(tmp_path / "run"), *options]
    assert main(command) == 0
    *told, end = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in told] == ["step 1/3", "step 2/3", "step 3/3"]
    assert end.startswith("3 updates are made; gptoss-jax export ")
    assert saved_steps(tmp_path / "run") == [3]
    assert main([*command, "--resume"]) == 0
    assert capsys.readouterr().out.splitlines() == [end]


def test_rank_above_the_models_width_is_refused_before_anything_is_written(random_checkpoint, chats, tmp_path):
    settings = dataclasses.replace(SETTINGS, rank=10**8)
    with pytest.raises(TrainingError, match=r"rank = 100000000: settings: give at most the model's width, \d+"):
        fine_tune(random_checkpoint, chats, tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()


# Orbax' threads go on for a moment after their event loop, and say so to nobody.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_full_disk_is_named_and_leaves_the_last_checkpoint(finished, random_checkpoint, chats, tmp_path):
    directory = rewound(finished[0], tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(TrainingError, match=r"disk full while saving .*last complete step is 2: .*--resume"):
            fine_tune(random_checkpoint, chats, directory, SETTINGS, dtype="float32", resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert saved_steps(directory) == [2]
    fine_tune(random_checkpoint, chats, directory, SETTINGS, dtype="float32", resume=True)
    assert losses(directory) == losses(finished[0])


def test_held_out_conversations_are_measured(random_checkpoint, chats, tmp_path):
    settings = dataclasses.replace(SETTINGS, evaluation=0.2, evaluate_every=2, batch_size=4, accumulate=2)
    result = fine_tune(random_checkpoint, chats, tmp_path / "run", settings, dtype="float32", tensorboard=True)
    measured = lines(tmp_path / "run", "evaluation")
    assert [line["step"] for line in measured] == [2, 4]
    assert measured[1]["loss"] == result.evaluation < measured[0]["loss"]
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_rows_must_divide_over_data(random_checkpoint, chats, tmp_path):
    settings = dataclasses.replace(SETTINGS, accumulate=2)
    with pytest.raises(TrainingError, match="1 rows at once do not divide over data = 2"):
        fine_tune(random_checkpoint, chats, tmp_path / "run", settings, mesh=make_mesh(data=2))


def test_conversation_longer_than_a_row_is_refused_before_anything_is_written(random_checkpoint, chats, tmp_path):
    with pytest.raises(DataError, match=r"30 conversations of over 16 tokens: .*chats\.jsonl, lines 1, 2, "):
        fine_tune(random_checkpoint, chats, tmp_path / "run", dataclasses.replace(SETTINGS, sequence_length=16))
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text(chats.read_text().replace("3 + 1?", f"{'3 + 1? ' * 40}"))
    with pytest.raises(DataError, match=r"3 conversations of over 128 tokens: .*held-out\.jsonl, lines 4, 14, 24:"):
        fine_tune(random_checkpoint, chats, tmp_path / "run", SETTINGS, evaluation=held_out)
    assert not (tmp_path / "run").exists()
