"""The parser reads what harmony writes, and gives back every character of what nobody should have written."""

import openai_harmony as harmony
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gptoss_jax.errors import VocabularyError
from gptoss_jax.harmony import tokens
from gptoss_jax.harmony.conversation import CHANNELS, Message, tool_result
from gptoss_jax.harmony.encoding import decode, encode, harmony_encoding, render_conversation
from gptoss_jax.harmony.parser import (
    HEADER_LIMIT,
    Malformed,
    MessageEnd,
    MessageStart,
    RawText,
    StreamParser,
    TextDelta,
    parse,
)

MARKERS = [tokens.RETURN, tokens.CONSTRAIN, tokens.CHANNEL, tokens.START, tokens.END, tokens.MESSAGE, tokens.CALL]
HEADER_WORDS = encode("assistant user analysis commentary final to=functions.f json code")
any_id = st.one_of(
    st.sampled_from(MARKERS), st.sampled_from(HEADER_WORDS), st.integers(0, 255), st.integers(0, 201_087)
)
any_stream = st.lists(any_id, max_size=60)
any_role = st.sampled_from([None, "assistant"])


def stream(text):
    return encode(text, special=True)


def summary(events):
    """Events as short strings, adjacent text joined."""
    lines = []
    for event in events:
        match event:
            case MessageStart(header):
                lines.append(f"start {header.role} {header.channel} {header.recipient} {header.content_type}")
            case MessageEnd(message, end):
                lines.append(f"{end} {message.content!r}")
            case Malformed(reason):
                lines.append(f"warning {reason}")
            case TextDelta(text) | RawText(text):
                kind = "text" if isinstance(event, TextDelta) else "raw"
                if lines and lines[-1].startswith(kind):
                    lines[-1] += text
                else:
                    lines.append(f"{kind} {text}")
    return lines


def messages_of(events):
    return [event.message for event in events if isinstance(event, MessageEnd)]


@given(any_stream, any_role)
@example(encode("é")[:1], None)
@example([tokens.START] + [0] * (HEADER_LIMIT + 1), None)
@example([tokens.MESSAGE, 174, 174, tokens.START, 174], "assistant")
def test_no_stream_raises_or_loses_a_character(ids, role):
    events = parse(ids, role)
    assert "".join(event.source for event in events) == decode(ids)
    raw_text = "".join(event.text for event in events if isinstance(event, RawText))
    assert not raw_text or any(isinstance(event, Malformed) for event in events)


@given(any_stream, any_role)
def test_messages_are_their_deltas_between_start_and_end(ids, role):
    opened, text = None, ""
    for event in parse(ids, role):
        match event:
            case MessageStart(header):
                assert opened is None
                opened, text = header, ""
            case TextDelta(delta, header):
                assert header is opened
                assert delta
                text += delta
            case MessageEnd(message):
                assert opened is not None
                assert message == opened.message(text)
                opened = None
    assert opened is None


@given(st.lists(any_id, min_size=1, max_size=60), any_role, st.integers(0, 60))
def test_a_longer_stream_only_adds_events(ids, role, cut):
    """What was said stays said: the events so far do not depend on what comes next."""
    parser = StreamParser(role)
    before = [event for token in ids[:cut] for event in parser.feed(token)]
    after = [event for token in ids[cut:] for event in parser.feed(token)]
    assert before + after + parser.close() == parse(ids, role)


name = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
said = st.one_of(
    st.builds(Message, st.just("user"), st.text()),
    st.builds(Message, st.just("assistant"), st.text(), channel=st.sampled_from(CHANNELS)),
    st.builds(
        Message,
        st.just("assistant"),
        st.text(),
        channel=st.sampled_from(["analysis", "commentary"]),
        recipient=name.map("functions.{}".format),
        content_type=st.sampled_from([None, "<|constrain|>json", "code"]),
    ),
    st.builds(tool_result, name.map("functions.{}".format), st.text()),
)


@given(st.lists(said, max_size=5))
def test_rendered_conversations_are_read_back_as_harmony_reads_them(messages):
    kept = [message for message in messages if message.channel != "analysis"]
    *_, system_end = (i for i, token in enumerate(render_conversation([])) if token == tokens.END)
    ids = render_conversation(kept)[system_end + 1 :]
    assert ids[-2:] == stream("<|start|>assistant")
    ids = ids[:-2]
    events = parse(ids, role=None)
    assert messages_of(events) == kept
    assert not [event for event in events if isinstance(event, Malformed | RawText)]
    theirs = harmony_encoding().parse_messages_from_completion_tokens(ids, None)
    assert [as_harmony(message) for message in kept] == [message.to_dict() for message in theirs]


def as_harmony(message):
    fields = {key: getattr(message, key) for key in ("channel", "recipient", "content_type")}
    content = [{"type": "text", "text": message.content}]
    return {"role": message.role, "name": message.name, "content": content} | {k: v for k, v in fields.items() if v}


