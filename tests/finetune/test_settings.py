"""Settings: what is refused, the learning rates, and where the command line takes them from."""

import dataclasses
import itertools
import json

import pytest

from gptoss_jax.cli import _parser
from gptoss_jax.errors import TrainingError
from gptoss_jax.finetune.command import settings_of
from gptoss_jax.finetune.optimizer import learning_rates
from gptoss_jax.finetune.settings import FineTuning


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"rank": 0}, "rank 0"),
        ({"targets": ["heads"]}, "targets = ..heads"),
        ({"learning_rate": -1.0}, "learning_rate = -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate = nan"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"batch_size": 3, "accumulate": 2}, "accumulate = 2: settings: divide batch_size 3"),
        ({"steps": 0}, "steps = 0"),
        ({"keep": 1}, "keep = 1"),
        ({"optimizer": "sgd", "weight_decay": 0.1}, "weight_decay = 0.1.* use adamw or lion"),
        ({"method": "full", "rank": 8}, "rank = 8: settings: leave it out: method full has no adapters"),
        ({"method": "qat", "alpha": 8.0}, "alpha = 8.0: settings: leave it out"),
        ({"method": "qat", "targets": ["router"]}, "targets = .*: settings: leave it out"),
        ({"method": "full", "vocabulary_on_host": True}, "vocabulary_on_host = True: settings: leave it out"),
        ({"steps": 5, "epochs": 2.0}, "epochs = 2.0: settings: leave it out: steps says"),
        ({"seed": 2**64}, "seed"),
        ({"steps": 10**400}, "steps = 1000"),
        ({"learning_rate": 1e300}, "learning_rate = 1e.300: settings: .* not so large"),
        ({"epochs": 1e6}, "epochs = 1000000.0"),
        ({"evaluation": 1.0}, "evaluation = 1.0"),
        ({"channels": ["thoughts"]}, "channels"),
        ({"learning_rat": 1.0}, "unknown setting 'learning_rat'"),
    ],
)
def test_impossible_settings_are_named(content, named):
    with pytest.raises(TrainingError, match=named):
        FineTuning.from_json(content, where="settings.json")


def test_settings_come_back_from_json():
    settings = FineTuning(method="qat", steps=7, channels=("final",), balance=0.01)
    assert FineTuning.from_json(json.loads(json.dumps(dataclasses.asdict(settings))), where="run.json") == settings


def test_whole_numbers_stand_for_others():
    assert FineTuning.from_json({"epochs": 2, "alpha": 8}, where="settings.json") == FineTuning(epochs=2.0, alpha=8.0)


@pytest.mark.parametrize("text", ["[]", "{", '"lora"'])
def test_unreadable_settings_are_named(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(TrainingError, match=r"settings"):
        FineTuning.read(tmp_path / "settings.json")


def test_options_come_before_the_file_and_the_file_before_the_defaults(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text('{"rank": 4, "learning_rate": 0.5}')
    line = ["finetune", "CKPT", "DATA", "RUN", "--settings", str(path), "--rank", "6", "--targets", "router,experts"]
    settings = settings_of(_parser().parse_args(line))
    assert (settings.rank, settings.learning_rate, settings.targets) == (6, 0.5, ("router", "experts"))
    assert settings.sequence_length == FineTuning().sequence_length


@pytest.mark.parametrize(
    ("written", "option", "steps", "epochs"),
    [('{"epochs": 2}', ["--steps", "7"], 7, 1.0), ('{"steps": 7}', ["--epochs", "0.5"], None, 0.5)],
)
def test_option_for_the_length_takes_the_place_of_the_files(tmp_path, written, option, steps, epochs):
    path = tmp_path / "settings.json"
    path.write_text(written)
    settings = settings_of(_parser().parse_args(["finetune", "CKPT", "DATA", "RUN", "--settings", str(path), *option]))
    assert (settings.steps, settings.epochs) == (steps, epochs)


@pytest.mark.parametrize(("schedule", "last"), [("constant", 2.0), ("linear", 0.2), ("cosine", 0.2)])
def test_learning_rate_rises_then_follows_the_schedule(schedule, last):
    rates = learning_rates(FineTuning(learning_rate=2.0, schedule=schedule, warmup_steps=4), 24)
    found = [float(rates(step)) for step in range(25)]
    assert found[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert found[24] == pytest.approx(last)
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(found[4:]))
