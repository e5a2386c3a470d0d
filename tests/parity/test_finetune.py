"""What a real run has trained, exported and loaded by transformers and by PEFT: our logits, and the trainer's loss."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import gptoss_jax
from convert.converter import convert
from convert.export import export
from gptoss_jax.finetune.data import Example, read_examples
from gptoss_jax.finetune.trained import open_run
from gptoss_jax.model.transformer import Transformer
from tests.convert.stand_in_run import Run, trained_weights
from tests.parity.dense import dense_model
from tests.parity.oracles import run_oracle
from tests.parity.test_oracles import NOTICED
from tests.parity.test_parity import LARGEST_DIFFERENCE

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("_oracles")]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A LoRA of everything, a few updates old, and the conversation that the trainer measured it by."""

    published: Path
    """The checkpoint it was trained on, as transformers reads it."""
    directory: Path
    held_out: Example
    loss: float
    """By the trainer, of the conversation's trained tokens."""

    def logits(self, model: Transformer) -> np.ndarray:
        return np.asarray(model(self.held_out.inputs[None])[0])

    def transformers_logits(self, checkpoint: Path, *options: str | Path) -> np.ndarray:
        prompts = {"chat.tokens": self.held_out.inputs[None], "chat.lengths": np.array([len(self.held_out.inputs)])}
        case = SimpleNamespace(prompts=lambda: prompts)
        return run_oracle("transformers", checkpoint, case, *options)["chat.logits"][0]


def chat(number: int) -> str:
    messages = [{"role": "user", "content": f"{number} + 1?"}, {"role": "assistant", "content": str(number + 1)}]
    return json.dumps({"messages": messages, "date": "2025-08-05"}) + "\n"


@pytest.fixture(scope="module")
def tuned(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    folder = tmp_path_factory.mktemp("tuned")
    data, held_out = folder / "chats.jsonl", folder / "held-out.jsonl"
    data.write_text("".join(map(chat, range(8))))
    held_out.write_text(chat(8))
    settings = gptoss_jax.FineTuning(
        rank=4,
        targets=("attention", "router", "experts"),
        steps=4,
        batch_size=2,
        sequence_length=96,
        learning_rate=0.02,
    )
    result = gptoss_jax.fine_tune(
        random_checkpoint, data, folder / "run", settings, evaluation=held_out, dtype="float32"
    )
    (example,) = read_examples(held_out)
    assert result.evaluation is not None
    return Tuned(random_checkpoint.parent / "published", folder / "run", example, result.evaluation)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= LARGEST_DIFFERENCE * expected.std()


def test_merged_run_has_our_logits_in_transformers(tuned: Tuned, tmp_path: Path) -> None:
    export(tuned.directory, tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "merged")
    ours = tuned.logits(gptoss_jax.load(tmp_path / "merged", dtype="float32"))
    assert_same(ours, tuned.transformers_logits(tmp_path / "out"))


def test_adapter_of_a_run_has_our_logits_and_the_trainers_loss_in_peft(tuned: Tuned, tmp_path: Path) -> None:
    export(tuned.directory, tmp_path / "adapter", peft=True)
    theirs = tuned.transformers_logits(tuned.published, "--adapter", tmp_path / "adapter")
    opened = open_run(tuned.directory)
    fields = {field.name: getattr(opened, field.name) for field in dataclasses.fields(opened)}
    run = Run(**fields, arrays={path: opened.read(path) for path in opened.shapes})
    assert_same(tuned.logits(dense_model(run.base, trained_weights(run))), theirs)

    before = tuned.transformers_logits(tuned.published)
    assert np.abs(theirs - before).max() >= NOTICED * before.std(), "too little was trained for this to fail"
    targets, trained = tuned.held_out.ids[1:], tuned.held_out.trained[1:]
    logits = theirs.astype(np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -log_probabilities[np.arange(len(targets)), targets]
    assert losses[trained].mean() == pytest.approx(tuned.loss, rel=1e-5)
