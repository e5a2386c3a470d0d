"""The examination: with a scripted model that knows the answers, or some of them."""

import inspect
import json
from types import SimpleNamespace

import pytest

from gptoss_jax.demo import evaluate
from gptoss_jax.demo.corpus import evaluation_prompts
from gptoss_jax.demo.evaluate import BATCH, GROUPS, accuracy, answers, main
from gptoss_jax.harmony.encoding import decode, encode
from tests.demo.conftest import first_prompt

PROMPTS = evaluation_prompts(seed=2, count=70)
FIRST = {decode(first_prompt(prompt)[:-2]): prompt for prompt in PROMPTS}
"""By what the model has read when it answers; what follows is of the answer."""


@pytest.fixture
def script(monkeypatch):
    """Puts a script in the place of `generate`: from a prompt's text to what the model writes; keeps batch sizes."""
    sizes = []

    def put(write):
        def generate(model, prompts, sampling, *, max_new_tokens):
            assert sampling.temperature == 0
            sizes.append(len(prompts))
            written = [encode(write(decode(ids)), special=True) for ids in prompts]
            return [SimpleNamespace(tokens=tuple(SimpleNamespace(id=token) for token in ids)) for ids in written]

        monkeypatch.setattr(evaluate, "generate", generate)
        return sizes

    return put


def right(text):
    [prompt] = [one for first, one in FIRST.items() if text.startswith(first)]
    if prompt.tools and "to=assistant" not in text:
        # Each of a prompt's tools knows the one call that has a result.
        call = inspect.getclosurevars(inspect.unwrap(prompt.tools[0].function)).nonlocals["call"]
        arguments = json.dumps(call.arguments)
        return f"<|channel|>commentary to=functions.{call.name} <|constrain|>json<|message|>{arguments}<|call|>"
    answer = f"<|start|>assistant<|channel|>final<|message|>{prompt.answer}<|return|>"
    return f"<|channel|>analysis<|message|>Hm.<|end|>{answer}"


def test_right_answers_are_counted_by_kind_and_tools_take_a_second_round(script, tiny_model):
    sizes = script(right)
    answered = answers(tiny_model, PROMPTS)
    assert [one.prompt for one in answered] == PROMPTS
    found = accuracy(answered)
    assert {counts["accuracy"] for counts in found.values()} == {1.0}
    assert found["all"]["asked"] == 70
    assert found["tools"]["asked"] == sum(bool(prompt.tools) for prompt in PROMPTS) == sizes[2]
    assert sizes[:2] == [BATCH, 70 - BATCH]
    assert len(sizes) == 3
    assert set(found) == {"all", *GROUPS, *(kind for kinds in GROUPS.values() for kind in kinds)}


def test_wrong_and_missing_answers_are_not_right(script, tiny_model):
    script(
        lambda text: "<|channel|>final<|message|>42<|return|>" if "Sort" in text else "<|channel|>analysis<|message|>So"
    )
    answered = answers(tiny_model, PROMPTS)
    assert {one.answer for one in answered} == {"", "42"}
    assert accuracy(answered)["all"]["right"] == 0


def test_call_after_call_ends(script, tiny_model):
    script(lambda text: '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"n": 1}<|call|>')
    found = accuracy(answers(tiny_model, [prompt for prompt in PROMPTS if prompt.kind == "weather"]))
    assert found["tools"]["right"] == 0


def test_command_prints_a_table_or_an_object(script, tiny_model, monkeypatch, capsys):
    script(lambda text: "<|channel|>final<|message|>42<|return|>")
    monkeypatch.setattr(evaluate, "load", lambda path, dtype: tiny_model)
    main(["somewhere", "--count", "10", "--seed", "2"])
    assert "arithmetic    0 of    2    0.0 %\n" in capsys.readouterr().out
    main(["somewhere", "--count", "10", "--seed", "2", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["accuracy"]["all"] == {"right": 0, "asked": 10, "accuracy": 0.0}
    assert {wrong["answer"] for wrong in printed["wrong"]} == {"42"}
