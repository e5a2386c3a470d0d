"""The shipped model as an oracle from end to end: it answers what it was never asked.

tests/parity/test_demo.py has its other half: the text and the numbers are those of transformers.
"""

import io
import re
from pathlib import Path

import numpy as np
import pytest

import gptoss_jax
from gptoss_jax.chat import Chat
from gptoss_jax.chat_events import MessageDone
from gptoss_jax.demo import run
from gptoss_jax.demo.corpus import evaluation_prompts
from gptoss_jax.demo.evaluate import BAR, GROUPS, accuracy, answers
from gptoss_jax.demo.expand import SHIPPED
from gptoss_jax.demo.model import MOST_BYTES
from gptoss_jax.demo.pipeline import QUESTIONS
from gptoss_jax.demo.turns import held_out
from gptoss_jax.generation.sampling import Sampling
from tests.demo.faults import FAULTS, MISLEADING, faulty

BARRED = ("arithmetic", "tools")
BATCH = 16
"""One shape for all: a fault in the parameters runs the programs that were compiled without it."""


def held_out_prompts(count):
    """As many of arithmetic, and of tools; those with short answers in batches of their own, which end soon."""
    asked = evaluation_prompts(seed=7, count=5 * count)
    found = [prompt for group in BARRED for prompt in [one for one in asked if one.kind in GROUPS[group]][:count]]
    return sorted(found, key=lambda prompt: prompt.reasoning)


@pytest.mark.slow
def test_every_fault_changes_what_a_small_model_says(small_converted, small_model, rendered, tmp_path):
    """Whatever it has learned: a fault that is none would let the test of the trained model pass for no reason."""
    tokens = rendered.examples[0].ids[None, :96]
    expected = np.asarray(small_model(tokens))
    for fault in FAULTS:
        with faulty(small_converted, fault, tmp_path / fault) as model:
            difference = np.abs(np.asarray(model(tokens)) - expected).max()
        assert difference > 1e-3 * expected.std(), fault
    with faulty(small_converted, "none", tmp_path / "none") as model:
        assert np.array_equal(np.asarray(model(tokens)), expected)


def test_questions_of_the_demo_are_not_in_the_corpus():
    for question in (QUESTIONS["low"], QUESTIONS["medium"]):
        a, sign, b = question.removeprefix("What is ").rstrip("?").split()
        assert held_out((sign, int(a), int(b)))


def test_shipped_bytes_are_few():
    assert SHIPPED.stat().st_size <= MOST_BYTES


@pytest.mark.slow
def test_held_out_problems_are_answered(trained_checkpoint):
    model = gptoss_jax.load(trained_checkpoint, dtype="float32")
    answered = answers(model, held_out_prompts(32), batch_size=BATCH)
    found = accuracy(answered)
    assert [found[group]["asked"] for group in BARRED] == [32, 32]
    wrong = [(one.prompt.question, one.answer) for one in answered if not one.is_right]
    assert all(found[group]["accuracy"] >= BAR for group in BARRED), wrong


@pytest.mark.slow
@pytest.mark.parametrize("fault", MISLEADING)
def test_fault_makes_answers_wrong(trained_checkpoint, tmp_path, fault):
    with faulty(trained_checkpoint, fault, tmp_path / fault) as model:
        found = accuracy(answers(model, held_out_prompts(8), batch_size=BATCH))
    assert all(found[group]["accuracy"] < BAR for group in BARRED)


@pytest.mark.slow
def test_demo_says_what_its_page_shows(trained_checkpoint):
    """Over an earlier demo: each level, and a tool that is called and whose result is told."""
    page = (Path(__file__).parents[2] / "docs" / "demo.md").read_text()
    [shown] = re.findall(r"^    > .*?(?=^\S)", page, re.DOTALL | re.MULTILINE)
    output = io.StringIO()
    assert run(trained_checkpoint.parent, output=output) == trained_checkpoint
    assert re.sub(r"^    ", "", shown, flags=re.MULTILINE).strip() in output.getvalue()


@pytest.mark.slow
def test_analysis_grows_with_the_reasoning_level(trained_checkpoint):
    model = gptoss_jax.load(trained_checkpoint)
    lengths = []
    for level in ("low", "medium", "high"):
        chat = Chat(model, reasoning=level, sampling=Sampling(temperature=0.0), max_new_tokens=256)
        messages = [event.message for event in chat.send(QUESTIONS["low"]) if isinstance(event, MessageDone)]
        assert messages[-1].content == "39 + 54 = 93."
        lengths.append(sum(len(message.content) for message in messages if message.channel == "analysis"))
    assert 2 * lengths[0] < lengths[1] < lengths[2] / 2
