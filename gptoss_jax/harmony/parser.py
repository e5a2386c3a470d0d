"""Token ids, as the model emits them, to events: a state machine that loses no text and refuses no stream.

openai_harmony.StreamableParser raises on streams that real models emit (a missing `<|start|>`, a spare word in a
header), strict or not, and the rest of the stream is lost. Here whatever fits the format becomes messages and the rest
becomes raw text with a warning. One law holds for every stream: the events' `source` texts, joined, are the decoded
stream.
"""

import codecs
import dataclasses
import enum
from collections.abc import Iterable
from typing import Literal

from gptoss_jax.harmony import tokens
from gptoss_jax.harmony.conversation import Message
from gptoss_jax.harmony.encoding import decode, token_bytes
from gptoss_jax.harmony.header import Header, read_header

HEADER_LIMIT = 128
"""Ids in a header; past this it is no header, and its text is shown instead of withheld."""

End = Literal["end", "return", "call", "cut"]
_ENDS: dict[int, End] = {tokens.END: "end", tokens.RETURN: "return", tokens.CALL: "call"}


@dataclasses.dataclass(frozen=True)
class MessageStart:
    """A header is complete."""

    header: Header

    @property
    def source(self) -> str:
        return self.header.source


@dataclasses.dataclass(frozen=True)
class TextDelta:
    """The next whole characters of a message."""

    text: str
    header: Header

    @property
    def source(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class MessageEnd:
    """A message is over: by its end, return or call marker, or `cut` off by what followed or by the stream's end."""

    message: Message
    end: End

    @property
    def source(self) -> str:
        return "" if self.end == "cut" else f"<|{self.end}|>"


@dataclasses.dataclass(frozen=True)
class RawText:
    """Text that belongs to no message; a Malformed event before it says why."""

    text: str

    @property
    def source(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Malformed:
    """A warning: the stream left the format here."""

    reason: str

    @property
    def source(self) -> str:
        return ""


Event = MessageStart | TextDelta | MessageEnd | RawText | Malformed


class _State(enum.Enum):
    BETWEEN = "between messages"
    HEADER = "in a header"
    CONTENT = "in a message"
    RAW = "in raw text"


class StreamParser:
    """Feed it one id at a time; each call returns the events that id completes.

    `role` is the speaker the prompt ended with (`<|start|>assistant`), or None for a stream that starts with a message.

    >>> from gptoss_jax.harmony.encoding import encode
    >>> parser = StreamParser()
    >>> for token in encode("<|channel|>final<|message|>4.<|return|>", special=True):
    ...     for event in parser.feed(token):
    ...         print(type(event).__name__, repr(event.source))
    MessageStart '<|channel|>final<|message|>'
    TextDelta '4'
    TextDelta '.'
    MessageEnd '<|return|>'
    """

    def __init__(self, role: str | None = "assistant") -> None:
        self._state = _State.BETWEEN if role is None else _State.HEADER
        self._role = role  # of the header being read, where something before it named one
        self._header_ids: list[int] = []
        self._header = Header("assistant")
        self._content: list[str] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._events: list[Event] = []

    def feed(self, token: int) -> list[Event]:
        if token >= tokens.START_OF_TEXT:
            self._emit_text(b"", final=True)  # a marker ends whatever character was incomplete
        match self._state:
            case _State.HEADER:
                self._feed_header(token)
            case _State.CONTENT:
                self._feed_content(token)
            case _State.BETWEEN | _State.RAW:
                self._feed_between(token)
        return self._take_events()

    def close(self) -> list[Event]:
        """Say that no more ids come: an open message or header is given back as far as it got."""
        self._emit_text(b"", final=True)
        if self._state is _State.HEADER and self._header_ids:
            self._abandon_header("the stream ended inside a header")
            self._emit_text(b"", final=True)
        elif self._state is _State.CONTENT:
            self._end_message("cut")
        self._state = _State.BETWEEN
        return self._take_events()

    def _feed_between(self, token: int) -> None:
        if token == tokens.START:
            self._begin_header(token, role=None)
        elif token in (tokens.CHANNEL, tokens.MESSAGE):
            self._events.append(Malformed("a message without <|start|>"))
            self._begin_header(None, role="assistant")
            self._feed_header(token)
        else:
            if self._state is _State.BETWEEN:
                self._events.append(Malformed("text outside of a message"))
                self._state = _State.RAW
            self._emit_text(token_bytes(token))

    def _feed_header(self, token: int) -> None:
        if token == tokens.MESSAGE:
            self._header, problems = read_header([*self._header_ids, token], self._role)
            self._events += [Malformed(problem) for problem in problems]
            self._events.append(MessageStart(self._header))
            self._content = []
            self._state = _State.CONTENT
        elif token == tokens.START and self._header_ids:
            self._abandon_header("a header inside a header")
            self._begin_header(token, role=None)
        elif token == tokens.START:  # the prompt's own `<|start|>assistant`, once more
            self._begin_header(token, role=None)
        elif token >= tokens.START_OF_TEXT and token not in (tokens.CHANNEL, tokens.CONSTRAIN):
            self._header_ids.append(token)
            self._abandon_header(f"{decode([token])} inside a header")
            self._state = _State.BETWEEN if token in _ENDS else _State.RAW
        else:
            self._header_ids.append(token)
            if len(self._header_ids) > HEADER_LIMIT:
                self._abandon_header(f"a header longer than {HEADER_LIMIT} ids")

    def _feed_content(self, token: int) -> None:
        if token in _ENDS:
            self._end_message(_ENDS[token])
            self._state = _State.BETWEEN
        elif token in (tokens.START, tokens.CHANNEL):
            self._events.append(Malformed("a message that does not end before the next begins"))
            self._end_message("cut")
            role = None if token == tokens.START else self._header.role
            self._begin_header(token, role=role)
        elif token >= tokens.START_OF_TEXT:
            self._events += [Malformed(f"{decode([token])} inside a message"), RawText(decode([token]))]
        else:
            self._emit_text(token_bytes(token))

    def _begin_header(self, token: int | None, *, role: str | None) -> None:
        self._state = _State.HEADER
        self._role = role
        self._header_ids = [] if token is None else [token]

    def _abandon_header(self, reason: str) -> None:
        """Give the header's ids back as raw text."""
        self._events.append(Malformed(reason))
        self._state = _State.RAW
        self._emit_text(b"".join(token_bytes(token) for token in self._header_ids))
        self._header_ids = []

    def _end_message(self, end: End) -> None:
        self._events.append(MessageEnd(self._header.message("".join(self._content)), end))

    def _emit_text(self, data: bytes, *, final: bool = False) -> None:
        """Emit the whole characters that `data` completes; keep the bytes of an incomplete one for the next id."""
        text = self._decoder.decode(data, final)
        if not text:
            return
        if self._state is _State.CONTENT:
            self._content.append(text)
            self._events.append(TextDelta(text, self._header))
        else:
            self._events.append(RawText(text))

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events


def parse(ids: Iterable[int], role: str | None = "assistant") -> list[Event]:
    """Parse a whole stream.

    >>> from gptoss_jax.harmony.encoding import encode
    >>> [event.source for event in parse(encode("So<|return|>", special=True))]
    ['', 'So<|return|>']
    """
    parser = StreamParser(role)
    events = [event for token in ids for event in parser.feed(int(token))]
    return events + parser.close()
