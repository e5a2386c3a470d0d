"""The demo model's conversations, seeded, and the held-out problems that it is examined with.

`python -m gptoss_jax.demo.corpus OUT.jsonl --seed 1 --count 100000` writes a file for gptoss_jax.finetune.data.
"""

import argparse
import dataclasses
import datetime
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from jaxtyping import Int32

from gptoss_jax.demo import tool_turns, turns
from gptoss_jax.demo.tool_turns import FORMATS, MAKERS, TOOLS
from gptoss_jax.demo.turns import Call, Scene, Thoughts, Turn, held_out
from gptoss_jax.finetune.data import Example
from gptoss_jax.harmony import tokens
from gptoss_jax.harmony.conversation import REASONING_LEVELS, Tool
from gptoss_jax.harmony.encoding import encode

FIRST_YEAR, LAST_YEAR = 2024, 2039

_ASK: dict[Callable[[Scene], Turn], int] = {
    turns.add: 20,
    turns.subtract: 14,
    turns.multiply: 6,
    turns.sort: 10,
    turns.reverse: 8,
    turns.fact: 10,
    turns.date: 3,
    turns.talk: 7,
    tool_turns.structured: 8,
}
"""What is asked, and how often, where neither tools nor instructions ask for something else."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A held-out problem: what `gptoss_jax.Chat` needs to ask it, and the right answer.

    The tool that the problem needs, if any, gives its result for the right arguments alone, so an answer that is right
    had a right call.
    """

    kind: str
    question: str
    answer: str
    reasoning: str
    date: datetime.date
    instructions: str | None
    tools: tuple[Tool, ...]


