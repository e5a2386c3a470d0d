"""What a chat says while it answers: the events of Chat.send, and their form as JSON."""

import dataclasses
from typing import Any, Literal

from gptoss_jax.harmony.conversation import Message
from gptoss_jax.harmony.parser import Malformed


@dataclasses.dataclass(frozen=True)
class Text:
    """The next characters: of a channel, of a tool call's arguments (`call`), or of no message at all (`raw`)."""

    kind: Literal["analysis", "commentary", "final", "call", "raw"]
    text: str


@dataclasses.dataclass(frozen=True)
class MessageDone:
    """A message is complete and in the chat's history."""

    message: Message


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """The model calls a tool; `arguments` is the text it wrote, mostly JSON."""

    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class ToolResult:
    """A tool's function has run; `content` goes back to the model."""

    name: str
    content: str


@dataclasses.dataclass(frozen=True)
class Done:
    """The answer is over, and why: complete, out of tokens, a tool call for the caller to answer, or too many calls.

    `prompt_tokens` counts the last prompt, `completion_tokens` everything generated for this answer.
    """

    finish_reason: Literal["stop", "length", "tool_call", "tool_limit"]
    prompt_tokens: int
    completion_tokens: int


ChatEvent = Text | MessageDone | ToolCall | ToolResult | Malformed | Done


def as_json(event: ChatEvent) -> dict[str, Any]:
    """Return the event as a flat dict with a `type`.

    >>> as_json(Text("final", "4"))
    {'type': 'final', 'text': '4'}
    >>> as_json(Done("stop", 70, 12))
    {'type': 'done', 'finish_reason': 'stop', 'prompt_tokens': 70, 'completion_tokens': 12}
    """
    match event:
        case Text(kind, text):
            return {"type": kind, "text": text}
        case MessageDone(message):
            return {"type": "message", **dataclasses.asdict(message)}
        case Malformed(reason):
            return {"type": "warning", "reason": reason}
        case ToolCall():
            return {"type": "tool_call", **dataclasses.asdict(event)}
        case ToolResult():
            return {"type": "tool_result", **dataclasses.asdict(event)}
        case Done():
            return {"type": "done", **dataclasses.asdict(event)}
