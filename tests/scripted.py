"""A token source that writes what the test says, in place of the engine, and keeps the prompts it was given."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from gptoss_jax.harmony.encoding import decode, encode


class Script:
    """Each reply is one run of the engine; an exception among them is raised in its turn."""

    def __init__(self, *replies: str | BaseException | Sequence[str | BaseException]) -> None:
        self.prompts: list[str] = []
        self.settings: list[tuple[Any, int]] = []
        self._replies = list(replies)

    def __call__(
        self, model: Any, prompt: Sequence[int], sampling: Any, *, max_new_tokens: int
    ) -> Iterator[SimpleNamespace]:
        self.prompts.append(decode(prompt))
        self.settings.append((sampling, max_new_tokens))
        reply = self._replies.pop(0)
        num_left = max_new_tokens
        for part in [reply] if isinstance(reply, str | BaseException) else reply:
            if isinstance(part, BaseException):
                raise part
            for token in encode(part, special=True)[:num_left]:
                num_left -= 1
                yield SimpleNamespace(id=token)


def final(text: str) -> str:
    return f"<|channel|>final<|message|>{text}<|return|>"


def thought(text: str) -> str:
    return f"<|channel|>analysis<|message|>{text}<|end|><|start|>assistant"


def call(name: str, arguments: str) -> str:
    return f"<|channel|>commentary to={name} <|constrain|>json<|message|>{arguments}<|call|>"
