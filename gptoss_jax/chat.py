"""A conversation with a model: harmony writes the prompts, the engine the ids, harmony reads them back."""

import datetime
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from gptoss_jax.chat_events import ChatEvent, Done, MessageDone, Text, ToolCall, ToolResult
from gptoss_jax.errors import ConversationError
from gptoss_jax.harmony.conversation import CHANNELS, FUNCTIONS, REASONING_LEVELS, Message, Tool, tool_result
from gptoss_jax.harmony.encoding import render_conversation
from gptoss_jax.harmony.parser import Event, Malformed, MessageEnd, MessageStart, RawText, StreamParser, TextDelta
from gptoss_jax.harmony.tokens import STOP_IDS


@runtime_checkable
class Token(Protocol):
    """The one thing a chat needs of a generated token."""

    @property
    def id(self) -> int: ...


@runtime_checkable
class TokenSource(Protocol):
    """Writes on from a prompt, up to and with a stop id; gptoss_jax.generation.follow.lead is the real one."""

    def __call__(self, model: Any, prompt: Sequence[int], sampling: Any, *, max_new_tokens: int) -> Iterator[Token]: ...


class Chat:
    """Ask, and iterate over the answer as it is made.

    `reasoning` may be changed at any time and holds from the next prompt on. `max_new_tokens` bounds one answer, tool
    calls included. Tools with a function are run, and their results go back to the model; after a call of a tool
    without one the answer ends, and `send_tool_result` continues it.

    What is kept in `messages` for the next prompt: every complete message, and a final or commentary text that was cut
    off (out of tokens, or stopped). Reasoning and tool calls that were cut off are not kept, nor is text outside of any
    message. If an answer raises, everything since the question is undone. Reasoning that led to an answer stays in
    `messages` but not in prompts, as harmony asks.

    The example scripts the engine; `Chat(gptoss_jax.load(path))` talks to a model.

    >>> from types import SimpleNamespace
    >>> from gptoss_jax.harmony.encoding import encode
    >>> def script(model, prompt, sampling, *, max_new_tokens):
    ...     for token in encode("<|channel|>final<|message|>Four.<|return|>", special=True):
    ...         yield SimpleNamespace(id=token)
    >>> chat = Chat(None, generate=script, date=datetime.date(2025, 8, 5))
    >>> for event in chat.send("What is 2 + 2?"):  # doctest: +ELLIPSIS
    ...     print(event)
    Text(kind='final', text='Four')
    Text(kind='final', text='.')
    MessageDone(message=Message(role='assistant', content='Four.', name=None, channel='final', ...))
    Done(finish_reason='stop', prompt_tokens=75, completion_tokens=6)
    """

    def __init__(
        self,
        model: Any,
        *,
        reasoning: str = "medium",
        tools: Sequence[Tool] = (),
        instructions: str | None = None,
        sampling: Any = None,
        max_new_tokens: int = 4096,
        max_tool_calls: int = 16,
        date: datetime.date | None = None,
        generate: TokenSource | None = None,
    ) -> None:
        self.model = model
        self.reasoning = reasoning
        self.tools = tuple(tools)
        self.instructions = instructions
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.max_tool_calls = max_tool_calls
        self.date = date or datetime.date.today()  # fixed here: a prompt's start must not change at midnight
        self._generate = generate
        self._messages: list[Message] = []
        self._pending: Message | None = None
        self._answer: Generator[ChatEvent] | None = None

    @property
    def reasoning(self) -> str:
        return self._reasoning

    @reasoning.setter
    def reasoning(self, level: str) -> None:
        if level not in REASONING_LEVELS:
            raise ConversationError(
                f"unknown reasoning level {level!r}", where="chat", fix=f"use one of {', '.join(REASONING_LEVELS)}"
            )
        self._reasoning = level

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far, without the system and developer messages."""
        return tuple(self._messages)

    @property
    def pending_call(self) -> ToolCall | None:
        """The tool call that waits for `send_tool_result`."""
        return None if self._pending is None else _call_event(self._pending)

    def reset(self) -> None:
        """Forget the conversation; the settings stay."""
        self.stop()
        self._messages = []
        self._pending = None

    def send(self, text: str) -> Iterator[ChatEvent]:
        """Ask. The answer is made while the caller iterates."""
        self.stop()
        if self._pending is not None:
            raise ConversationError(
                f"the call of {self._pending.recipient} has no result",
                where="chat",
                fix="use send_tool_result, or reset",
            )
        return self._start_answer([Message("user", text)])

    def send_tool_result(self, content: str) -> Iterator[ChatEvent]:
        """Answer the tool call that the last events ended with, and go on."""
        self.stop()
        if self._pending is None:
            raise ConversationError("no tool call waits for a result", where="chat", fix="use send")
        return self._start_answer(_answered(self._pending, content))

    def stop(self) -> None:
        """Stop the answer that is being made; every other method does so first."""
        if self._answer is not None:
            self._answer.close()

    def _start_answer(self, messages: Sequence[Message]) -> Iterator[ChatEvent]:
        self._answer = self._undone_if_it_raises(messages)
        return self._answer

    def _undone_if_it_raises(self, messages: Sequence[Message]) -> Generator[ChatEvent]:
        num_kept, pending = len(self._messages), self._pending
        self._messages += messages
        self._pending = None
        try:
            yield from self._answer_with_tools()
        except Exception:
            del self._messages[num_kept:]
            self._pending = pending
            raise

    def _answer_with_tools(self) -> Generator[ChatEvent]:
        num_generated = num_calls = 0
        while True:
            turn = _Turn(self._messages)
            prompt = render_conversation(
                self._messages,
                reasoning=self.reasoning,
                tools=self.tools,
                instructions=self.instructions,
                date=self.date,
            )
            yield from turn.follow(self._tokens(prompt, self.max_new_tokens - num_generated))
            num_generated += turn.num_tokens
            call = turn.call
            if call is None:
                yield Done("stop" if turn.stopped else "length", len(prompt), num_generated)
                return
            tool = self._find_tool(call)
            if tool is not None and tool.function is None:
                self._pending = call
                yield _call_event(call)
                yield Done("tool_call", len(prompt), num_generated)
                return
            yield _call_event(call)
            num_calls += 1
            if num_calls > self.max_tool_calls:
                yield Done("tool_limit", len(prompt), num_generated)
                return
            content = self._unknown_tool() if tool is None else tool.run(call.content)
            self._messages += _answered(call, content)
            yield ToolResult(_call_event(call).name, content)
            if num_generated >= self.max_new_tokens:
                yield Done("length", len(prompt), num_generated)
                return

    def _tokens(self, prompt: Sequence[int], max_new_tokens: int) -> Iterator[Token]:
        if self._generate is not None:
            return self._generate(self.model, prompt, self.sampling, max_new_tokens=max_new_tokens)
        from gptoss_jax.generation.follow import lead  # here, since it loads JAX

        return lead(self.model, prompt, self.sampling, max_new_tokens=max_new_tokens)

    def _find_tool(self, call: Message) -> Tool | None:
        name = _call_event(call).name
        return next((tool for tool in self.tools if tool.name == name), None)

    def _unknown_tool(self) -> str:
        names = ", ".join(FUNCTIONS + tool.name for tool in self.tools) or "none"
        return f"error: there is no such tool; the tools are: {names}"


class _Turn:
    """One run of the engine: its ids become events, and its messages join the history as they end."""

    def __init__(self, messages: list[Message]) -> None:
        self.call: Message | None = None
        self.num_tokens = 0
        self.stopped = False
        self._messages = messages
        self._parser = StreamParser()

    def follow(self, source: Iterator[Token]) -> Generator[ChatEvent]:
        try:
            for token in source:
                self.num_tokens += 1
                self.stopped = token.id in STOP_IDS
                yield from self._read(self._parser.feed(token.id))
            yield from self._read(self._parser.close())
        finally:  # the caller stopped iterating, perhaps by Ctrl-C: keep what was said
            for _ in self._read(self._parser.close()):
                pass

    def _read(self, events: list[Event]) -> Iterator[ChatEvent]:
        for event in events:
            match event:
                case MessageStart():
                    pass
                case TextDelta(text, header):
                    if header.role != "assistant" or header.channel not in CHANNELS:
                        yield Text("raw", text)
                    else:
                        yield Text("call" if header.recipient else header.channel, text)
                case RawText(text):
                    yield Text("raw", text)
                case Malformed():
                    yield event
                case MessageEnd():
                    yield from self._keep(event)

    def _keep(self, event: MessageEnd) -> Iterator[ChatEvent]:
        message = event.message
        if message.role != "assistant":
            yield Malformed(f"the model spoke as {message.name or message.role}: not kept")
        elif message.recipient is not None:
            if event.end in ("call", "return"):
                self.call = message
            else:
                yield Malformed(f"an unfinished call of {message.recipient}: not kept")
        elif event.end != "cut" or (message.channel in ("final", "commentary") and message.content):
            self._messages.append(message)
            yield MessageDone(message)


def _call_event(call: Message) -> ToolCall:
    return ToolCall((call.recipient or "").removeprefix(FUNCTIONS), call.content)


def _answered(call: Message, content: str) -> list[Message]:
    return [call, tool_result(call.recipient or "", content, channel=call.channel or "commentary")]
