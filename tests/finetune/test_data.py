"""A line of a data set becomes what the model reads and writes at inference, or an error that names the line."""

import contextlib
import datetime
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.errors import DataError
from gptoss_jax.finetune.data import Example, read_examples, split
from gptoss_jax.harmony import tokens
from gptoss_jax.harmony.conversation import Message, Tool, read_messages
from gptoss_jax.harmony.encoding import decode, encode, render_conversation

DATE = datetime.date(2025, 6, 28)
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    },
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text=None, **keys):
    return {"role": "assistant", "content": text, **keys}


def call(arguments, identifier="1"):
    return {"id": identifier, "type": "function", "function": {"name": "add", "arguments": arguments}}


@pytest.fixture
def read(tmp_path):
    """Writes lines (text, bytes, or what becomes JSON) and reads the examples."""

    def read_lines(*lines, **keywords):
        path = tmp_path / "chats.jsonl"
        texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"".join(text + b"\n" for text in texts))
        return read_examples(path, **{"date": DATE, **keywords})

    return read_lines


def read_by_model(ids):
    return [tokens.END if token == tokens.RETURN else token for token in ids]


def written(message):
    """The ids a model generates for one message, from its own parser's point of view."""
    recipient = f" to={message.recipient}" if message.recipient else ""
    content_type = f" {message.content_type}" if message.content_type else ""
    end = "<|call|>" if message.recipient else "<|return|>" if message.channel == "final" else "<|end|>"
    header = f"{recipient}<|channel|>{message.channel}{content_type}<|message|>"
    return encode(header, special=True) + encode(message.content) + encode(end, special=True)


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    user("1 + 1?"),
    assistant("2"),
    user("2 + 2?"),
    assistant("4", thinking="Two pairs."),
    user("Add 3 and 4."),
    assistant(reasoning_content="Use the tool.", tool_calls=[call({"a": 3})]),
    {"role": "tool", "tool_call_id": "1", "content": "7"},
    assistant("7", reasoning="It said 7."),
    user("Thanks"),
    assistant([{"type": "text", "text": "You are "}, {"type": "text", "text": "welcome."}]),
    user("Bye"),
    assistant("Bye."),
]


def test_every_answer_follows_the_prompt_of_inference(read):
    """Each run of trained ids is what the model generates after the prompt that it would have had there."""
    examples = read({"messages": CONVERSATION, "tools": [ADD], "reasoning_effort": "high"})
    messages = read_messages(CONVERSATION)
    tool = Tool.from_dict(ADD)
    expected = []
    for index, message in enumerate(messages):
        before = messages[index - 1]
        if message.role != "assistant":
            continue
        if before.role == "assistant" and before.channel == "analysis":  # the same generation goes on
            expected[-1][1].extend([*encode("<|start|>assistant", special=True), *written(message)])
        else:
            prompt = render_conversation(messages[:index], reasoning="high", tools=[tool], date=DATE)
            expected.append((prompt, written(message)))
    found = []
    for example in examples:
        starts = np.flatnonzero(np.diff(example.trained.astype(int)) == 1) + 1
        for start in starts:
            stop = start + int(np.argmin([*example.trained[start:], False]))
            found.append((read_by_model(example.ids[:start]), example.ids[start:stop].tolist()))
    assert found == expected
    assert len(found) == 6


def test_conversation_is_cut_only_where_reasoning_is_dropped(read):
    texts = [decode(example.ids.tolist()) for example in read({"messages": CONVERSATION, "tools": [ADD]})]
    assert len(texts) == 3
    assert [text.count("<|channel|>analysis") for text in texts] == [1, 2, 0]
    assert [text.count("<|return|>") for text in texts] == [2, 1, 2]
    assert texts[0].endswith("4<|return|>")
    assert texts[1].endswith("7<|return|>")


def test_answer_in_the_middle_is_written_with_return_and_read_with_end(read):
    [example] = read({"messages": [user("a"), assistant("b"), user("c"), assistant("d")]})
    text = "<|channel|>final<|message|>b<|return|><|channel|>final<|message|>d<|return|>"
    assert decode(example.ids[example.trained].tolist()) == text
    assert tokens.RETURN not in example.inputs
    assert decode(example.inputs.tolist()).count("<|end|>") == 4
    assert len(example.inputs) == len(example.ids) - 1


