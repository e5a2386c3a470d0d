"""Messages and tools as our users write them: small dataclasses, or the chat dicts of OpenAI's API.

How they become ids is encoding.py's business.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from gptoss_jax.errors import ConversationError

ROLES = ("system", "developer", "user", "assistant", "tool")
CHANNELS = ("analysis", "commentary", "final")
REASONING_LEVELS = ("low", "medium", "high")
FUNCTIONS = "functions."
"""The namespace of the caller's own tools; `python` and `browser` are the model's built-in ones."""


@dataclasses.dataclass(frozen=True)
class Message:
    """One harmony message: who speaks, where, to whom, and what.

    `name` is the tool's when the role is `tool`. `recipient` makes it a tool call. `content_type` is kept as it stands
    in the header, marker included: `<|constrain|>json`.

    >>> Message("user", "What is 2 + 2?")
    Message(role='user', content='What is 2 + 2?', name=None, channel=None, recipient=None, content_type=None)
    """

    role: str
    content: str
    name: str | None = None
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ConversationError(
                f"unknown role {self.role!r}", where="message", fix=f"use one of {', '.join(ROLES)}"
            )
        if self.role == "tool" and not self.name:
            raise ConversationError("a tool message without a name", where="message", fix="name the tool that answers")


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function the model may call: `parameters` is a JSON schema, `function` takes them as keywords.

    Without `function` the caller answers the calls.

    >>> schema = {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}
    >>> add = Tool("add", "Adds two numbers.", schema, function=lambda a, b: a + b)
    >>> add.run('{"a": 2, "b": 3}')
    '5'
    >>> add.run('{"a": 2')
    "error: the arguments are not JSON: Expecting ',' delimiter: line 1 column 8 (char 7)"
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    function: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", self.name):
            raise ConversationError(
                f"bad tool name {self.name!r}", where="tools", fix="use 1 to 64 letters, digits, underscores and dashes"
            )
        try:
            json.dumps(self.parameters and dict(self.parameters))
        except (TypeError, ValueError) as error:
            raise ConversationError(
                f"parameters are no JSON ({error})", where=f"tool {self.name}", fix="pass a JSON schema"
            ) from error

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "Tool":
        """Read OpenAI's `{"type": "function", "function": {...}}`, or the inner dict alone."""
        inner = entry.get("function", entry)
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise ConversationError(f"tool without a name {dict(entry)!r}", where="tools", fix="give it a name")
        parameters = inner.get("parameters")
        if not isinstance(parameters, Mapping | None):
            raise ConversationError("parameters that are no object", where="tools", fix="write a JSON schema")
        return cls(inner["name"], inner.get("description") or "", parameters)

    def run(self, arguments: str) -> str:
        """Run the function and return what the model shall read: the result, or the error in words."""
        if self.function is None:
            raise ConversationError(
                "a tool without a function", where=f"tool {self.name}", fix="answer the call yourself"
            )
        try:
            keywords = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            return f"error: the arguments are not JSON: {error}"
        if not isinstance(keywords, dict):
            return "error: the arguments are not a JSON object"
        try:
            result = self.function(**keywords)
            return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
        except Exception as error:  # any: it is the user's function, and its error is for the model to read
            return f"error: {type(error).__name__}: {error}"


def read_messages(messages: Iterable[Message | Mapping[str, Any]]) -> list[Message]:
    """Turn OpenAI-style chat dicts into harmony messages; messages pass through.

    One dict with reasoning, text and tool calls becomes several messages, since in harmony each has one channel.

    >>> call = {"id": "1", "function": {"name": "now", "arguments": "{}"}}
    >>> for message in read_messages([
    ...     {"role": "assistant", "reasoning_content": "Ask the clock.", "tool_calls": [call]},
    ...     {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ... ]):
    ...     print(message.role, message.name, message.channel, message.recipient, message.content)
    assistant None analysis None Ask the clock.
    assistant None commentary functions.now {}
    tool functions.now commentary assistant noon
    """
    return [message for group in read_each(messages) for message in group]


