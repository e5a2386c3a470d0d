"""What `export` writes, loaded by transformers and by PEFT: the same float32 logits as our model has."""

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import gptoss_jax
from convert.converter import convert
from convert.export import export
from gptoss_jax.model.transformer import Transformer
from tests.convert.stand_in_run import Run, base_weights, lora_run, trained_weights
from tests.parity.dense import dense_model
from tests.parity.oracles import run_oracle
from tests.parity.recipes import TINY_CASE
from tests.parity.test_oracles import NOTICED
from tests.parity.test_parity import LARGEST_DIFFERENCE
from tests.parity.workshop import Workshop

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("_oracles")]

CASE = dataclasses.replace(TINY_CASE, lengths={"ragged": TINY_CASE.lengths["ragged"]})


@pytest.fixture
def workshop(workshops: dict[str, Workshop]) -> Workshop:
    return workshops[CASE.name]


def logits(model: Transformer) -> np.ndarray:
    """At every position that is no padding."""
    tokens, lengths = (CASE.prompts()[f"ragged.{name}"] for name in ("tokens", "lengths"))
    return np.asarray(model(tokens))[np.arange(tokens.shape[1]) < lengths[:, None]]


def assert_transformers_agrees(model: Transformer, checkpoint: Path, *options: str | Path) -> None:
    """The same logits from our `model` and from transformers, which loads `checkpoint`."""
    said = run_oracle("transformers", checkpoint, CASE, *options)["ragged.logits"]
    expected = said[said.any(-1)]
    assert np.abs(logits(model) - expected).max() <= LARGEST_DIFFERENCE * expected.std()


@pytest.fixture
def run(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A LoRA of everything it can change, by a fifth of the weights' norm or so; what `export` is given."""
    run = lora_run(workshop.converted("hf"), alpha=0.75)
    monkeypatch.setattr("convert.export._open_run", lambda directory, **where: run)
    return run


@pytest.mark.parametrize("dtype", ["mxfp4", "bf16"])
def test_exported_checkpoint(workshop: Workshop, tmp_path: Path, dtype) -> None:
    export(workshop.converted("hf"), tmp_path / "out", dtype=dtype, max_shard_bytes=200_000)
    assert_transformers_agrees(workshop.model("hf", "float32"), tmp_path / "out")


def test_merged_lora(run: Run, tmp_path: Path) -> None:
    export(tmp_path / "run", tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "merged")
    model = gptoss_jax.load(tmp_path / "merged", dtype=np.float32)
    assert_transformers_agrees(model, tmp_path / "out")


def test_merged_lora_in_bf16(run: Run, tmp_path: Path) -> None:
    export(tmp_path / "run", tmp_path / "out", dtype="bf16")
    rounded = {
        path: values.astype(ml_dtypes.bfloat16).astype(np.float32) for path, values in trained_weights(run).items()
    }
    assert_transformers_agrees(dense_model(run.base, rounded), tmp_path / "out")


def test_peft_adapter_is_the_unmerged_lora(workshop: Workshop, run: Run, tmp_path: Path) -> None:
    export(tmp_path / "run", tmp_path / "adapter", peft=True)
    model = dense_model(run.base, trained_weights(run))
    assert_transformers_agrees(model, workshop.checkpoints / "hf", "--adapter", tmp_path / "adapter")


@pytest.mark.parametrize("target", ["attention", "router", "experts"])
def test_every_target_of_the_adapter_is_noticed(run: Run, target: str) -> None:
    others = {path: values for path, values in run.arrays.items() if f".{target}." not in path}
    without = dense_model(run.base, trained_weights(dataclasses.replace(run, arrays=others)))
    whole = logits(dense_model(run.base, trained_weights(run)))
    assert np.abs(logits(without) - whole).max() >= NOTICED * whole.std()


def test_weights_written_out_give_the_logits_of_packed_ones(workshop: Workshop) -> None:
    checkpoint = workshop.converted("hf")
    found = logits(dense_model(checkpoint, base_weights(checkpoint)))
    expected = logits(workshop.model("hf", "float32"))
    assert np.abs(found - expected).max() <= LARGEST_DIFFERENCE * expected.std()