@pytest.mark.parametrize(
    ("channels", "text"),
    [
        (["analysis"], "<|channel|>analysis<|message|>Use the tool.<|end|><|channel|>analysis<|message|>Seven.<|end|>"),
        (
            ["commentary"],
            "<|start|>assistant to=functions.add<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
        ),
        (["final"], "<|start|>assistant<|channel|>final<|message|>7<|return|>"),
    ],
)
def test_channels_choose_what_is_trained(read, channels, text):
    messages = [
        user("?"),
        assistant(thinking="Use the tool.", tool_calls=[call("{}")]),
        {"role": "tool", "name": "add", "content": "7"},
        assistant("7", thinking="Seven."),
    ]
    [example] = read({"messages": messages}, channels=channels)
    assert decode(example.ids[example.trained].tolist()) == text


def test_nothing_follows_the_last_trained_id(read):
    [example] = read({"messages": [user("a"), assistant("b"), user("c")]})
    assert example.trained[-1]
    assert example.ids[-1] == tokens.RETURN


def test_messages_of_weight_zero_are_read_and_not_trained(read):
    messages = [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)]
    [example] = read({"messages": messages})
    assert decode(example.ids[example.trained].tolist()) == "<|channel|>final<|message|>d<|return|>"
    assert "final<|message|>b" in decode(example.ids.tolist())


def test_prompt_and_completion_train_the_completion(read):
    [one] = read({"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]})
    [other] = read({"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d")]})
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.trained, other.trained)


def test_channels_may_be_explicit(read):
    explicit = [
        user("?"),
        assistant("Hm.", channel="analysis"),
        assistant("{}", channel="commentary", recipient="functions.add", content_type="<|constrain|>json"),
    ]
    [one] = read({"messages": explicit})
    [other] = read({"messages": [user("?"), assistant(thinking="Hm.", tool_calls=[call("{}")])]})
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.trained, other.trained)


def test_line_sets_level_date_and_tools(read):
    messages = [user("a"), assistant("b")]
    entry = {"messages": messages, "reasoning_level": "low", "date": "2024-01-02", "tools": json.dumps([ADD])}
    [example] = read(entry)
    prompt = render_conversation(
        messages[:1], reasoning="low", date=datetime.date(2024, 1, 2), tools=[Tool.from_dict(ADD)]
    )
    assert example.ids[: len(prompt)].tolist() == prompt


def test_examples_know_their_line(read):
    chat = {"messages": [user("a"), assistant("b", thinking="c"), user("d"), assistant("e")]}
    assert [example.line for example in read(chat, chat)] == [1, 1, 2, 2]


GOOD = {"messages": [user("a"), assistant("b")]}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON: Expecting property name"),
        (b"", "a blank line"),
        (b'{"messages": "\xff"}', "not UTF-8 from byte 14 on"),
        (b"[" * 100_000, "not JSON: "),
        ([GOOD], "a JSON list instead of an object"),
        ({}, "no messages, nor a prompt and a completion"),
        ({"prompt": "a", "completion": "b"}, "no messages, nor a prompt and a completion"),
        ({"messages": []}, "messages is not a list of messages"),
        ({"messages": "hello"}, "messages is not a list of messages"),
        ({"messages": ["hello"]}, "messages is not a list of messages"),
        ({"messages": [user("a"), {"role": "robot", "content": "b"}]}, "unknown role 'robot', message 1"),
        ({"messages": [user(3), assistant("b")]}, "content of type int, message 0"),
        ({"messages": [user("a"), assistant()]}, "an assistant that says nothing, message 1"),
        ({"messages": [user("a"), assistant(tool_calls=[{"id": "1"}])]}, "tool call without a function name"),
        ({"messages": [user("a"), assistant(tool_calls=3)]}, "tool_calls of type int, message 1"),
        ({"messages": [user("a"), assistant("b", channel="thoughts")]}, "unknown channel 'thoughts', message 1"),
        ({"messages": [user("a"), assistant("b", weight=0.5)]}, "weight 0.5, message 1"),
        ({"messages": [user("a")]}, "nothing to train on in analysis, commentary, final"),
        ({"messages": [user("a"), assistant("b", weight=0)]}, "nothing to train on"),
        ({**GOOD, "tools": "["}, "not JSON: .*, tools"),
        ({**GOOD, "tools": {}}, "not a list of tools, tools"),
        ({**GOOD, "tools": [{"name": "a b"}]}, "bad tool name 'a b', tools"),
        ({**GOOD, "tools": [{"name": "a", "parameters": [["properties", 1]]}]}, "parameters that are no object, tools"),
        ({**GOOD, "reasoning_effort": ["low"]}, r"unknown reasoning level \['low'\]"),
        ({**GOOD, "date": "yesterday"}, "date 'yesterday', date"),
    ],
)
def test_bad_line_is_named_with_its_reason(read, line, reason):
    with pytest.raises(
        DataError, match=rf"1 of 3 lines cannot be trained on: .*chats.jsonl: correct line 2 \({reason}"
    ):
        read(GOOD, line, GOOD)