def conversations(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Lines of a data set, as gptoss_jax.finetune.data reads them; a greater `count` begins with the same.

    >>> [one] = conversations(seed=3, count=1)
    >>> sorted(one)
    ['date', 'messages', 'reasoning_effort', 'tools']
    """
    random = Random(seed)
    for _ in range(count):
        yield _conversation(Scene(random, _date(random)))


def evaluation_prompts(seed: int, count: int) -> list[Prompt]:
    """Held-out problems, the kinds in turn: sums, differences, lists, calls of each tool, JSON.

    >>> [prompt.kind for prompt in evaluation_prompts(seed=1, count=3)]
    ['add', 'subtract', 'sort']
    """
    makers = [
        turns.add,
        turns.subtract,
        turns.sort,
        turns.reverse,
        *MAKERS.values(),
        *(make for _, make in FORMATS.values()),
    ]
    random = Random(seed)
    return [_prompt(Scene(random, _date(random)), makers[index % len(makers)]) for index in range(count)]


def is_right(prompt: Prompt, answer: str) -> bool:
    """Whether an answer has the words and numbers of the right one; in JSON, its values.

    >>> [prompt] = evaluation_prompts(seed=1, count=1)
    >>> is_right(prompt, prompt.answer), is_right(prompt, prompt.answer.rstrip(".")), is_right(prompt, "42")
    (True, True, False)
    """
    if not prompt.answer.startswith("{"):
        return re.findall(r"\w+", answer) == re.findall(r"\w+", prompt.answer)
    try:
        return json.loads(answer) == json.loads(prompt.answer)
    except ValueError:
        return False


def used_ids(examples: Iterable[Example]) -> Int32[np.ndarray, " ids"]:
    """Every id the examples have, ascending, with those of the markers, of any date of the corpus, and of 0 to 200."""
    numbers = "\n".join(map(str, range(201)))
    days = "\n".join(f"{year}-{day:02}" for year in range(FIRST_YEAR, LAST_YEAR + 1) for day in range(1, 32))
    found = {value for value in vars(tokens).values() if isinstance(value, int)} | {*encode(numbers), *encode(days)}
    for example in examples:
        found.update(example.ids.tolist())
    return np.array(sorted(found), np.int32)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gptoss_jax.demo.corpus", description="Write conversations.")
    parser.add_argument("path", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=100_000)
    options = parser.parse_args(arguments)
    with options.path.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in conversations(options.seed, options.count))


def _conversation(scene: Scene) -> dict[str, Any]:
    """One to four questions of a theme: with tools, with a format of the answers, or with neither."""
    random = scene.random
    level = random.choice(REASONING_LEVELS)
    theme = random.choices(["talk", "tools", "format"], [60, 30, 10])[0]
    tools = random.sample(list(TOOLS), random.randint(1, len(TOOLS))) if theme == "tools" else []
    answer_format = random.choice(list(FORMATS)) if theme == "format" else None
    messages: list[dict[str, Any]] = []
    if answer_format:
        messages.append({"role": "system", "content": tool_turns.instructions(answer_format)})
    elif random.random() < 0.2:
        messages.append({"role": "system", "content": random.choice(_INSTRUCTIONS)})
    for number in range(random.choices([1, 2, 3, 4], [50, 30, 15, 5])[0]):
        if answer_format:
            turn = _draw(scene, FORMATS[answer_format][1], held=False)
        elif random.random() < (0.75 if tools else 0.05):
            turn = _draw(scene, random.choice(list(MAKERS.values())), held=False)
            if turn.call and turn.call.name not in tools:
                turn = tool_turns.without_tool(scene, turn)
        else:
            turn = _draw(scene, random.choices(list(_ASK), list(_ASK.values()))[0], held=False)
        messages += _messages(turn, level, f"call_{number}")
    return {
        "messages": messages,
        "tools": [{"type": "function", "function": _described(TOOLS[name])} for name in tools],
        "reasoning_effort": level,
        "date": scene.date.isoformat(),
    }


def _prompt(scene: Scene, make: Callable[[Scene], Turn]) -> Prompt:
    random = scene.random
    turn = _draw(scene, make, held=True)
    answer_format = next((name for name, (_, maker) in FORMATS.items() if maker is make), None)
    instructions = None
    if answer_format and random.random() < 0.5:
        instructions = tool_turns.instructions(answer_format)
    elif answer_format:
        turn = tool_turns.with_schema(turn, answer_format)
    tools: list[Tool] = []
    if call := turn.call:
        others = [name for name in TOOLS if name != call.name]
        names = [call.name, *random.sample(others, random.randrange(len(TOOLS)))]
        tools = [_answering(TOOLS[name], call) for name in random.sample(names, len(names))]
    level = random.choice(REASONING_LEVELS)
    return Prompt(make.__name__, turn.question, turn.answer, level, scene.date, instructions, tuple(tools))


def _draw(scene: Scene, make: Callable[[Scene], Turn], *, held: bool) -> Turn:
    """A turn whose problem is held out, or one whose problem is not."""
    while True:
        turn = make(scene)
        if (turn.problem is not None and held_out(turn.problem)) == held:
            return turn


def _messages(turn: Turn, level: str, identifier: str) -> Iterator[dict[str, Any]]:
    yield {"role": "user", "content": turn.question}
    if call := turn.call:
        function = {"name": call.name, "arguments": json.dumps(call.arguments)}
        calls = [{"id": identifier, "type": "function", "function": function}]
        yield {"role": "assistant", **_thinking(call.thoughts, level), "tool_calls": calls}
        yield {"role": "tool", "tool_call_id": identifier, "content": json.dumps(call.result)}
    yield {"role": "assistant", **_thinking(turn.thoughts, level), "content": turn.answer}


def _thinking(thoughts: Thoughts, level: str) -> dict[str, str]:
    text = getattr(thoughts, level)
    return {"thinking": text} if text else {}


def _described(tool: Tool) -> dict[str, Any]:
    return {"name": tool.name, "description": tool.description, "parameters": tool.parameters}


def _answering(tool: Tool, call: Call) -> Tool:
    """The tool, with a function that has one answer, for one call."""

    def answer(**arguments: Any) -> Mapping[str, Any]:
        right = tool.name == call.name and arguments == call.arguments
        return call.result if right else {"error": "unknown"}

    return dataclasses.replace(tool, function=answer)


def _date(random: Random) -> datetime.date:
    first, last = datetime.date(FIRST_YEAR, 1, 1), datetime.date(LAST_YEAR, 12, 31)
    return datetime.date.fromordinal(random.randint(first.toordinal(), last.toordinal()))


_INSTRUCTIONS = ["You are a helpful assistant.", "Be brief.", "Be friendly.", "Answer every question."]

if __name__ == "__main__":
    main()