def test_streamed_deltas_agree_with_harmonys_own_parser():
    """The published example of docs/format.md, plus a character of three tokens."""
    ids = stream("<|channel|>analysis<|message|>Sum 🦙.<|end|><|start|>assistant<|channel|>final<|message|>2 + 2 = 4.")
    theirs = harmony.StreamableParser(harmony_encoding(), harmony.Role.ASSISTANT)
    parser = StreamParser()
    ours, said_by_harmony = "", ""
    for token in ids:
        ours += "".join(event.text for event in parser.feed(token) if isinstance(event, TextDelta))
        theirs.process(token)
        if theirs.state is harmony.StreamState.CONTENT and token < tokens.START_OF_TEXT:
            said_by_harmony += theirs.last_content_delta or ""
    assert ours == said_by_harmony == "Sum 🦙.2 + 2 = 4."


def test_broken_characters_read_as_harmony_reads_them():
    ids = [*stream("<|channel|>final<|message|>a"), 174, *encode("🦙")[:2], tokens.RETURN]
    (message,) = messages_of(parse(ids))
    (theirs,) = harmony_encoding().parse_messages_from_completion_tokens(ids, harmony.Role.ASSISTANT)
    assert as_harmony(message) == theirs.to_dict()


def test_characters_are_never_split():
    deltas = [event.text for event in parse(stream("<|channel|>final<|message|>🦙é")) if isinstance(event, TextDelta)]
    assert deltas == ["🦙", "é"]


CALL = "start assistant commentary functions.f"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|channel|>final<|message|>4.<|return|>", ["start assistant final None None", "text 4.", "return '4.'"]),
        (
            "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
            [f"{CALL} <|constrain|>json", "text {}", "call '{}'"],
        ),
        (
            " to=functions.f<|channel|>commentary<|constrain|>json<|message|>{}<|call|>",
            [f"{CALL} <|constrain|>json", "text {}", "call '{}'"],
        ),
        ("<|channel|>commentary to=functions.f json<|message|>{}<|call|>", [f"{CALL} json", "text {}", "call '{}'"]),
        (
            "<|channel|>final <|constrain|>json<|message|>{}<|return|>",
            ["start assistant final None <|constrain|>json", "text {}", "return '{}'"],
        ),
        ("<|start|>assistant<|channel|>final<|message|>4", ["start assistant final None None", "text 4", "cut '4'"]),
        ("assistant<|channel|>final<|message|>4", ["start assistant final None None", "text 4", "cut '4'"]),
        ("", []),
    ],
)
def test_well_formed(text, expected):
    assert summary(parse(stream(text))) == expected


FINAL = ["start assistant final None None", "text b", "return 'b'"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello", ["warning the stream ended inside a header", "raw hello"]),
        ("<|channel|>final hi<|return|>", ["warning <|return|> inside a header", "raw <|channel|>final hi<|return|>"]),
        (
            "<|message|>hi<|return|>",
            ["warning a header without a channel", "start assistant None None None", "text hi", "return 'hi'"],
        ),
        (
            "<|channel|>lyrics<|message|>la<|end|>",
            ["warning unknown channel 'lyrics'", "start assistant lyrics None None", "text la", "end 'la'"],
        ),
        (
            "<|channel|>final a b<|message|>b<|return|>",
            [
                "warning a content type 'b' without a recipient",
                "warning unexpected in a header: 'a'",
                "start assistant final None b",
                "text b",
                "return 'b'",
            ],
        ),
        (
            "<|channel|>analysis<|message|>a<|channel|>final<|message|>b<|return|>",
            [
                "start assistant analysis None None",
                "text a",
                "warning a message that does not end before the next begins",
                "cut 'a'",
                *FINAL,
            ],
        ),
        (
            "<|channel|>analysis<|message|>a<|end|><|channel|>final<|message|>b<|return|>",
            ["start assistant analysis None None", "text a", "end 'a'", "warning a message without <|start|>", *FINAL],
        ),
        (
            "<|start|>assistant<|channel|>fin<|start|>assistant<|channel|>final<|message|>b<|return|>",
            ["warning a header inside a header", "raw <|start|>assistant<|channel|>fin", *FINAL],
        ),
        (
            "<|channel|>final<|message|>b<|return|>c<|end|>d",
            [*FINAL, "warning text outside of a message", "raw c<|end|>d"],
        ),
        (
            "<|channel|>final<|message|>b<|endoftext|><|return|>",
            [*FINAL[:2], "warning <|endoftext|> inside a message", "raw <|endoftext|>", FINAL[2]],
        ),
        (
            "<|start|><|channel|>final<|message|>b<|return|>",
            ["warning a header without a role", *FINAL],
        ),
        (
            "<|start|>robot<|channel|>final<|message|>b<|return|>",
            ["warning unknown role 'robot'", "start tool final None None", "text b", "return 'b'"],
        ),
    ],
)
def test_malformed(text, expected):
    assert summary(parse(stream(text))) == expected


def test_a_header_without_end_is_shown_before_the_stream_ends():
    parser = StreamParser()
    shown = [event.source for token in encode(" word" * (HEADER_LIMIT + 1)) for event in parser.feed(token)]
    assert "".join(shown) == " word" * (HEADER_LIMIT + 1)


def test_user_names_are_read():
    events = parse(stream("<|start|>user:anna<|message|>Hi<|end|>"), role=None)
    assert messages_of(events) == [Message("user", "Hi", name="anna")]


def test_id_outside_the_vocabulary_is_refused():
    with pytest.raises(VocabularyError, match="no token has the id 300000"):
        StreamParser(None).feed(300_000)