def test_many_bad_lines_are_counted_and_the_first_named(read):
    with pytest.raises(DataError) as caught:
        read(GOOD, *[{}] * 12)
    assert caught.value.what == "12 of 13 lines cannot be trained on"
    assert "line 2 (" in caught.value.fix
    assert "line 11 (" in caught.value.fix
    assert "line 12 (" not in caught.value.fix
    assert caught.value.fix.endswith(" and 2 more")


def test_line_without_the_chosen_channel_is_not_skipped(read):
    with pytest.raises(DataError, match=r"line 1 \(nothing to train on in analysis"):
        read(GOOD, channels=["analysis"])


def test_empty_missing_and_misread_files_are_named(read, tmp_path):
    with pytest.raises(DataError, match="an empty file"):
        read()
    with pytest.raises(DataError, match="No such file"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"unknown channels \['finale'\]"):
        read(GOOD, channels=["finale"])


KEYS = re.findall(
    r"\w+",
    "role content thinking tool_calls function name arguments channel recipient content_type tool_call_id id weight "
    "messages prompt completion tools parameters properties type description text date reasoning_effort",
)
JSON = st.recursive(
    st.sampled_from([None, True, -1, 1, "", "a", "assistant", "user", "tool", "final"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
ENTRY = (
    st.fixed_dictionaries({"role": st.sampled_from(["assistant", "user", "tool", "system"]), "content": JSON}) | JSON
)


@given(st.fixed_dictionaries({"messages": st.lists(ENTRY, max_size=3)}, optional={"tools": JSON, "date": JSON}) | JSON)
@settings(deadline=None)
def test_any_line_is_read_or_refused_by_name(tmp_path_factory, line):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(json.dumps(line))
    with contextlib.suppress(DataError):
        examples = read_examples(path)
        assert examples
        assert all(example.trained.any() for example in examples)


def example(line):
    return Example(np.array([line, 0], np.int32), np.ones(2, bool), line)


def test_split_keeps_order_and_lines_together_and_follows_the_seed():
    examples = [example(line) for line in range(1, 101) for _ in range(3)]
    trained, evaluated = split(examples, 0.1, seed=1)
    assert len(evaluated) == 30
    assert {example.line for example in trained}.isdisjoint(example.line for example in evaluated)
    assert [example.line for example in trained] == sorted(example.line for example in trained)
    assert split(examples, 0.1, seed=1) == (trained, evaluated)
    assert {example.line for example in split(examples, 0.1, seed=2)[1]} != {example.line for example in evaluated}
    assert len(split([example(1), example(2)], 0.01, seed=0)[1]) == 1


@pytest.mark.parametrize(("num", "fraction"), [(1, 0.5), (4, 0.9), (4, 0.0), (4, -0.5), (4, 1.0)])
def test_split_that_leaves_one_side_empty_is_refused(num, fraction):
    with pytest.raises(DataError, match="leave lines on both sides"):
        split([example(line) for line in range(num)], fraction, seed=0)


def test_messages_of_ours_are_harmonys_own():
    """The oracle above spells headers as the model generates them; the parser must agree."""
    from gptoss_jax.harmony.parser import MessageEnd, parse

    message = Message(
        "assistant", "{}", channel="commentary", recipient="functions.f", content_type="<|constrain|>json"
    )
    assert [event.message for event in parse(written(message)) if isinstance(event, MessageEnd)] == [message]
