"""Text and conversations to token ids and back, by openai-harmony, offline.

The layout of every message is openai-harmony's (openai/harmony, docs/format.md). Ours are the vocabulary
(vocabulary.py), which past reasoning to drop, and a guard against inputs that harmony's tokenizer cannot take.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import openai_harmony as harmony

from gptoss_jax.errors import ConversationError, VocabularyError
from gptoss_jax.harmony.conversation import REASONING_LEVELS, Message, Tool, read_messages
from gptoss_jax.harmony.vocabulary import FOLDER_VARIABLE, vocabulary_folder

LONGEST_RUN = 20_000
"""Characters of one kind in a row (spaces, letters, punctuation) that are tokenized as one piece.

harmony's tokenizer takes time quadratic in the run (200,000 spaces: 14 s) and aborts at about a million, so longer runs
are cut. Text is never changed; only at a cut may the ids differ from the uncut ones.
"""


@functools.cache
def harmony_encoding() -> harmony.HarmonyEncoding:
    """Load openai-harmony's encoding, once a process (about 0.5 s), pointing it at the offline vocabulary."""
    os.environ[FOLDER_VARIABLE] = str(vocabulary_folder())
    return harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


def encode(text: str, *, special: bool = False) -> list[int]:
    """Return the ids of `text`; markers such as `<|end|>` are plain text unless `special`.

    >>> encode("<|start|>user", special=True)
    [200006, 1428]
    >>> len(encode("<|start|>user"))
    6
    """
    encoding = harmony_encoding()
    allowed = encoding.special_tokens_set if special else set()
    ids = []
    for piece in _bounded_pieces(text):
        ids += encoding.encode(piece, allowed_special=allowed, disallowed_special=())
    return ids


def decode(ids: Iterable[int]) -> str:
    """Return the text of `ids`, markers by their names, bytes that are not UTF-8 as U+FFFD.

    >>> decode([200006, 1428])
    '<|start|>user'
    """
    return b"".join(token_bytes(int(token)) for token in ids).decode("utf-8", "replace")


@functools.cache
def token_bytes(token: int) -> bytes:
    """Return the bytes one id stands for, which need not be whole characters.

    >>> [token_bytes(token) for token in encode("🦙")]
    [b'\\xf0\\x9f', b'\\xa6', b'\\x99']
    """
    try:
        text = harmony_encoding().decode([token], errors="surrogateescape")
    except (harmony.HarmonyError, OverflowError) as error:
        raise VocabularyError(
            f"no token has the id {token}", where="o200k_harmony", fix="use ids 0 to 201087"
        ) from error
    return text.encode("utf-8", "surrogateescape")


def render_conversation(
    messages: Iterable[Message | Mapping[str, Any]],
    *,
    reasoning: str = "medium",
    tools: Sequence[Tool] = (),
    instructions: str | None = None,
    date: datetime.date | None = None,
) -> list[int]:
    """Return the prompt after which the assistant speaks.

    It is a system message (identity, knowledge cutoff, `date` or today's, reasoning level, channels), a developer
    message if there are instructions or tools, and `messages` without the reasoning that led to answers already given.
    System and developer messages that open `messages` join the instructions: that is what OpenAI's chat API calls the
    system prompt.

    >>> prompt = render_conversation(
    ...     [{"role": "user", "content": "Hi"}], reasoning="low", tools=[Tool("now")], date=datetime.date(2025, 8, 5)
    ... )
    >>> print(decode(prompt).replace("<|start|>", "\\n<|start|>").lstrip())
    <|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
    Knowledge cutoff: 2024-06
    Current date: 2025-08-05
    <BLANKLINE>
    Reasoning: low
    <BLANKLINE>
    # Valid channels: analysis, commentary, final. Channel must be included for every message.
    Calls to these tools must go to the commentary channel: 'functions'.<|end|>
    <|start|>developer<|message|># Tools
    <BLANKLINE>
    ## functions
    <BLANKLINE>
    namespace functions {
    <BLANKLINE>
    type now = () => any;
    <BLANKLINE>
    } // namespace functions<|end|>
    <|start|>user<|message|>Hi<|end|>
    <|start|>assistant
    """
    told, history = _split_instructions(read_messages(messages), instructions)
    conversation = [_system_message(reasoning, date or datetime.date.today())]
    if told or tools:
        conversation.append(_developer_message(told, tools))
    conversation += [_harmony_message(message) for message in drop_past_reasoning(history)]
    with _refusals_named():
        return harmony_encoding().render_conversation_for_completion(
            harmony.Conversation.from_messages(conversation),
            harmony.Role.ASSISTANT,
            harmony.RenderConversationConfig(auto_drop_analysis=False),
        )


def render_each(
    messages: Sequence[Message],
    *,
    reasoning: str = "medium",
    tools: Sequence[Tool] = (),
    instructions: str | None = None,
    date: datetime.date | None = None,
) -> tuple[list[int], list[list[int]]]:
    """Return what opens a prompt, and the ids of each message that follows; past reasoning is the caller's to drop.

    Joined, with `<|start|>assistant`, they are the prompt of `render_conversation`. System and developer messages that
    open `messages` are in the opening and have no list of their own.

    >>> opening, (question, answer) = render_each([Message("user", "2?"), Message("assistant", "4", channel="final")])
    >>> decode(answer)
    '<|start|>assistant<|channel|>final<|message|>4<|end|>'
    """
    told, following = _split_instructions(messages, instructions)
    described = json.dumps([(tool.name, tool.description, tool.parameters) for tool in tools])
    with _refusals_named():
        opening = _render_system(reasoning, date or datetime.date.today(), bool(tools))
        if told or tools:
            opening += _render_developer(told, described)
        return list(opening), [_render_message(message) for message in following]


