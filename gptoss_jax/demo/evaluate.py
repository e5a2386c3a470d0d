"""Examine the demo model with problems that its corpus does not have, answered greedily.

`python -m gptoss_jax.demo.evaluate CKPT --count 200` prints a table; CKPT is a converted directory.
"""

import argparse
import collections
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptoss_jax.chat import Chat
from gptoss_jax.chat_events import MessageDone
from gptoss_jax.checkpoint import load
from gptoss_jax.demo.corpus import Prompt, evaluation_prompts, is_right
from gptoss_jax.generation.generate import Token, generate
from gptoss_jax.generation.sampling import Sampling
from gptoss_jax.model.transformer import Transformer

GROUPS = {
    "arithmetic": ("add", "subtract"),
    "tools": ("weather", "price", "currency"),
    "lists": ("sort", "reverse"),
    "JSON": ("person", "result", "numbers"),
}
"""The kinds of problems, as `Prompt` names them."""
BAR = 0.9
"""Of the answers to arithmetic and to tool prompts, how many must be right."""
BATCH = 64
MOST_TOKENS = 256
"""Of one message or call; the longest of the corpus has about half."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """A problem, and the final answer; empty if there was none."""

    prompt: Prompt
    answer: str

    @property
    def is_right(self) -> bool:
        return is_right(self.prompt, self.answer)


def answers(model: Transformer, prompts: Sequence[Prompt], *, batch_size: int = BATCH) -> list[Answered]:
    """Ask each prompt in a chat of its own, many at a time.

    A chat is held again and again with what the model wrote in earlier rounds, until nothing that it asks of the model
    is missing: two rounds if it calls a tool.
    """
    written: dict[tuple[int, ...], tuple[Token, ...]] = {}
    while True:
        wanted: dict[tuple[int, ...], None] = {}

        def source(_model: Any, ids: Sequence[int], _sampling: Any, *, max_new_tokens: int) -> Iterator[Token]:
            if tuple(ids) not in written:
                wanted[tuple(ids)] = None  # noqa: B023 (used up in this round)
            return iter(written.get(tuple(ids), ()))

        finals = [_final(model, prompt, source) for prompt in prompts]
        if not wanted:
            return [Answered(prompt, final) for prompt, final in zip(prompts, finals, strict=True)]
        waiting = list(wanted)
        for start in range(0, len(waiting), batch_size):
            batch = waiting[start : start + batch_size]
            found = generate(model, batch, Sampling(temperature=0.0), max_new_tokens=MOST_TOKENS)
            written.update((ids, completion.tokens) for ids, completion in zip(batch, found, strict=True))


def accuracy(answered: Sequence[Answered]) -> dict[str, dict[str, int | float]]:
    """Right answers, problems and their quotient, by kind and by group.

    Example:
        >>> [prompt] = evaluation_prompts(seed=1, count=1)
        >>> accuracy([Answered(prompt, prompt.answer), Answered(prompt, "")])["arithmetic"]
        {'right': 1, 'asked': 2, 'accuracy': 0.5}
    """
    right, asked = collections.Counter(), collections.Counter()
    for one in answered:
        group = next(group for group, kinds in GROUPS.items() if one.prompt.kind in kinds)
        for name in (one.prompt.kind, group, "all"):
            asked[name] += 1
            right[name] += one.is_right
    names = [name for group, kinds in GROUPS.items() for name in (*kinds, group)] + ["all"]
    return {
        name: {"right": right[name], "asked": asked[name], "accuracy": right[name] / asked[name]}
        for name in names
        if asked[name]
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gptoss_jax.demo.evaluate", description="Examine the demo model.")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("--count", type=int, default=200, help="problems (default: 200)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", action="store_true", help="print an object instead, wrong answers included")
    options = parser.parse_args(arguments)
    model = load(options.checkpoint, dtype=options.dtype)
    answered = answers(model, evaluation_prompts(options.seed, options.count))
    found = accuracy(answered)
    sys.stdout.write(
        json.dumps({"accuracy": found, "wrong": _wrong(answered)}) + "\n" if options.json else table(found)
    )


def table(found: Mapping[str, Mapping[str, int | float]]) -> str:
    """One line a kind.

    Example:
        >>> print(table({"add": {"right": 9, "asked": 10, "accuracy": 0.9}}), end="")
        add           9 of   10   90.0 %
    """
    return "".join(
        f"{name:<10} {counts['right']:>4} of {counts['asked']:>4}  {counts['accuracy']:>6.1%}\n".replace("%", " %")
        for name, counts in found.items()
    )


def _final(model: Transformer, prompt: Prompt, source: Any) -> str:
    chat = Chat(
        model,
        reasoning=prompt.reasoning,
        tools=prompt.tools,
        instructions=prompt.instructions,
        date=prompt.date,
        max_tool_calls=1,
        generate=source,
    )
    messages = [event.message for event in chat.send(prompt.question) if isinstance(event, MessageDone)]
    return next((message.content for message in messages if message.channel == "final"), "")


def _wrong(answered: Sequence[Answered]) -> list[dict[str, str]]:
    return [
        {
            "kind": one.prompt.kind,
            "reasoning": one.prompt.reasoning,
            "question": one.prompt.question,
            "answer": one.answer,
            "right": one.prompt.answer,
        }
        for one in answered
        if not one.is_right
    ]


if __name__ == "__main__":
    main()
