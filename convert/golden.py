"""Teacher-force the published prompt through a model and compare its log-probabilities with the published ones.

The figures are those of transformers' tests for the real weights (greedy, no start token, bfloat16 softmax); greedy
text is no stable oracle, since one rounding flips it, but the log-probabilities along a given text are.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from gptoss_jax.config import ModelConfig, gpt_oss_20b, gpt_oss_120b
from gptoss_jax.errors import CheckpointError

Encode = Callable[[str], list[int]]
Logits = Callable[[list[int]], np.ndarray]

ABSOLUTE_TOLERANCE = 0.1
RELATIVE_TOLERANCE = 0.1
_NUM_CHECKED = 12


@dataclasses.dataclass(frozen=True)
class GoldenTarget:
    """A prompt, the text a model continues it with, and the log-probability of each token of that text."""

    prompt: str
    text: str
    logprobs: tuple[float, ...]


_PROMPT = "Roses are red, violets"
GOLDEN_20B = GoldenTarget(
    _PROMPT,
    " are blue, I love you, and I love you too.",
    (-0.037353515625, -0.08154296875, -1.21875, -1.953125, -2.234375, -0.96875, -1.546875, -1.640625, -0.93359375,
     -1.609375, -1.625, -0.85546875),
)  # fmt: skip
GOLDEN_120B = GoldenTarget(
    _PROMPT,
    " are blue,\nI am a language model, not a human being",
    (-0.90234375, -0.66015625, -1.546875, -2.703125, -2.078125, -1.21875, -2.484375, -0.031982421875, -0.84765625,
     -1.890625, -0.1923828125, -2.046875),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GoldenStep:
    """One token of the target text."""

    token: int
    expected: float
    found: float

    @property
    def is_close(self) -> bool:
        """Whether it lies within the published tolerance."""
        return abs(self.found - self.expected) <= ABSOLUTE_TOLERANCE + RELATIVE_TOLERANCE * abs(self.expected)


@dataclasses.dataclass(frozen=True)
class GoldenReport:
    """The comparison; `str` of it is a table."""

    target: GoldenTarget
    steps: tuple[GoldenStep, ...]

    @property
    def passed(self) -> bool:
        """Whether every step is within tolerance."""
        return all(step.is_close for step in self.steps)

    def __str__(self) -> str:
        lines = [f"{self.target.prompt!r} continued with {self.target.text!r}", "   token  published      found"]
        for step in self.steps:
            mark = "" if step.is_close else "  out of tolerance"
            lines.append(f"{step.token:8}  {step.expected:9.4f}  {step.found:9.4f}{mark}")
        lines.append("passed" if self.passed else "FAILED")
        return "\n".join(lines)


def target_for(config: ModelConfig) -> GoldenTarget:
    """The published target of this architecture; there is one for 20b and one for 120b."""
    for published, target in ((gpt_oss_20b(), GOLDEN_20B), (gpt_oss_120b(), GOLDEN_120B)):
        if config == published:
            return target
    raise CheckpointError(
        "no published log-probabilities for this architecture", where="--golden", fix="use gpt-oss-20b or gpt-oss-120b"
    )


def check(logits: Logits, encode: Encode, target: GoldenTarget) -> GoldenReport:
    """Run the prompt and the target text through `logits` (ids to [T, V], in one go) and compare.

    Raises CheckpointError if the vocabulary cuts the text into fewer tokens than were published.
    """
    prompt, text = encode(target.prompt), encode(target.text)
    expected = target.logprobs[:_NUM_CHECKED]
    if len(text) < len(expected):
        raise CheckpointError(
            f"the target text is {len(text)} tokens, {len(expected)} log-probabilities were published",
            where=repr(target.text),
            fix="use the o200k_harmony vocabulary",
        )
    text = text[: len(expected)]
    # Position t predicts token t + 1.
    scores = logits([*prompt, *text])[len(prompt) - 1 : -1].astype(np.float64)
    found = _logprobs(scores, text)
    return GoldenReport(target, tuple(map(GoldenStep, text, expected, found)))


def _logprobs(scores: np.ndarray, tokens: Sequence[int]) -> list[float]:
    largest = scores.max(axis=-1, keepdims=True)
    normaliser = largest[:, 0] + np.log(np.exp(scores - largest).sum(axis=-1))
    return [float(scores[row, token] - normaliser[row]) for row, token in enumerate(tokens)]
