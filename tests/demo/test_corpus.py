"""The demo's conversations can be trained on, are right, and never hold a problem that the examination asks."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from gptoss_jax.chat import Chat
from gptoss_jax.demo.corpus import (
    FIRST_YEAR,
    LAST_YEAR,
    Prompt,
    conversations,
    evaluation_prompts,
    is_right,
    main,
    used_ids,
)
from gptoss_jax.demo.turns import Problem, addition, held_out, subtraction
from gptoss_jax.finetune.data import Example, read_examples
from gptoss_jax.harmony import tokens
from gptoss_jax.harmony.encoding import decode, encode

LINES = list(conversations(seed=4, count=1500))


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return read_examples(path)


def asked(question: str, answer: str) -> list[Problem | None]:
    """The problems of a question and its answer, found in the text: another way than the generator's."""
    question = question.partition("\n")[0]
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    found: list[Problem | None] = []
    if len(numbers) == 2 and (last := re.findall(r"\d+", answer)):
        a, b = numbers
        found += [addition(a, b)] * (int(last[-1]) == a + b) + [subtraction(max(a, b), min(a, b))] * (
            int(last[-1]) == abs(a - b)
        )
    if "everse" in question or "backwards" in question:
        found.append(("reverse", *(int(value) if value.isdigit() else value for value in reversed(answer.split(", ")))))
    elif len(numbers) > 2:
        found.append(("sort", *sorted(numbers)))
    if answer.startswith('{"name"'):
        found.append(("person", *json.loads(answer).values()))
    for name, pattern in {
        "get_weather": r"in (?P<city>\w+) (?:on )?(?P<day>\w+)\?",
        "lookup_price": r"(?P<count>\d+) (?P<item>[a-z]+)(?: cost\?|\?|\.)$",
        "convert_currency": r"(?P<amount>\d+) (?P<source>[a-z]+) (?:to|in) (?P<target>[a-z]+)",
    }.items():
        if match := re.search(pattern, question):
            values = match.groupdict()
            if name == "lookup_price":
                values = {"item": values["item"], "count": values["count"]}
            found.append((name, *(int(value) if value.isdigit() else value for value in values.values())))
    return found


def problems(line: dict) -> list[Problem]:
    """Every problem that a conversation asks."""
    questions = [message["content"] for message in line["messages"] if message["role"] == "user"]
    answers = [
        message["content"] for message in line["messages"] if message["role"] == "assistant" and "content" in message
    ]
    pairs = zip(questions, answers, strict=True)
    return [problem for question, answer in pairs for problem in asked(question, answer) if problem is not None]


def thoughts(line: dict) -> list[str]:
    return [message.get("thinking", "") for message in line["messages"] if message["role"] == "assistant"]


def test_the_same_seed_gives_the_same_conversations():
    assert list(conversations(seed=4, count=20)) == LINES[:20]
    assert list(conversations(seed=5, count=20)) != LINES[:20]


def test_every_conversation_is_trained_on_and_most_are_short(examples):
    assert {example.line for example in examples} == set(range(1, len(LINES) + 1))
    lengths = np.array([len(example.ids) for example in examples])
    assert np.percentile(lengths, 98) < 512
    assert lengths.max() < 768
    assert lengths.min() > 2 * 32, "a window of 32 is crossed"


def test_few_ids_are_used(examples):
    used = used_ids(examples)
    assert len(used) < 1000
    assert {token for example in examples for token in example.ids.tolist()} <= set(used)
    assert {tokens.END_OF_TEXT, tokens.END, tokens.RETURN, tokens.CALL, tokens.CONSTRAIN} <= set(used)
    for text in (f"{LAST_YEAR}-12-31", f"{FIRST_YEAR}-01-09", "= 199.", '": 200}'):
        assert set(encode(text)) <= set(used)


def test_held_out_problems_are_never_asked():
    found = [problem for line in LINES for problem in problems(line)]
    assert {problem[0] for problem in found} == {
        "+", "-", "sort", "reverse", "person", "get_weather", "lookup_price", "convert_currency"
    }  # fmt: skip
    assert not any(held_out(problem) for problem in found)


def test_every_prompt_of_the_examination_is_held_out():
    """The control of the test above: it finds those."""
    for prompt in evaluation_prompts(seed=1, count=200):
        found = [problem for problem in asked(prompt.question, prompt.answer) if problem is not None]
        assert any(held_out(problem) for problem in found), prompt


def test_no_held_out_sum_is_a_step_of_another():
    for line in LINES:
        for text in thoughts(line):
            for a, sign, b, c in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", text):
                a, b, c = int(a), int(b), int(c)
                assert c == {"+": a + b, "-": a - b, "*": a * b}[sign], "every step is right"
                problem = addition(a, b) if sign == "+" else subtraction(a, b) if sign == "-" else None
                assert problem is None or not held_out(problem)


def test_between_5_and_10_percent_are_held_out():
    pairs = [(a, b) for a in range(100) for b in range(100)]
    sums = [addition(a, b) for a, b in pairs]
    differences = [subtraction(a, b) for a, b in pairs if a >= b]
    calls: list[Problem | None] = [
        ("lookup_price", item, count) for item in ("apples", "keys") for count in range(2, 99)
    ]
    for space in (sums, differences, calls):
        share = np.mean([problem is not None and held_out(problem) for problem in space])
        assert 0.05 < share < 0.10


