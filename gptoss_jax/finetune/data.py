"""Conversations in JSON lines to token ids, with the ids that the assistant wrote marked; knows no JAX.

What a line may hold is in docs/finetuning.md. How ids fill rows is packing.py's business.
"""

import dataclasses
import datetime
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from gptoss_jax.errors import ConversationError, DataError
from gptoss_jax.harmony import tokens
from gptoss_jax.harmony.conversation import CHANNELS, REASONING_LEVELS, Message, Tool, read_each
from gptoss_jax.harmony.encoding import render_each

NUM_NAMED = 10
"""Bad lines told in one error; the others are counted."""

_NUM_PROMPTED = 2
"""`<|start|>assistant`: it ends the prompt, so the model writes it only between two messages of one turn."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and what the assistant wrote after it: a conversation, or the part of one with a history of its own.

    `ids` are as written: an answer ends in `<|return|>`, also where the conversation goes on. Whoever reads such an
    answer as history reads `<|end|>` there (`inputs`). `trained[i]` says that `ids[i]` is a target of the loss. `line`
    is the 1-based line of the file.
    """

    ids: Int32[np.ndarray, " n"]
    trained: Bool[np.ndarray, " n"]
    line: int

    @property
    def inputs(self) -> Int32[np.ndarray, " m"]:
        """What the model reads before each of `ids[1:]`."""
        return np.where(self.ids == tokens.RETURN, np.int32(tokens.END), self.ids)[:-1]


def read_examples(
    path: Path,
    *,
    channels: Collection[str] = CHANNELS,
    reasoning: str = "medium",
    date: datetime.date | None = None,
) -> list[Example]:
    """Read every conversation of a file, in order, each as one example or, if its history changes on the way, several.

    The model's own messages in `channels` are trained. `reasoning` and `date` (today's, if None) hold for lines that
    name none. Raises DataError that lists what is wrong with which lines; none is ever left out.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "chats.jsonl"
    >>> question, answer = {"role": "user", "content": "2?"}, {"role": "assistant", "content": "4"}
    >>> _ = path.write_text(json.dumps({"messages": [question, answer]}))
    >>> [example] = read_examples(path)
    >>> from gptoss_jax.harmony.encoding import decode
    >>> decode(example.ids[example.trained].tolist())
    '<|channel|>final<|message|>4<|return|>'
    """
    if unknown := set(channels) - set(CHANNELS):
        fix = f"use some of {', '.join(CHANNELS)}"
        raise DataError(f"unknown channels {sorted(unknown)}", where="channels", fix=fix)
    date = date or datetime.date.today()
    examples: list[Example] = []
    bad: list[str] = []
    number = 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    examples += _read_line(line, number, channels, reasoning, date)
                except (ConversationError, DataError) as error:
                    bad.append(f"line {number} ({', '.join(filter(None, (error.what, error.where)))})")
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise DataError(what, where=str(path), fix="name a file of JSON lines") from error
    if bad:
        more = f" and {len(bad) - NUM_NAMED} more" if len(bad) > NUM_NAMED else ""
        what = f"{len(bad)} of {number} lines cannot be trained on"
        raise DataError(what, where=str(path), fix=f"correct {'; '.join(bad[:NUM_NAMED])}{more}")
    if not examples:
        raise DataError("an empty file, nothing to train on", where=str(path), fix="write a conversation a line")
    return examples