def read_each(messages: Iterable[Message | Mapping[str, Any]]) -> Iterator[list[Message]]:
    """What `read_messages` makes of each entry by itself: none of an assistant that says nothing.

    Beside OpenAI's keys an assistant's entry may have Hugging Face's `thinking` for its reasoning and objects for the
    arguments of calls, or harmony's own `channel` (with `recipient` and `content_type`).
    """
    names: dict[str, str] = {}
    for index, entry in enumerate(messages):
        where = f"message {index}"
        if isinstance(entry, Message):
            yield [entry]
            continue
        role = entry.get("role")
        if role == "assistant":
            yield list(_read_assistant(entry, names, where))
        elif role == "tool":
            yield [tool_result(_called_tool(entry, names, where), _read_text(entry.get("content"), where))]
        elif role in ROLES:
            yield [Message(role, _read_text(entry.get("content"), where))]
        else:
            raise ConversationError(f"unknown role {role!r}", where=where, fix=f"use one of {', '.join(ROLES)}")


def tool_call(name: str, arguments: str) -> Message:
    """The assistant's call of one of the caller's functions, as the model itself writes it."""
    return Message(
        "assistant", arguments, channel="commentary", recipient=FUNCTIONS + name, content_type="<|constrain|>json"
    )


def tool_result(tool: str, content: str, *, channel: str = "commentary") -> Message:
    """A tool's answer to the assistant; `tool` is the call's recipient, `channel` the call's."""
    return Message("tool", content, name=tool, channel=channel, recipient="assistant")


def _read_assistant(entry: Mapping[str, Any], names: dict[str, str], where: str) -> Iterator[Message]:
    """Yield reasoning, text, calls, in the order the model writes them, and note the calls' ids in `names`."""
    calls = entry.get("tool_calls") or ()
    if not isinstance(calls, list | tuple):
        raise ConversationError(f"tool_calls of type {type(calls).__name__}", where=where, fix="write a list")
    if entry.get("channel"):
        yield _read_channel(entry, where)
        return
    reasoning = entry.get("reasoning_content") or entry.get("reasoning") or entry.get("thinking")
    if reasoning:
        yield Message("assistant", _read_text(reasoning, where), channel="analysis")
    if entry.get("content"):
        channel = "commentary" if calls else "final"
        yield Message("assistant", _read_text(entry["content"], where), channel=channel)
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name := function.get("name"), str) or not name:
            raise ConversationError(f"tool call without a function name {call!r}", where=where, fix="name the function")
        arguments = function.get("arguments") or "{}"
        if isinstance(arguments, Mapping):
            arguments = json.dumps(arguments, ensure_ascii=False)
        names[str(call.get("id"))] = FUNCTIONS + name
        yield tool_call(name, _read_text(arguments, where))


def _read_channel(entry: Mapping[str, Any], where: str) -> Message:
    """One message of harmony's own, as its header names it."""
    channel, recipient, content_type = (entry.get(key) for key in ("channel", "recipient", "content_type"))
    if channel not in CHANNELS:
        raise ConversationError(f"unknown channel {channel!r}", where=where, fix=f"use one of {', '.join(CHANNELS)}")
    if entry.get("tool_calls"):
        raise ConversationError("a channel and tool_calls", where=where, fix="write the recipient, or no channel")
    for key, value in (("recipient", recipient), ("content_type", content_type)):
        if not isinstance(value, str | None):
            raise ConversationError(f"{key} {value!r}", where=where, fix="write text")
    return Message(
        "assistant",
        _read_text(entry.get("content"), where),
        channel=channel,
        recipient=recipient,
        content_type=content_type,
    )


def _called_tool(entry: Mapping[str, Any], names: Mapping[str, str], where: str) -> str:
    if entry.get("name"):
        return FUNCTIONS + str(entry["name"]).removeprefix(FUNCTIONS)
    identifier = str(entry.get("tool_call_id"))
    if identifier not in names:
        raise ConversationError(
            f"tool result for an unknown call {identifier!r}", where=where, fix="keep the message that made the call"
        )
    return names[identifier]


def _read_text(content: Any, where: str) -> str:
    """Read a string, None, or a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ConversationError(f"content of type {type(content).__name__}", where=where, fix="pass text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise ConversationError(f"content part {kind!r}", where=where, fix="gpt-oss reads text only")
        texts.append(part["text"])
    return "".join(texts)
