"""A small demo model, trained for four updates: what is shipped in place of the real one's weights."""

import dataclasses

import pytest

import gptoss_jax
from convert.converter import convert
from gptoss_jax.demo.corpus import Prompt
from gptoss_jax.demo.expand import expand
from gptoss_jax.demo.model import demo_config
from gptoss_jax.demo.train import SETTINGS, render, train_demo
from gptoss_jax.harmony.conversation import Message
from gptoss_jax.harmony.encoding import render_conversation

SMALL = dataclasses.replace(
    demo_config(), num_layers=2, layer_kinds=demo_config().layer_kinds[:2], hidden_size=64, intermediate_size=64
)
SMALL_SETTINGS = dataclasses.replace(
    SETTINGS, steps=4, batch_size=1, sequence_length=512, warmup_steps=2, save_every=3, keep=2
)


def first_prompt(prompt: Prompt) -> list[int]:
    """What the model reads when a problem is put to it."""
    return render_conversation(
        [Message("user", prompt.question)],
        reasoning=prompt.reasoning,
        tools=prompt.tools,
        instructions=prompt.instructions,
        date=prompt.date,
    )


@pytest.fixture(scope="session")
def rendered():
    return render(seed=5, conversations=40)


@pytest.fixture(scope="session")
def small_run(rendered, tmp_path_factory):
    """The directory in which it was trained, with its weights."""
    directory = tmp_path_factory.mktemp("demo-run")
    train_demo(directory, rendered, SMALL_SETTINGS, config=SMALL, dtype="float32")
    return directory


@pytest.fixture(scope="session")
def small_weights(small_run):
    return small_run / "weights.safetensors"


@pytest.fixture(scope="session")
def small_converted(small_weights, tmp_path_factory):
    """Its whole checkpoint, converted."""
    directory = tmp_path_factory.mktemp("demo-whole")
    convert(expand(directory / "published", small_weights), directory / "converted")
    return directory / "converted"


@pytest.fixture(scope="session")
def small_model(small_converted):
    return gptoss_jax.load(small_converted, dtype="float32")
