"""The examination: with a scripted model that knows the answers, or some of them."""

import json
from types import SimpleNamespace

import pytest

from gptoss_jax.demo import evaluate
from gptoss_jax.demo.corpus import evaluation_prompts
from gptoss_jax.demo.evaluate import BATCH, GROUPS, accuracy, answers, main
from gptoss_jax.harmony.encoding import decode, encode

PROMPTS = evaluation_prompts(seed=2, count=70)


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
    [prompt] = {
        prompt.question: prompt for prompt in PROMPTS if f"<|message|>{prompt.question}<|end|>" in text
    }.values()
    if prompt.tools and "to=assistant" not in text:
        name, arguments = call_of(prompt)
        return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>"
    return f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>{prompt.answer}<|return|>"


def call_of(prompt):
    """The right call, of the tool that has the answer."""
    [found] = [
        (tool.name, dict(zip(tool.function.__code__.co_freevars, (), strict=False)) or tool.function.__closure__)
        for tool in prompt.tools
        if tool.name == {"weather": "get_weather", "price": "lookup_price", "currency": "convert_currency"}[prompt.kind]
    ]
    name, closure = found
    [call] = [cell.cell_contents for cell in closure if hasattr(cell.cell_contents, "arguments")]
    return name, json.dumps(call.arguments)


def test_right_answers_are_counted_by_kind_and_tools_take_a_second_round(script):
    sizes = script(right)
    answered = answers(None, PROMPTS)
    assert [one.prompt for one in answered] == PROMPTS
    found = accuracy(answered)
    assert {counts["accuracy"] for counts in found.values()} == {1.0}
    assert found["all"]["asked"] == 70
    assert found["tools"]["asked"] == sum(bool(prompt.tools) for prompt in PROMPTS) == sizes[2]
    assert sizes[:2] == [BATCH, 70 - BATCH]
    assert len(sizes) == 3
    assert set(found) == {"all", *GROUPS, *(kind for kinds in GROUPS.values() for kind in kinds)}


def test_wrong_and_missing_answers_are_not_right(script):
    script(
        lambda text: "<|channel|>final<|message|>42<|return|>" if "Sort" in text else "<|channel|>analysis<|message|>So"
    )
    answered = answers(None, PROMPTS)
    assert {one.answer for one in answered} == {"", "42"}
    assert accuracy(answered)["all"]["right"] == 0


def test_call_after_call_ends(script):
    script(lambda text: '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"n": 1}<|call|>')
    found = accuracy(answers(None, [prompt for prompt in PROMPTS if prompt.kind == "weather"]))
    assert found["tools"]["right"] == 0


def test_command_prints_a_table_or_an_object(script, monkeypatch, capsys):
    script(lambda text: "<|channel|>final<|message|>42<|return|>")
    monkeypatch.setattr(evaluate, "load", lambda path, dtype: None)
    main(["somewhere", "--count", "10", "--seed", "2"])
    assert "arithmetic    0 of    2   0.0 %\n" in capsys.readouterr().out
    main(["somewhere", "--count", "10", "--seed", "2", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["accuracy"]["all"] == {"right": 0, "asked": 10, "accuracy": 0.0}
    assert {wrong["answer"] for wrong in printed["wrong"]} == {"42"}