def split(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to train on and to evaluate on, in their order; the latter are `fraction` of the lines, at least one.

    `seed` and the number of lines choose them, so a file that grows is split anew. A line's examples stay together, so
    none is evaluated whose beginning was trained on.

    >>> examples = [Example(np.zeros(2, np.int32), np.ones(2, bool), line) for line in range(1, 11)]
    >>> trained, evaluated = split(examples, 0.2, seed=0)
    >>> len(trained), len(evaluated)
    (8, 2)
    """
    lines = sorted({example.line for example in examples})
    num_evaluated = max(1, round(fraction * len(lines)))
    if not 0 < fraction < 1 or num_evaluated >= len(lines):
        fix = "leave lines on both sides, or do not split"
        raise DataError(f"{fraction} of {len(lines)} lines", where="evaluation split", fix=fix)
    evaluated = {lines[index] for index in shuffled(len(lines), seed, 0)[:num_evaluated]}
    return (
        [example for example in examples if example.line not in evaluated],
        [example for example in examples if example.line in evaluated],
    )


def shuffled(num: int, seed: int, epoch: int) -> Int32[np.ndarray, " num"]:
    """The numbers below `num` in an order that `seed` and `epoch` alone decide, with every version of numpy.

    >>> shuffled(5, seed=1, epoch=0)
    array([3, 2, 0, 1, 4], dtype=int32)
    """
    draws = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num)
    return np.argsort(draws, kind="stable").astype(np.int32)


def _read_line(
    line: bytes, number: int, channels: Collection[str], reasoning: str, date: datetime.date
) -> list[Example]:
    try:
        entry = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _bad(f"not UTF-8 from byte {error.start} on") from error
    except (ValueError, RecursionError) as error:
        raise _bad("a blank line" if not line.strip() else f"not JSON: {error}") from error
    if not isinstance(entry, Mapping):
        raise _bad(f"a JSON {type(entry).__name__} instead of an object")
    if (day := entry.get("date")) is not None:
        date = _read_date(day)
    level = entry.get("reasoning_effort") or entry.get("reasoning_level") or reasoning
    if level not in REASONING_LEVELS:
        raise _bad(f"unknown reasoning level {level!r}")
    messages: list[Message] = []
    weights: list[bool] = []
    for index, (group, weight) in enumerate(_weighted(entry)):
        if not group:
            raise DataError("an assistant that says nothing", where=f"message {index}", fix="write content")
        messages += group
        weights += [weight and message.role == "assistant" and message.channel in channels for message in group]
    opening, following = render_each(messages, reasoning=level, tools=_read_tools(entry.get("tools")), date=date)
    num_joined = len(messages) - len(following)
    written = list(zip(messages[num_joined:], following, weights[num_joined:], strict=True))
    if not any(weights):
        raise _bad(f"nothing to train on in {', '.join(channels)}")
    return [Example(*part, number) for part in _parts(opening, written)]


def _weighted(entry: Mapping[str, Any]) -> Iterator[tuple[list[Message], bool]]:
    """Each entry's messages, and whether they are to be trained if the assistant wrote them."""
    messages, prompt = entry.get("messages"), None
    if messages is None:
        prompt, messages = entry.get("prompt"), entry.get("completion")
        if not isinstance(prompt, list) or not isinstance(messages, list):
            raise _bad("no messages, nor a prompt and a completion that are lists of messages")
        messages = [*prompt, *messages]
    if not isinstance(messages, list) or not messages or not all(isinstance(entry, Mapping) for entry in messages):
        raise _bad("messages is not a list of messages")
    num_prompted = len(prompt or ())
    for index, (written, group) in enumerate(zip(messages, read_each(messages), strict=True)):
        weight = written.get("weight")
        if weight not in (None, 0, 1):
            raise DataError(f"weight {weight!r}", where=f"message {index}", fix="write 0 or 1")
        yield group, index >= num_prompted and weight != 0


def _parts(
    opening: list[int], written: Iterable[tuple[Message, list[int], bool]]
) -> Iterator[tuple[Int32[np.ndarray, " n"], Bool[np.ndarray, " n"]]]:
    """Ids and trained of every part of a conversation in which the history only grows, up to its last trained id.

    A part is over with an answer whose reasoning later prompts leave out (harmony.encoding.drop_past_reasoning).
    """
    history, goes_on, reasoned = list(opening), False, False
    ids, trained = list(history), [False] * len(history)
    for message, rendered, train in written:
        is_answer = message.role == "assistant" and message.channel == "final"
        ids += [*rendered[:-1], tokens.RETURN] if is_answer and rendered[-1] == tokens.END else rendered
        trained += [train and goes_on] * _NUM_PROMPTED + [train] * (len(rendered) - _NUM_PROMPTED)
        goes_on = message.role == "assistant" and ids[-1] == tokens.END
        if message.channel == "analysis":
            reasoned = True
        else:
            history += rendered
        if is_answer and reasoned:
            yield from _up_to_trained(ids, trained)
            ids, trained, reasoned = list(history), [False] * len(history), False
    yield from _up_to_trained(ids, trained)


def _up_to_trained(
    ids: list[int], trained: list[bool]
) -> Iterator[tuple[Int32[np.ndarray, " n"], Bool[np.ndarray, " n"]]]:
    marks = np.array(trained)
    if marks.any():
        length = int(marks.nonzero()[0][-1]) + 1
        yield np.array(ids[:length], np.int32), marks[:length]


def _read_tools(entries: Any) -> list[Tool]:
    """OpenAI's list, or the text of one, as data sets in columns have it."""
    if isinstance(entries, str):
        try:
            entries = json.loads(entries)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON: {error}", where="tools", fix="write a list") from error
    if not isinstance(entries, list | None) or not all(isinstance(entry, Mapping) for entry in entries or ()):
        raise DataError("not a list of tools", where="tools", fix="write a list of objects")
    return [Tool.from_dict(entry) for entry in entries or ()]


def _read_date(day: Any) -> datetime.date:
    try:
        return datetime.date.fromisoformat(day)
    except (ValueError, TypeError) as error:
        raise DataError(f"date {day!r}", where="date", fix="write it as 2025-08-05") from error


def _bad(what: str) -> DataError:
    return DataError(what, where="", fix="correct it")  # where: read_examples adds the line
