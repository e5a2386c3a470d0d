"""A chat streams its answers, runs its tools, and keeps a history that harmony would keep."""

import datetime

import pytest

from gptoss_jax.chat import Chat
from gptoss_jax.chat_events import Done, MessageDone, Text, ToolCall, ToolResult, as_json
from gptoss_jax.errors import ConversationError, PromptError
from gptoss_jax.harmony.conversation import Message, Tool
from gptoss_jax.harmony.encoding import encode
from gptoss_jax.harmony.parser import Malformed
from tests.scripted import Script, call, final, thought

DATE = datetime.date(2025, 8, 5)
TWO = {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}
ADD = Tool("add", "Adds.", TWO, function=lambda a, b: a + b)
ASK = Tool("ask", "Asks a person.")


def chat_with(*replies, **settings):
    script = Script(*replies)
    return Chat("model", date=DATE, generate=script, **settings), script


def joined(events, kind):
    return "".join(event.text for event in events if isinstance(event, Text) and event.kind == kind)


def num_tokens(text):
    return len(encode(text, special=True))


def history(prompt):
    """The part of a prompt after the system and developer messages."""
    return prompt[prompt.index("<|start|>user") :]


def test_answer_streams_by_channel_and_ends_with_done():
    reply = thought("2 and 2.") + final("It is 4.")
    chat, script = chat_with(reply, sampling="greedy", max_new_tokens=99)
    events = list(chat.send("2 + 2?"))
    assert joined(events, "analysis") == "2 and 2."
    assert joined(events, "final") == "It is 4."
    assert len([event for event in events if isinstance(event, Text)]) > 4
    assert events[-1] == Done("stop", num_tokens(script.prompts[0]), num_tokens(reply))
    assert script.settings == [("greedy", 99)]
    assert script.prompts[0].endswith("<|start|>user<|message|>2 + 2?<|end|><|start|>assistant")


def test_past_reasoning_leaves_the_prompt_but_not_the_chat():
    chat, script = chat_with(thought("Hm.") + final("4"), thought("Ho.") + final("5"), final("6"))
    for question in ("a", "b", "c"):
        list(chat.send(question))
    assert history(script.prompts[2]) == (
        "<|start|>user<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>4<|end|>"
        "<|start|>user<|message|>b<|end|><|start|>assistant<|channel|>final<|message|>5<|end|>"
        "<|start|>user<|message|>c<|end|><|start|>assistant"
    )
    assert [message.content for message in chat.messages] == ["a", "Hm.", "4", "b", "Ho.", "5", "c", "6"]


def test_reasoning_level_holds_from_the_next_prompt_on():
    chat, script = chat_with(final("a"), final("b"), reasoning="low")
    list(chat.send("q"))
    chat.reasoning = "high"
    list(chat.send("q"))
    assert ["Reasoning: low" in script.prompts[0], "Reasoning: high" in script.prompts[1]] == [True, True]
    with pytest.raises(ConversationError, match="unknown reasoning level 'extreme': chat"):
        chat.reasoning = "extreme"
    assert chat.reasoning == "high"


def test_reset_forgets_the_conversation_and_keeps_the_settings():
    chat, script = chat_with(final("a"), final("b"), instructions="Be brief.")
    list(chat.send("old"))
    chat.reset()
    list(chat.send("new"))
    assert "Be brief." in script.prompts[1]
    assert history(script.prompts[1]) == "<|start|>user<|message|>new<|end|><|start|>assistant"


def test_a_tools_function_is_run_and_its_result_goes_back_with_the_reasoning():
    chat, script = chat_with(thought("Add.") + call("functions.add", '{"a": 2, "b": 3}'), final("5"), tools=[ADD])
    events = list(chat.send("2 + 3?"))
    assert [event for event in events if isinstance(event, ToolCall | ToolResult)] == [
        ToolCall("add", '{"a": 2, "b": 3}'),
        ToolResult("add", "5"),
    ]
    assert joined(events, "final") == "5"
    assert history(script.prompts[1]) == (
        "<|start|>user<|message|>2 + 3?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Add.<|end|>"
        '<|start|>assistant to=functions.add<|channel|>commentary <|constrain|>json<|message|>{"a": 2, "b": 3}<|call|>'
        "<|start|>functions.add to=assistant<|channel|>commentary<|message|>5<|end|><|start|>assistant"
    )