def _render_message(message: Message) -> list[int]:
    if message.role in ("system", "developer"):
        return harmony_encoding().render(_harmony_message(message))
    *header, end = _render_empty(dataclasses.replace(message, content=""))
    return [*header, *encode(message.content), end]


@functools.lru_cache(maxsize=4096)
def _render_empty(message: Message) -> tuple[int, ...]:
    """A message's header and end; kept, since harmony takes 80 us for a message beside what its text takes."""
    return tuple(harmony_encoding().render(_harmony_message(message)))


@functools.lru_cache(maxsize=2**16)
def _render_system(reasoning: str, date: datetime.date, has_tools: bool) -> tuple[int, ...]:
    options = harmony.RenderOptions(conversation_has_function_tools=has_tools)
    return tuple(harmony_encoding().render(_system_message(reasoning, date), options))


@functools.lru_cache(maxsize=4096)
def _render_developer(told: str, tools: str) -> tuple[int, ...]:
    """Kept as the others are: in a data set many conversations open alike, and tools take 1 ms."""
    described = [Tool(*fields) for fields in json.loads(tools)]
    return tuple(harmony_encoding().render(_developer_message(told, described)))


def _split_instructions(messages: Sequence[Message], instructions: str | None) -> tuple[str, Sequence[Message]]:
    """The instructions, with the system and developer messages that open a conversation, and what follows those."""
    num_opening = next((i for i, m in enumerate(messages) if m.role not in ("system", "developer")), len(messages))
    told = [text for text in (instructions, *(m.content for m in messages[:num_opening])) if text]
    return "\n\n".join(told), messages[num_opening:]


@contextlib.contextmanager
def _refusals_named() -> Iterator[None]:
    try:
        yield
    except (harmony.HarmonyError, ValueError) as error:  # such as a tool's schema nested over 128 deep
        raise ConversationError(f"harmony refuses it ({error})", where="conversation", fix="correct it") from error


def drop_past_reasoning(messages: Sequence[Message]) -> list[Message]:
    """Leave out the analysis that led to a final answer; keep what a tool call still needs.

    harmony's own `auto_drop_analysis` (0.0.8) only looks before the first final answer, so a third turn would still
    carry the reasoning of the second. The format asks for all of it to go (docs/format.md, "Handling reasoning output
    in subsequent sampling").

    >>> drop_past_reasoning([
    ...     Message("assistant", "Sum.", channel="analysis"), Message("assistant", "4", channel="final"),
    ...     Message("assistant", "Ask.", channel="analysis"),
    ... ]) == [Message("assistant", "4", channel="final"), Message("assistant", "Ask.", channel="analysis")]
    True
    """
    answered = max((i for i, m in enumerate(messages) if m.role == "assistant" and m.channel == "final"), default=-1)
    return [m for i, m in enumerate(messages) if i > answered or m.channel != "analysis"]


def _system_message(reasoning: str, date: datetime.date) -> harmony.Message:
    if reasoning not in REASONING_LEVELS:
        raise ConversationError(
            f"unknown reasoning level {reasoning!r}", where="reasoning", fix=f"use one of {', '.join(REASONING_LEVELS)}"
        )
    content = (
        harmony.SystemContent.new()
        .with_reasoning_effort(harmony.ReasoningEffort[reasoning.upper()])
        .with_conversation_start_date(date.isoformat())
    )
    return harmony.Message.from_role_and_content(harmony.Role.SYSTEM, content)


def _developer_message(instructions: str, tools: Sequence[Tool] = ()) -> harmony.Message:
    content = harmony.DeveloperContent.new()
    if instructions:
        content.with_instructions(_short(instructions, "instructions"))
    if tools:
        content.with_function_tools([_tool_description(tool) for tool in tools])
    return harmony.Message.from_role_and_content(harmony.Role.DEVELOPER, content)


def _tool_description(tool: Tool) -> harmony.ToolDescription:
    """A tool whose schema has no properties takes no arguments: the format writes `() => any` for it."""
    parameters = dict(tool.parameters) if tool.parameters and tool.parameters.get("properties") else None
    return harmony.ToolDescription.new(tool.name, _short(tool.description, f"tool {tool.name}"), parameters)


def _harmony_message(message: Message) -> harmony.Message:
    if message.role in ("system", "developer"):  # later in a conversation: the developer speaks again
        return _developer_message(message.content)
    return harmony.Message(
        author=harmony.Author(role=harmony.Role(message.role), name=message.name),
        content=[harmony.TextContent(text=piece) for piece in _bounded_pieces(message.content)],
        channel=message.channel,
        recipient=message.recipient,
        content_type=message.content_type,
    )


def _short(text: str, where: str) -> str:
    pieces = list(_bounded_pieces(text))
    if len(pieces) > 1:
        raise ConversationError(
            f"over {LONGEST_RUN} characters of one kind in a row", where=where, fix="move the data to a user message"
        )
    return "".join(pieces)


def _bounded_pieces(text: str) -> Iterator[str]:
    """Cut `text` where one kind of character runs on for too long; lone surrogates become U+FFFD, as in tiktoken."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    start = 0
    if len(text) > LONGEST_RUN:
        for run in re.finditer(r"\s+|[^\W\d_]+|(?:[^\w\s]|_)+", text):
            for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
                yield text[start:cut]
                start = cut
    yield text[start:]
