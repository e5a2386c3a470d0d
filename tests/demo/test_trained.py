"""The shipped model as an oracle from end to end: it answers what it was never asked, and no part may be at fault."""

import json

import numpy as np
import pytest

import gptoss_jax
from convert.converter import convert
from gptoss_jax.chat import Chat
from gptoss_jax.chat_events import MessageDone, ToolResult
from gptoss_jax.demo import checkpoint
from gptoss_jax.demo.corpus import evaluation_prompts
from gptoss_jax.demo.evaluate import BAR, GROUPS, accuracy, answers
from gptoss_jax.demo.expand import SHIPPED
from gptoss_jax.demo.model import MOST_BYTES
from gptoss_jax.demo.pipeline import QUESTIONS, TOOL_QUESTION, WEATHER
from gptoss_jax.demo.turns import held_out
from gptoss_jax.generation.sampling import Sampling
from tests.demo.faults import FAULTS, faulty

shipped = pytest.mark.skipif(not SHIPPED.is_file(), reason=f"the trained weights, {SHIPPED.name}, are not there yet")
BARRED = ("arithmetic", "tools")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained") / "converted"
    convert(checkpoint(), directory)
    return directory


@pytest.fixture(scope="module")
def prompts():
    """A hundred, of arithmetic and tools alone."""
    kinds = [kind for group in BARRED for kind in GROUPS[group]]
    return [prompt for prompt in evaluation_prompts(seed=7, count=200) if prompt.kind in kinds]


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


@shipped
def test_shipped_bytes_are_few():
    assert SHIPPED.stat().st_size <= MOST_BYTES


@shipped
@pytest.mark.slow
def test_held_out_problems_are_answered(converted, prompts):
    model = gptoss_jax.load(converted, dtype="float32")
    answered = answers(model, prompts)
    found = accuracy(answered)
    assert all(found[group]["asked"] >= 40 for group in BARRED)
    wrong = [(one.prompt.question, one.answer) for one in answered if not one.is_right]
    assert all(found[group]["accuracy"] >= BAR for group in BARRED), wrong


@shipped
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_noticed(converted, prompts, tmp_path, fault):
    with faulty(converted, fault, tmp_path / fault) as model:
        found = accuracy(answers(model, prompts))
    assert min(found[group]["accuracy"] for group in BARRED) < BAR


@shipped
@pytest.mark.slow
def test_reasoning_levels_and_a_tool(converted):
    model = gptoss_jax.load(converted, dtype="float32")

    def ask(level, question, **options):
        return list(Chat(model, reasoning=level, sampling=Sampling(temperature=0.0), **options).send(question))

    lengths = []
    for level in ("low", "medium", "high"):
        messages = [event.message for event in ask(level, QUESTIONS["low"]) if isinstance(event, MessageDone)]
        assert messages[-1].content == "39 + 54 = 93."
        lengths.append(sum(len(message.content) for message in messages if message.channel == "analysis"))
    assert 2 * lengths[0] < lengths[1] < lengths[2] / 2

    events = ask("low", TOOL_QUESTION, tools=[WEATHER])
    [result] = [event for event in events if isinstance(event, ToolResult)]
    assert json.loads(result.content) == {"degrees": 21, "sky": "sun"}
    [final] = [event.message.content for event in events if isinstance(event, MessageDone)][-1:]
    assert "21 degrees" in final
    assert "sun" in final
