"""The chat of the command line: lines in, an answer streamed out, a few commands.

On a terminal there is a prompt, and reasoning is dimmed. Through pipes each line is one turn, the end of the input ends
the chat, and whatever is not the answer is labelled. With `json_lines` each event is one line of JSON.
"""

import json
import os
import sys
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from gptoss_jax.chat import Chat
from gptoss_jax.chat_events import ChatEvent, Done, MessageDone, Text, ToolCall, ToolResult, as_json
from gptoss_jax.errors import GptOssError
from gptoss_jax.harmony.conversation import REASONING_LEVELS
from gptoss_jax.harmony.parser import Malformed

HELP = """\
/reasoning LEVEL  low, medium or high, from the next question on
/reset            forget the conversation
/help             this list
/quit             leave (so does the end of the input)
Ctrl-C stops an answer."""

_ENDINGS = {
    "length": "out of tokens: the answer is cut off",
    "tool_limit": "too many tool calls: the answer is given up",
}
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
"""Control characters as pictures: what a model writes must not steer a terminal."""


@runtime_checkable
class Lines(Protocol):
    """What is read: sys.stdin, or any text file."""

    def readline(self) -> str: ...
    def isatty(self) -> bool: ...


@runtime_checkable
class Screen(Protocol):
    """What is written to: sys.stdout, or any text file."""

    def write(self, text: str, /) -> object: ...
    def flush(self) -> object: ...
    def isatty(self) -> bool: ...


def run(chat: Chat, *, input: Lines | None = None, output: Screen | None = None, json_lines: bool = False) -> None:
    """Talk until the input ends or /quit.

    >>> import io
    >>> run(Chat(None), input=io.StringIO("/reasoning high"), output=sys.stdout)
    reasoning: high
    """
    source, printer = input or sys.stdin, Printer(output or sys.stdout, json_lines=json_lines)
    interactive = source.isatty() and printer.on_terminal
    while True:
        if interactive:
            pending = chat.pending_call
            printer.prompt("> " if pending is None else f"result of {pending.name}> ")
        try:
            line = source.readline()
        except KeyboardInterrupt:
            if not interactive:
                raise
            printer.note("/quit leaves")
            continue
        text = line.strip()
        if not line or text == "/quit":
            return
        if text.startswith("/") and chat.pending_call is None:
            printer.note(_obey(chat, text))
        elif text or chat.pending_call is not None:
            _answer(chat, text, printer, interactive=interactive)


def _obey(chat: Chat, command: str) -> str:
    match command.split():
        case ["/help"]:
            return HELP
        case ["/reset"]:
            chat.reset()
            return "the conversation is forgotten"
        case ["/reasoning", level] if level in REASONING_LEVELS:
            chat.reasoning = level
            return f"reasoning: {level}"
        case ["/reasoning", *_]:
            return f"reasoning is {chat.reasoning}; choose {', '.join(REASONING_LEVELS)}"
    return f"no such command: {command} (see /help)"


def _answer(chat: Chat, text: str, printer: "Printer", *, interactive: bool) -> None:
    """Print one answer. A question the model cannot take ends the program, except where somebody can ask another."""
    try:
        events = chat.send(text) if chat.pending_call is None else chat.send_tool_result(text)
        printer.answer(events)
    except KeyboardInterrupt:
        chat.stop()
        printer.note("stopped")
    except GptOssError as error:
        if not interactive:
            raise
        printer.note(str(error))


class Printer:
    """Writes events to a stream, each kind of text starting on a line of its own."""

    def __init__(self, output: Screen, *, json_lines: bool = False) -> None:
        self.on_terminal = output.isatty() and not json_lines
        self._colour = self.on_terminal and not os.environ.get("NO_COLOR")
        self._output = output
        self._json_lines = json_lines
        self._section: str | None = None
        self._dim = False

    def prompt(self, text: str) -> None:
        self._output.write(text)
        self._output.flush()

    def note(self, text: str) -> None:
        """Write a line of the program's own."""
        if self._json_lines:
            self._write_json({"type": "note", "text": text})
            return
        self.end_section()
        self._output.write(self._safe(text) + "\n")
        self._output.flush()

    def answer(self, events: Iterable[ChatEvent]) -> None:
        for event in events:
            if self._json_lines:
                self._write_json(as_json(event))
            else:
                self.write(event)
        self.end_section()

    def write(self, event: ChatEvent) -> None:
        match event:
            case Text("call"):
                pass  # the whole call follows
            case Text(kind, text):
                self._write_text(kind, text)
            case ToolCall(name, arguments):
                self._write_line("tool call", f"{name} {arguments}")
            case ToolResult(name, content):
                self._write_line("tool result", f"{name} {content}")
            case Malformed(reason):
                self._write_line("warning", reason)
            case MessageDone():
                self.end_section()
            case Done(reason):
                self.end_section()
                if reason in _ENDINGS:
                    self._write_line("note", _ENDINGS[reason])

    def _write_line(self, label: str, text: str) -> None:
        self.end_section()
        self._write_text(label, text)
        self.end_section()

    def _write_text(self, section: str, text: str) -> None:
        """Write on; what is not the answer is dim, or labelled where there is no colour."""
        if section != self._section:
            self.end_section()
            self._section = section
            aside = section not in ("final", "commentary")
            self._dim = aside and self._colour
            if self._dim:
                self._output.write("\x1b[2m")
            if aside and not (self._dim and section == "analysis"):
                self._output.write(f"[{section}] ")
        self._output.write(self._safe(text))
        self._output.flush()

    def end_section(self) -> None:
        """End the line that is open, if one is."""
        if self._section is not None:
            self._output.write("\x1b[0m\n" if self._dim else "\n")
            self._output.flush()
            self._section = None

    def _safe(self, text: str) -> str:
        return text.translate(_VISIBLE) if self.on_terminal else text

    def _write_json(self, event: dict[str, object]) -> None:
        self._output.write(json.dumps(event, ensure_ascii=False) + "\n")
        self._output.flush()
