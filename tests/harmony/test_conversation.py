"""Chat dicts become harmony messages, and what cannot is refused by name."""

import pytest

from gptoss_jax.errors import ConversationError
from gptoss_jax.harmony.conversation import Message, Tool, read_messages, tool_call, tool_result


def call(name, arguments="{}", identifier="1"):
    return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_one_dict_becomes_a_message_for_each_channel():
    entry = {"role": "assistant", "reasoning": "Hm.", "content": "Looking.", "tool_calls": [call("f"), call("g")]}
    assert read_messages([entry]) == [
        Message("assistant", "Hm.", channel="analysis"),
        Message("assistant", "Looking.", channel="commentary"),
        tool_call("f", "{}"),
        tool_call("g", "{}"),
    ]


def test_assistant_text_alone_is_final():
    assert read_messages([{"role": "assistant", "content": "4"}]) == [Message("assistant", "4", channel="final")]


def test_tool_results_find_their_tool_by_the_calls_id():
    calls = {"role": "assistant", "content": None, "tool_calls": [call("f", identifier="a"), call("g", identifier="b")]}
    results = [{"role": "tool", "tool_call_id": "b", "content": "2"}, {"role": "tool", "name": "f", "content": "1"}]
    assert read_messages([calls, *results])[2:] == [tool_result("functions.g", "2"), tool_result("functions.f", "1")]


def test_hugging_face_keys_are_read_as_openais():
    entry = {"role": "assistant", "thinking": "Hm.", "tool_calls": [{"name": "f", "arguments": {"x": "é"}}]}
    assert read_messages([entry]) == [Message("assistant", "Hm.", channel="analysis"), tool_call("f", '{"x": "é"}')]


def test_explicit_channel_is_kept():
    entry = {"role": "assistant", "content": "{}", "channel": "commentary", "recipient": "functions.f"}
    assert read_messages([entry]) == [Message("assistant", "{}", channel="commentary", recipient="functions.f")]


def test_text_parts_are_joined_and_messages_pass_through():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = Message("assistant", "x", channel="analysis")
    assert read_messages([{"role": "user", "content": parts}, message]) == [Message("user", "ab"), message]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"role": "robot", "content": "x"}, "unknown role 'robot'"),
        ({"content": "x"}, "unknown role None"),
        ({"role": "user", "content": 3}, "content of type int"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "content part 'image_url'"),
        ({"role": "user", "content": ["x"]}, "content part 'str'"),
        ({"role": "tool", "tool_call_id": "9", "content": "x"}, "unknown call '9'"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "tool call without a function name"),
        ({"role": "assistant", "tool_calls": "f"}, "tool_calls of type str"),
        ({"role": "assistant", "content": "x", "channel": "thoughts"}, "unknown channel 'thoughts'"),
        ({"role": "assistant", "channel": "final", "tool_calls": [call("f")]}, "a channel and tool_calls"),
        ({"role": "assistant", "channel": "final", "recipient": 3}, "recipient 3"),
    ],
)
def test_bad_message_is_refused_with_its_place(entry, words):
    with pytest.raises(ConversationError, match=f"{words}.*: message 1: "):
        read_messages([{"role": "user", "content": "fine"}, entry])


@pytest.mark.parametrize("name", ["", "two words", "a.b", "x" * 65, "<|end|>"])
def test_bad_tool_name_is_refused(name):
    with pytest.raises(ConversationError, match="bad tool name"):
        Tool(name)


def test_parameters_that_are_no_json_are_refused():
    with pytest.raises(ConversationError, match="tool f: pass a JSON schema"):
        Tool("f", parameters={"properties": {"x": object()}})


def test_tool_reads_the_openai_dict():
    inner = {"name": "f", "description": "Does.", "parameters": {"type": "object"}}
    assert (
        Tool.from_dict({"type": "function", "function": inner})
        == Tool.from_dict(inner)
        == Tool("f", "Does.", {"type": "object"})
    )
    with pytest.raises(ConversationError, match="tool without a name"):
        Tool.from_dict({"type": "function"})
    with pytest.raises(ConversationError, match="parameters that are no object"):
        Tool.from_dict({"name": "f", "parameters": []})


@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        ('{"x": 2}', '{"twice": 4}'),
        ('{"x": "é"}', '{"twice": "éé"}'),
        ("[1]", "error: the arguments are not a JSON object"),
        ("{", "error: the arguments are not JSON: Expecting property name"),
        ("[" * 100_000, "error: the arguments are not JSON: maximum recursion"),
        ("", "error: TypeError: "),
        ('{"x": null}', "error: TypeError: unsupported operand"),
    ],
)
def test_tool_runs_or_says_what_went_wrong(arguments, result):
    assert Tool("f", function=lambda x: {"twice": x * 2}).run(arguments).startswith(result)


def test_tool_without_a_function_cannot_run():
    with pytest.raises(ConversationError, match="answer the call yourself"):
        Tool("f").run("{}")
