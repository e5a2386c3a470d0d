"""The header of a message: role, channel, recipient, content type, read from its ids.

    {role} to={recipient}<|channel|>{channel} to={recipient} <|constrain|>{content type}

The recipient may stand in either section (openai/harmony, docs/format.md, "Receiving tool calls").
"""

import dataclasses
from collections.abc import Sequence

from gptoss_jax.harmony import tokens
from gptoss_jax.harmony.conversation import CHANNELS, ROLES, Message
from gptoss_jax.harmony.encoding import decode


@dataclasses.dataclass(frozen=True)
class Header:
    """What a message says of itself; `source` is the header's exact text, markers included."""

    role: str
    name: str | None = None
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    source: str = ""

    def message(self, content: str) -> Message:
        return Message(self.role, content, self.name, self.channel, self.recipient, self.content_type)


def read_header(ids: Sequence[int], role: str | None) -> tuple[Header, list[str]]:
    """Read everything a header says, and list in words what is wrong with it.

    `ids` run up to and with `<|message|>`. `role` is the one the prompt already named, if it did.

    >>> from gptoss_jax.harmony.encoding import encode
    >>> header, problems = read_header(encode("<|channel|>final<|message|>", special=True), "assistant")
    >>> header.role, header.channel, problems
    ('assistant', 'final', [])
    >>> read_header(encode("<|channel|>lyrics<|message|>", special=True), "assistant")[1]
    ["unknown channel 'lyrics'"]
    """
    problems: list[str] = []
    recipient = channel = content_type = None
    spare: list[str] = []  # words with no place of their own
    for marker, words in _sections(ids):
        for word in words:
            if word.startswith("to=") and len(word) > 3 and recipient is None:
                recipient = word[3:]
            elif marker == tokens.CHANNEL and channel is None:
                channel = word
            elif marker == tokens.CONSTRAIN and content_type is None:
                content_type = f"<|constrain|>{word}"
            elif marker == tokens.START and role is None:
                role = word
            elif marker == tokens.START and word == role:
                continue  # the model repeats the role its prompt ended with
            else:
                spare.append(word)
    if content_type is None and spare:
        content_type = spare.pop()  # gpt-oss also writes `to=functions.f json`, without <|constrain|>
        if recipient is None:
            problems.append(f"a content type {content_type!r} without a recipient")
    if spare:
        problems.append(f"unexpected in a header: {' '.join(spare)!r}")
    if role is None:
        problems.append("a header without a role")
        role = "assistant"
    role, name = _split_role(role)
    if role == "tool" and recipient is None:
        problems.append(f"unknown role {name!r}")
    if role == "assistant" and channel not in CHANNELS:
        problems.append("a header without a channel" if channel is None else f"unknown channel {channel!r}")
    return Header(role, name, channel, recipient, content_type, source=decode(ids)), problems


def _sections(ids: Sequence[int]) -> list[tuple[int, list[str]]]:
    """Split at the markers: the marker that opens each section (START for the first) and the section's words."""
    sections: list[tuple[int, list[int]]] = [(tokens.START, [])]
    for token in ids:
        if token in (tokens.CHANNEL, tokens.CONSTRAIN):
            sections.append((token, []))
        elif token < tokens.START_OF_TEXT:
            sections[-1][1].append(token)
    return [(marker, decode(section).split()) for marker, section in sections]


def _split_role(word: str) -> tuple[str, str | None]:
    """Read `assistant`, `user:anna`, or a tool's name, which stands where a role would."""
    role, _, name = word.partition(":")
    if role in ROLES and role != "tool":
        return role, name or None
    return "tool", word
