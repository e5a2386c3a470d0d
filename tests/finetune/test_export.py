"""From a run to safetensors and back: what is exported is what was trained."""

import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from convert.converter import convert
from convert.export import export
from gptoss_jax.checkpoint import load
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import CheckpointError, ConversionError
from gptoss_jax.finetune.placement import training_mesh
from gptoss_jax.finetune.settings import FineTuning
from gptoss_jax.finetune.step import make_program
from gptoss_jax.finetune.trained import open_run
from gptoss_jax.finetune.trainer import fine_tune
from gptoss_jax.manifest import CONFIG
from gptoss_jax.sharding import make_mesh
from tests.finetune.batches import mean_loss, random_batch


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    path.write_text(json.dumps({"messages": messages, "date": "2025-08-05"}) + "\n")
    return path


def trained(checkpoint, chats, directory, **settings):
    fine_tune(
        checkpoint, chats, directory, FineTuning(steps=2, batch_size=1, sequence_length=96, clip_norm=1e9, **settings)
    )
    return directory


def test_quantization_aware_run_exports_the_weights_that_it_trained(random_checkpoint, chats, tmp_path):
    run = trained(random_checkpoint, chats, tmp_path / "run", method="qat", optimizer="sgd", learning_rate=0.1)
    export(run, tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "converted")
    batch = random_batch([[40], [40]], sequence_length=40, vocab_size=201088)
    found = mean_loss(load(tmp_path / "converted", dtype=jnp.float32, impl="reference"), batch)

    made, masters = by_hand(run)
    sums = made.compile_evaluation()(masters, {}, made.place(batch, parts=1))
    before = mean_loss(load(random_checkpoint, dtype=jnp.float32, impl="reference"), batch)
    assert found == pytest.approx(float(sums.loss / sums.tokens), rel=1e-5)
    assert abs(found - before) > 1e-3, "the run changed too little for this to fail"


def by_hand(run):
    """A program in float32 on a run's masters, those that are exported in bfloat16 rounded to it."""
    opened = open_run(run)
    mesh = training_mesh(make_mesh())
    made = make_program(opened.config, mesh, lora=None, quantize=True, dtype=jnp.float32, update=optax.sgd(1.0))
    masters = {}
    for path in opened.shapes:
        values = opened.read(path)
        if not path.endswith(("gate_up.weight", "down.weight")):
            values = values.astype(ml_dtypes.bfloat16).astype(np.float32)
        masters[path] = jnp.asarray(values, device=NamedSharding(mesh, made.trained_specs[path]))
    return made, masters


def test_merged_adapters_of_attention_change_attention_alone(random_checkpoint, chats, tmp_path):
    run = trained(random_checkpoint, chats, tmp_path / "run", rank=2, targets=("attention",), learning_rate=0.05)
    found = export(run, tmp_path / "published")
    assert {difference.path.split(".")[2] for difference in found.differences} == {"attention"}
    changed = convert(tmp_path / "published", tmp_path / "converted").sha256
    from gptoss_jax.manifest import read_manifest

    before = read_manifest(random_checkpoint).sha256
    differing = {path.split(".", 2)[2] for path in changed if changed[path] != before[path]}
    assert differing == {f"attention.{name}.weight" for name in ("query", "key", "value", "output")}


def test_run_is_not_merged_into_another_base(random_checkpoint, chats, tmp_path):
    run = trained(random_checkpoint, chats, tmp_path / "run", rank=2, targets=("attention",))
    other = export(random_checkpoint, tmp_path / "published", dtype="bf16")
    convert(other.destination, tmp_path / "other", quantize=True)
    assert ModelConfig.read(tmp_path / "other" / CONFIG) == ModelConfig.read(random_checkpoint / CONFIG)
    with pytest.raises(CheckpointError, match=r"not the checkpoint that the run was trained on: .*other: .*--base"):
        export(run, tmp_path / "out", base=tmp_path / "other")


def test_base_that_was_moved_is_asked_for_only_where_it_is_read(random_checkpoint, chats, tmp_path):
    base, moved = tmp_path / "base", tmp_path / "moved"
    shutil.copytree(random_checkpoint, base)
    run = trained(base, chats, tmp_path / "run", rank=2, targets=("router",))
    base.rename(moved)
    with pytest.raises(CheckpointError, match=r"the run's base is not there: .*base: say with --base where it is"):
        export(run, tmp_path / "out")
    assert export(run, tmp_path / "adapter", peft=True).num_tensors == 2 * 2
    assert export(run, tmp_path / "out", base=moved).differences
    with pytest.raises(ConversionError, match=r"only merging a LoRA reads the base: --base .*moved: leave it out"):
        export(run, tmp_path / "other", peft=True, base=moved)