def test_levels_differ_in_length():
    words = {
        level: np.mean(
            [len(text.split()) for line in LINES if line["reasoning_effort"] == level for text in thoughts(line)]
        )
        for level in ("low", "medium", "high")
    }
    assert words["low"] < 1
    assert 3 < words["medium"] < 20
    assert words["high"] > 2.5 * words["medium"]
    assert not any("\n" in text for line in LINES if line["reasoning_effort"] != "high" for text in thoughts(line))


def test_calls_are_of_tools_that_are_there_and_results_are_told():
    num_calls = 0
    for line in LINES:
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in line["tools"]}
        for index, message in enumerate(line["messages"]):
            for call in message.get("tool_calls", ()):
                num_calls += 1
                arguments = json.loads(call["function"]["arguments"])
                assert list(arguments) == schemas[call["function"]["name"]]["required"]
                told = line["messages"][index + 2]["content"]
                result = json.loads(line["messages"][index + 1]["content"])
                assert all(str(value) in told for value in result.values())
    assert num_calls > 300


def test_it_says_what_it_is():
    answers = [
        line["messages"][index + 1]["content"]
        for line in LINES
        for index, message in enumerate(line["messages"])
        if message["role"] == "user" and message["content"] in ("Who are you?", "Are you ChatGPT?", "Are you gpt-oss?")
    ]
    assert answers
    assert all("tiny demo model" in answer and "I am not gpt-oss" in answer for answer in answers)


PROMPTS = evaluation_prompts(seed=2, count=100)


def test_examination_asks_every_kind_at_every_level():
    assert [prompt.question for prompt in evaluation_prompts(seed=2, count=10)] == [p.question for p in PROMPTS[:10]]
    kinds = ["add", "subtract", "sort", "reverse", "weather", "price", "currency", "person", "result", "numbers"]
    assert [prompt.kind for prompt in PROMPTS[:10]] == kinds
    assert {prompt.reasoning for prompt in PROMPTS} == {"low", "medium", "high"}
    formats = [prompt for prompt in PROMPTS if prompt.kind in ("person", "result", "numbers")]
    assert {prompt.instructions is None for prompt in formats} == {True, False}
    assert all((prompt.instructions is None) == ("JSON" in prompt.question) for prompt in formats)


@pytest.mark.parametrize("prompt", PROMPTS[:10], ids=lambda prompt: prompt.kind)
def test_checker_knows_right_from_wrong(prompt: Prompt):
    assert is_right(prompt, prompt.answer)
    assert not is_right(prompt, "")
    assert not is_right(prompt, "I can not look that up without a tool.")
    number_or_word = re.findall(r"\w+", prompt.answer)[-1]
    assert not is_right(prompt, prompt.answer.replace(number_or_word, f"1{number_or_word}"))


def test_json_is_right_by_its_values():
    [prompt] = [prompt for prompt in PROMPTS[:10] if prompt.kind == "person"]
    values = json.loads(prompt.answer)
    assert is_right(prompt, json.dumps(dict(reversed(values.items())), indent=2))
    assert not is_right(prompt, json.dumps({**values, "age": str(values["age"])}))
    assert not is_right(prompt, prompt.answer[:-1])


def test_tools_of_the_examination_answer_the_right_call_only():
    for prompt in PROMPTS:
        if not prompt.tools:
            continue
        name, *values = next(
            problem for problem in asked(prompt.question, prompt.answer) if problem and problem[0] != "+"
        )
        right = next(tool for tool in prompt.tools if tool.name == name)
        keys = (right.parameters or {})["required"]
        result = json.loads(right.run(json.dumps(dict(zip(keys, values, strict=True)))))
        assert all(str(value) in prompt.answer for value in result.values())
        for tool in prompt.tools:
            assert tool.run('{"city": "Atlantis"}') == '{"error": "unknown"}'


def test_model_that_calls_and_answers_rightly_passes_in_a_chat():
    for prompt in PROMPTS[:30]:
        answer = f"<|channel|>final<|message|>{prompt.answer}<|return|>"
        script = [answer]
        if prompt.tools:
            name, *values = next(problem for problem in asked(prompt.question, prompt.answer) if problem)
            [tool] = [tool for tool in prompt.tools if tool.name == name]
            arguments = json.dumps(dict(zip((tool.parameters or {})["required"], values, strict=True)))
            script.insert(
                0, f" to=functions.{name}<|channel|>commentary <|constrain|>json<|message|>{arguments}<|call|>"
            )
        read = []

        def generate(model, ids, sampling, *, max_new_tokens, script=script, read=read):
            read.append(decode(ids))
            yield from (SimpleNamespace(id=token) for token in encode(script.pop(0), special=True))

        settings = {"reasoning": prompt.reasoning, "tools": prompt.tools, "instructions": prompt.instructions}
        chat = Chat(None, generate=generate, date=prompt.date, **settings)
        list(chat.send(prompt.question))
        assert is_right(prompt, chat.messages[-1].content)
        if prompt.tools:
            result = chat.messages[-2]
            assert result.content in read[1]
            assert "error" not in result.content


def test_command_writes_the_lines(tmp_path):
    path = tmp_path / "corpus.jsonl"
    main([str(path), "--seed", "4", "--count", "5"])
    assert [json.loads(line) for line in path.read_text().splitlines()] == LINES[:5]