def test_a_failing_tool_and_an_unknown_tool_are_told_to_the_model():
    divide = Tool("divide", function=lambda a, b: a / b)
    calls = call("functions.divide", '{"a": 1, "b": 0}'), call("browser.search", "{}")
    chat, script = chat_with(*calls, final("Sorry."), tools=[divide])
    events = list(chat.send("1 / 0?"))
    assert [event for event in events if isinstance(event, ToolResult)] == [
        ToolResult("divide", "error: ZeroDivisionError: division by zero"),
        ToolResult("browser.search", "error: there is no such tool; the tools are: functions.divide"),
    ]
    assert "error: ZeroDivisionError" in script.prompts[2]


def test_a_call_of_a_tool_without_function_waits_for_the_caller():
    question = call("functions.ask", '{"who": "Ann"}')
    chat, script = chat_with(question, final("Ann says hi."), tools=[ASK])
    events = list(chat.send("What does Ann say?"))
    assert events[-2] == ToolCall("ask", '{"who": "Ann"}')
    assert events[-1] == Done("tool_call", num_tokens(script.prompts[0]), num_tokens(question))
    assert chat.pending_call == ToolCall("ask", '{"who": "Ann"}')
    with pytest.raises(ConversationError, match=r"functions\.ask has no result: chat: use send_tool_result"):
        chat.send("Well?")
    events = list(chat.send_tool_result("hi"))
    assert joined(events, "final") == "Ann says hi."
    assert "<|start|>functions.ask to=assistant<|channel|>commentary<|message|>hi<|end|>" in script.prompts[1]
    assert chat.pending_call is None
    with pytest.raises(ConversationError, match="no tool call waits"):
        chat.send_tool_result("again")


def test_a_caller_may_stop_reading_at_the_call_and_answer_it():
    chat, _ = chat_with(call("functions.ask", "{}"), final("ok"), tools=[ASK])
    for event in chat.send("q"):
        if isinstance(event, ToolCall):
            break
    assert joined(list(chat.send_tool_result("hi")), "final") == "ok"


def test_a_built_in_tools_answer_comes_on_its_calls_channel():
    python = "<|channel|>analysis to=functions.add code<|message|>{}<|call|>"
    chat, script = chat_with(python, final("ok"), tools=[Tool("add", function=lambda: 1)])
    list(chat.send("q"))
    assert "<|start|>functions.add to=assistant<|channel|>analysis<|message|>1<|end|>" in script.prompts[1]


def test_too_many_calls_end_the_answer():
    calls = [call("functions.add", '{"a": 1, "b": 1}')] * 3
    chat, script = chat_with(*calls, tools=[ADD], max_tool_calls=2)
    events = list(chat.send("q"))
    assert events[-1].finish_reason == "tool_limit"
    assert len(script.prompts) == 3
    assert [message.role for message in chat.messages] == ["user", "assistant", "tool", "assistant", "tool"]


def test_max_new_tokens_bounds_the_whole_answer():
    add = call("functions.add", '{"a": 1, "b": 1}')
    limit = num_tokens(add) + 3
    chat, script = chat_with(add, final("never ends"), tools=[ADD], max_new_tokens=limit)
    events = list(chat.send("q"))
    assert [limit for _, limit in script.settings] == [limit, 3]
    assert (events[-1].finish_reason, events[-1].completion_tokens) == ("length", limit)


@pytest.mark.parametrize(
    ("reply", "kept"),
    [
        ("<|channel|>final<|message|>one two", [("final", "one two")]),
        ("<|channel|>analysis<|message|>one two", []),
        ("<|channel|>commentary to=functions.add<|message|>one two", []),
        ("<|channel|>commentary<|message|>one two", [("commentary", "one two")]),
    ],
)
def test_what_is_kept_of_a_cut_answer(reply, kept):
    chat, _ = chat_with(reply + " three four", max_new_tokens=num_tokens(reply), tools=[ADD])
    events = list(chat.send("q"))
    assert events[-1].finish_reason == "length"
    assert [(message.channel, message.content) for message in chat.messages[1:]] == kept


