"""The command line's chat: through pipes, as JSON, and on a real terminal."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from gptoss_jax.chat import Chat
from gptoss_jax.chat_terminal import run
from gptoss_jax.errors import PromptError
from gptoss_jax.harmony.conversation import Tool
from tests.scripted import Script, call, final, thought


class Terminal(io.StringIO):
    def isatty(self):
        return True


def talk(text, *replies, output=None, lines=None, json_lines=False, **settings):
    output = output or io.StringIO()
    script = Script(*replies)
    chat = Chat(None, generate=script, **settings)
    run(chat, input=lines or io.StringIO(text), output=output, json_lines=json_lines)
    return output.getvalue(), script


def test_through_pipes_each_line_is_a_turn_and_only_the_answer_is_bare():
    text, script = talk("2 + 2?\n\nand 3?", thought("Sum.") + final("4"), final("5"))
    assert text == "[analysis] Sum.\n4\n5\n"
    assert script.prompts[1].endswith("<|start|>user<|message|>and 3?<|end|><|start|>assistant")


def test_tool_calls_warnings_and_endings_are_labelled():
    add = Tool("add", function=lambda a: a + 1)
    text, _ = talk(
        "q\nr\n", call("functions.add", '{"a": 1}'), final("2"), "oops<|end|>", tools=[add], max_new_tokens=60
    )
    assert text == (
        '[tool call] add {"a": 1}\n[tool result] add 2\n2\n'
        "[warning] <|end|> inside a header\n[raw] oops<|end|>\n[note] out of tokens: the answer is cut off\n"
    )


def test_consecutive_messages_of_a_channel_start_on_lines_of_their_own():
    text, _ = talk("q\n", thought("One.") + thought("Two.") + final("ok"))
    assert text == "[analysis] One.\n[analysis] Two.\nok\n"


def test_commands():
    text, script = talk("/reasoning high\nq\n/reset\nr\n/quit\nnever", final("a"), final("b"))
    assert text == "reasoning: high\na\nthe conversation is forgotten\nb\n"
    assert "Reasoning: high" in script.prompts[0]
    assert "<|message|>q<|end|>" not in script.prompts[1]


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("/reasoning", "reasoning is medium; choose low, medium, high\n"),
        ("/reasoning max", "reasoning is medium; choose low, medium, high\n"),
        ("/dance", "no such command: /dance (see /help)\n"),
        ("/reset now", "no such command: /reset now (see /help)\n"),
    ],
)
def test_a_bad_command_gets_a_hint_of_one_line(command, answer):
    assert talk(command)[0] == answer


def test_help_lists_every_command():
    text, _ = talk("/help")
    assert all(command in text for command in ("/reasoning", "/reset", "/help", "/quit"))


def test_json_lines():
    text, _ = talk("q\n/reset\n", thought("Hm.") + final("é"), json_lines=True, output=Terminal())
    events = [json.loads(line) for line in text.splitlines()]
    assert [event["type"] for event in events] == [
        "analysis",
        "analysis",
        "message",
        "final",
        "message",
        "done",
        "note",
    ]
    assert events[3] == {"type": "final", "text": "é"}
    assert events[-2]["finish_reason"] == "stop"


def test_on_a_terminal_reasoning_is_dim(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    text, _ = talk("q\n", thought("Hm.") + final("4"), output=Terminal())
    assert text == "\x1b[2mHm.\x1b[0m\n4\n"


def test_no_color_labels_instead(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text, _ = talk("q\n", thought("Hm.") + final("4"), output=Terminal())
    assert text == "[analysis] Hm.\n4\n"


def test_a_model_cannot_steer_the_terminal(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text, _ = talk("q\n", final("a\x1b[31mb\r\x9bc\td"), output=Terminal())
    assert text == "a␛[31mb␍\ufffdc\td\n"


def test_ctrl_c_stops_the_answer_and_not_the_program():
    text, script = talk("q\nr\n", ["<|channel|>final<|message|>half", KeyboardInterrupt()], final("whole"))
    assert text == "half\nstopped\nwhole\n"
    assert "<|channel|>final<|message|>half<|end|>" in script.prompts[1]


def test_an_error_ends_a_piped_chat_and_is_told_on_a_terminal():
    error = PromptError("9 ids", where="prompt", fix="shorten it")
    with pytest.raises(PromptError):
        talk("q\n", error)
    text, _ = talk("", error, final("ok"), lines=Terminal("q\nr\n"), output=Terminal())
    assert text == "> 9 ids: prompt: shorten it\n> ok\n> "


def test_a_waiting_call_takes_the_next_line():
    text, script = talk("q\n/etc is full\n", call("functions.ask", "{}"), final("ok"), tools=[Tool("ask")])
    assert text == "[tool call] ask {}\nok\n"
    assert "<|message|>/etc is full<|end|>" in script.prompts[1]


PROGRAM = """
import signal
import time
from gptoss_jax.chat import Chat
from gptoss_jax.chat_terminal import run
from tests.scripted import Script, final, thought

def slow(*arguments, **settings):
    for number, token in enumerate(script(*arguments, **settings)):
        yield token
        time.sleep(30 if number == 3 else 0)

# A test run that was started in the background hands down an ignored Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
script = Script(thought("Long thought.") + final("never"), final("Hello."))
chat = Chat(None, generate=lambda *a, **k: slow(*a, **k) if len(script.prompts) == 0 else script(*a, **k))
run(chat)
"""


def test_a_session_on_a_real_terminal():
    """Ask, interrupt with Ctrl-C, ask again, leave."""
    ours, theirs = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    seen = b""

    def wait_for(mark):
        nonlocal seen
        deadline = time.monotonic() + 60
        while mark not in seen:
            ready, _, _ = select.select([ours], [], [], max(0, deadline - time.monotonic()))
            assert ready, seen
            seen += os.read(ours, 1024)
        before, seen = seen.split(mark, 1)
        return before

    try:
        wait_for(b"> ")
        os.write(ours, b"think\n")
        wait_for(b"\x1b[2mLong")
        os.kill(process.pid, signal.SIGINT)
        wait_for(b"stopped")
        wait_for(b"> ")
        os.write(ours, b"hi\n")
        wait_for(b"Hello.")
        wait_for(b"> ")
        os.write(ours, b"/quit\n")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
