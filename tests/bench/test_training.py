"""The benchmark of updates: its rows, and the floating point operations it counts."""

import json

import pytest

from gptoss_jax.bench.roofline import Ceilings, training_flops
from gptoss_jax.cli import main
from gptoss_jax.config import gpt_oss_20b
from gptoss_jax.finetune.settings import FineTuning
from gptoss_jax.parameters import num_active_parameters


def test_flops_are_six_for_each_active_parameter_and_the_attention():
    config = gpt_oss_20b()
    flops = training_flops(config, num_tokens=4096, num_rows=2, adapter_values=None)
    matrices = 6 * num_active_parameters(config) * 2 * 4096
    assert matrices < flops < 1.2 * matrices


def test_frozen_weights_have_no_gradients_to_compute():
    config = gpt_oss_20b()
    full, frozen, adapted = (
        training_flops(config, num_tokens=512, num_rows=1, adapter_values=values) for values in (None, 0, 10**7)
    )
    assert full * 0.65 < frozen < full * 0.75
    assert adapted - frozen == 6 * 512 * 10**7


def test_updates_are_measured_and_written(tmp_path, capsys):
    path = tmp_path / "rows.json"
    line = ["bench", "--model", "tiny", "--train", "lora", "--sequence", "16,32", "--rows", "2", "--rank", "2"]
    assert main([*line, "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert [(row["method"], row["rows"], row["sequence_length"]) for row in content["rows"]] == [
        ("lora", 2, 16),
        ("lora", 2, 32),
    ]
    for row in content["rows"]:
        assert row["tokens_per_s"] == pytest.approx(2 * row["sequence_length"] / row["ms"] * 1e3)
        assert row["flops_utilisation"] == pytest.approx(
            row["flops"] / row["ms"] * 1e3 / content["ceilings"]["dense_flops_per_s"]
        )
    assert "2 x 32" in capsys.readouterr().out


def test_defaults_are_the_trainers(monkeypatch):
    asked = []

    class NoTrainer:
        def __init__(self, config, name, settings, mesh):
            asked.append(settings)

        def row(self, *, sequence_length, ceilings):
            asked.append(sequence_length)

    monkeypatch.setattr("gptoss_jax.bench.training.Trainer", NoTrainer)
    monkeypatch.setattr("gptoss_jax.bench.timing.ceilings", lambda: Ceilings(1.0, 1.0))
    assert main(["bench", "--model", "tiny", "--train", "lora"]) == 0
    assert asked == [FineTuning(batch_size=1), FineTuning().sequence_length]


def test_checkpoint_is_no_subject_of_the_training_rows(tmp_path, capsys):
    assert main(["bench", str(tmp_path), "--train", "lora"]) == 2
    assert "a checkpoint and --train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mesh", "message"), [("data=2", "1 rows do not divide over data = 2"), ("expert=3", "8 experts do not divide")]
)
def test_mesh_that_does_not_divide_is_refused(mesh, message, capsys):
    assert main(["bench", "--model", "tiny", "--train", "full", "--mesh", mesh]) == 2
    assert message in capsys.readouterr().err
