"""Where runs begin: masters that are the checkpoint's values, adapters that change nothing."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptoss_jax.checkpoint import load
from gptoss_jax.config import ModelConfig
from gptoss_jax.finetune.adapters import LoRA
from gptoss_jax.finetune.initial import frozen_parameters, masters, new_adapters
from gptoss_jax.finetune.placement import training_mesh
from gptoss_jax.finetune.step import Frozen, make_program
from gptoss_jax.manifest import CONFIG
from gptoss_jax.sharding import make_mesh
from tests.finetune.batches import mean_loss, random_batch


def made(checkpoint, lora, *, vocabulary_on_host=False, **axes):
    config = ModelConfig.read(checkpoint / CONFIG)
    mesh = training_mesh(make_mesh(**axes))
    options = {"update": optax.sgd(1.0), "vocabulary_on_host": vocabulary_on_host}
    return make_program(config, mesh, lora=lora, quantize=False, dtype=jnp.float32, **options)


ADAPTERS = LoRA(rank=2, alpha=2.0, targets=("attention", "router", "experts"))


@pytest.mark.parametrize(("lora", "on_host"), [(None, False), (ADAPTERS, False), (ADAPTERS, True)], ids=str)
def test_run_begins_at_the_loss_of_the_loaded_model(random_checkpoint, lora, on_host):
    batch = random_batch([[48], [48]], sequence_length=48, vocab_size=201088)
    begun = made(random_checkpoint, lora, vocabulary_on_host=on_host, data=2, expert=2)
    frozen = frozen_parameters(begun, random_checkpoint) if lora else Frozen()
    trained = new_adapters(begun, seed=1) if lora else masters(begun, random_checkpoint)
    expected = mean_loss(load(random_checkpoint, dtype=jnp.float32, impl="reference"), batch)
    sums = begun.compile_evaluation()(trained, frozen.arrays, begun.place(batch, parts=1, embedding=frozen.embedding))
    assert float(sums.loss / sums.tokens) == pytest.approx(expected, rel=1e-5)
    if on_host:
        kinds = {path: array.sharding.memory_kind for path, array in frozen.arrays.items()}
        assert "embedding.weight" not in kinds
        assert {path for path, kind in kinds.items() if kind == "pinned_host"} == {"unembedding.weight"}


def test_adapters_depend_on_the_seed_alone(random_checkpoint):
    lora = LoRA(rank=2, alpha=2.0)
    one, same, other = (
        new_adapters(made(random_checkpoint, lora, **axes), seed)
        for axes, seed in (({}, 1), ({"expert": 4}, 1), ({}, 2))
    )
    path = "layers.1.attention.query.weight.lora_a"
    np.testing.assert_array_equal(one[path], same[path])
    assert not np.array_equal(one[path], other[path])
    assert not np.array_equal(one[path], one["layers.0.attention.query.weight.lora_a"])
    assert not np.asarray(one["layers.1.attention.query.weight.lora_b"]).any()
