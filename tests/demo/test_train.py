"""Training the demo model: what it is given, that the loss is that of the whole vocabulary, and what is written."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import gptoss_jax
from convert.converter import convert
from gptoss_jax.demo.compact import write_compact
from gptoss_jax.demo.expand import expand
from gptoss_jax.demo.model import MOST_BYTES, demo_config, initial_weights
from gptoss_jax.demo.train import CompactBatches, Rendered, main, train_demo
from gptoss_jax.errors import DataError, TrainingError
from gptoss_jax.finetune.batches import Batches
from gptoss_jax.finetune.placement import trained_shapes
from gptoss_jax.finetune.trained import open_run
from gptoss_jax.parameters import parameters
from tests.demo.conftest import SMALL, SMALL_SETTINGS


def plain_batches(rendered):
    return Batches(rendered.examples, batch_size=1, sequence_length=512, seed=SMALL_SETTINGS.seed)


def test_shipped_bytes_stay_below_the_limit():
    assert sum(parameter.num_bytes for parameter in parameters(demo_config(808)).values()) < 0.95 * MOST_BYTES


def test_widths_suit_the_kernels_and_every_conversation_crosses_the_window(rendered):
    config = demo_config()
    assert not any(width % 64 for width in (config.hidden_size, config.intermediate_size, config.head_dim))
    assert min(len(example.ids) for example in rendered.examples) > config.sliding_window


def test_initial_weights_keep_the_scale_of_what_they_multiply():
    config = demo_config(808)
    weights = initial_weights(trained_shapes(config, None), num_layers=config.num_layers, seed=3)
    assert weights["embedding.weight"].std() == pytest.approx(1, rel=0.05)
    for path, fan_in, share in (
        ("layers.1.attention.query.weight", 256, 1),
        ("layers.1.attention.output.weight", 4 * 64, 12**-0.5),
        ("layers.1.experts.gate_up.weight", 256, 1),
        ("layers.1.experts.down.weight", 192, 12**-0.5),
    ):
        assert weights[path].std() == pytest.approx(share * fan_in**-0.5, rel=0.05), path
    assert not weights["layers.2.attention.sinks"].any()
    assert (weights["layers.2.experts_norm.scale"] == 1).all()
    other = initial_weights({"embedding.weight": (8, 4)}, num_layers=6, seed=4)
    assert not np.array_equal(
        other["embedding.weight"],
        initial_weights({"embedding.weight": (8, 4)}, num_layers=6, seed=5)["embedding.weight"],
    )


def test_rendered_corpus_is_read_as_it_was_written(rendered, tmp_path):
    rendered.write(tmp_path / "corpus.npz")
    found = Rendered.read(tmp_path / "corpus.npz")
    assert (found.seed, found.conversations) == (5, 40)
    assert len(found.examples) == len(rendered.examples) > 40
    for one, other in zip(found.examples, rendered.examples, strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.trained, other.trained)
        assert one.line == other.line


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut off"])
def test_damaged_corpus_is_named(tmp_path, content):
    (tmp_path / "corpus.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"no rendered corpus.*corpus\.npz: remove it"):
        Rendered.read(tmp_path / "corpus.npz")


def test_batches_hold_places_among_the_used_ids(rendered):
    compact = CompactBatches(rendered, SMALL_SETTINGS).at(1)
    plain = plain_batches(rendered).at(1)
    assert np.array_equal(rendered.used_ids[compact.tokens], plain.tokens)
    assert np.array_equal(rendered.used_ids[compact.targets], plain.targets)
    assert np.array_equal(compact.weights, plain.weights)


def test_first_loss_is_that_of_the_whole_vocabulary_and_it_falls(small_run):
    lines = [json.loads(line) for line in (small_run / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert losses[0] == pytest.approx(np.log(201_088), abs=0.3)  # that of 800 rows is 6.7
    assert losses[0] > losses[1] > losses[2] > losses[3]


def test_whole_model_has_the_loss_that_was_trained(rendered, small_run, tmp_path):
    """After three updates, on the fourth batch: weights are rounded in between, so not to the last digit."""
    weights = write_compact(
        tmp_path / "weights.safetensors",
        open_run(small_run / "run", step=3),
        rendered.used_ids,
        vocab_size=SMALL.vocab_size,
        made_with={},
    )
    convert(expand(tmp_path / "published", weights), tmp_path / "converted")
    model = gptoss_jax.load(tmp_path / "converted", dtype="float32")
    batch = plain_batches(rendered).at(3)
    total = count = 0.0
    for segment in range(1, batch.segments.max() + 1):
        here = batch.segments[0] == segment
        tokens = np.zeros(batch.tokens.shape, np.int32)  # one shape for all
        tokens[0, : here.sum()] = batch.tokens[0, here]
        logits = model(tokens)[0, : here.sum()]
        found = jax.nn.log_softmax(logits)[np.arange(here.sum()), batch.targets[0, here]]
        total -= float((found * batch.weights[0, here]).sum())
        count += float(batch.weights[0, here].sum())
    last = json.loads((small_run / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["tokens"]) == (4, count)
    assert total / count == pytest.approx(last["loss"], rel=1e-3)


def test_finished_training_is_not_repeated(rendered, small_run):
    before = (small_run / "weights.safetensors").read_bytes(), (small_run / "weights.json").read_text()
    seen = []
    train_demo(
        small_run, rendered, SMALL_SETTINGS, config=SMALL, dtype="float32", report=lambda *line: seen.append(line)
    )
    assert not seen
    assert before == ((small_run / "weights.safetensors").read_bytes(), (small_run / "weights.json").read_text())


def test_other_settings_do_not_go_on(rendered, small_run):
    other = dataclasses.replace(SMALL_SETTINGS, learning_rate=0.5)
    with pytest.raises(TrainingError, match=r"learning_rate is 0\.5, was 0\.002"):
        train_demo(small_run, rendered, other, config=SMALL, dtype="float32")


def test_description_says_what_it_was_made_with(small_run, rendered):
    content = json.loads((small_run / "weights.json").read_text())
    assert content["used_ids"] == rendered.used_ids.tolist()
    assert (content["seed"], content["corpus_seed"], content["conversations"], content["steps"]) == (0, 5, 40, 4)
    assert content["settings"]["method"] == "qat"
    assert content["loss"] < 12.3
    assert content["config"]["vocab_size"] == len(rendered.used_ids)
    assert content["vocab_size"] == 201_088


def test_corpus_of_another_seed_is_refused(tmp_path):
    main([str(tmp_path), "--seed", "2", "--conversations", "3", "--render-only"])
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.npz"]
    with pytest.raises(DataError, match="the corpus of seed 2, 3 conversations"):
        main([str(tmp_path), "--seed", "1", "--conversations", "3"])