def test_a_stopped_answer_is_kept_like_a_cut_one():
    chat, script = chat_with(thought("Hm.") + final("one two three"), final("ok"))
    events = chat.send("q")
    for event in events:
        if event == Text("final", "one"):
            break
    list(chat.send("go on"))
    assert history(script.prompts[1]) == (
        "<|start|>user<|message|>q<|end|><|start|>assistant<|channel|>final<|message|>one<|end|>"
        "<|start|>user<|message|>go on<|end|><|start|>assistant"
    )
    assert list(events) == []


def test_ctrl_c_keeps_what_was_said():
    chat, _ = chat_with(["<|channel|>final<|message|>one two", KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        list(chat.send("q"))
    assert chat.messages == (Message("user", "q"), Message("assistant", "one two", channel="final"))


def test_an_answer_never_read_leaves_nothing_behind():
    chat, _ = chat_with(final("ok"))
    chat.send("unread")
    list(chat.send("q"))
    assert [message.content for message in chat.messages] == ["q", "ok"]


def test_an_error_undoes_the_question():
    error = PromptError("200000 ids", where="prompt", fix="shorten it")
    chat, _ = chat_with(final("a"), ["<|channel|>final<|message|>half", error], final("c"))
    list(chat.send("first"))
    before = chat.messages
    with pytest.raises(PromptError):
        list(chat.send("too long"))
    assert chat.messages == before
    assert joined(list(chat.send("short")), "final") == "c"


def test_an_error_after_a_tool_result_leaves_the_call_waiting():
    error = PromptError("200000 ids", where="prompt", fix="shorten it")
    chat, _ = chat_with(call("functions.ask", "{}"), error, final("ok"), tools=[ASK])
    list(chat.send("q"))
    with pytest.raises(PromptError):
        list(chat.send_tool_result("far too long"))
    assert chat.pending_call == ToolCall("ask", "{}")
    assert joined(list(chat.send_tool_result("short")), "final") == "ok"


@pytest.mark.parametrize(
    ("reply", "raw", "kept"),
    [
        ("no header at all<|return|>", "no header at all<|return|>", []),
        ("<|message|>bare<|return|>", "bare", [(None, "bare")]),
        ("<|channel|>lyrics<|message|>la<|return|>", "la", [("lyrics", "la")]),
        ("<|channel|>final<|message|>a<|end|><|start|>user<|message|>and b?<|return|>", "and b?", [("final", "a")]),
        (
            "<|channel|>commentary to=functions.add<|message|>{}<|end|><|start|>assistant" + final("x"),
            "",
            [("final", "x")],
        ),
    ],
)
def test_malformed_answers_are_shown_warned_of_and_leave_a_sound_history(reply, raw, kept):
    chat, _ = chat_with(reply, final("fine"), tools=[ADD])
    events = list(chat.send("q"))
    assert joined(events, "raw") == raw
    assert any(isinstance(event, Malformed) for event in events)
    assert events[-1].finish_reason == "stop"
    assert [(message.channel, message.content) for message in chat.messages[1:]] == kept
    assert joined(list(chat.send("again")), "final") == "fine"


def test_every_event_has_a_json_form_of_its_own():
    replies = [thought("Hm.") + call("functions.add", '{"a": 1, "b": 1}'), "oops<|start|>assistant" + final("2")]
    chat, _ = chat_with(*replies, tools=[ADD])
    forms = [as_json(event) for event in chat.send("q")]
    assert {form["type"] for form in forms} == {
        "analysis", "call", "final", "raw", "message", "tool_call", "tool_result", "warning", "done"
    }  # fmt: skip
    assert as_json(MessageDone(Message("assistant", "2", channel="final")))["content"] == "2"


def test_the_engine_is_the_default_token_source(tiny_model):
    """The tiny model's vocabulary is too small for a prompt, and the engine says so by name."""
    with pytest.raises(PromptError):
        list(Chat(tiny_model, date=DATE).send("q"))
