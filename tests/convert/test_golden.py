"""The golden check against a stand-in for the real weights, which are not at hand in tests."""

from collections.abc import Sequence

import numpy as np
import pytest

from convert.golden import GOLDEN_20B, GOLDEN_120B, GoldenTarget, check, target_for
from gptoss_jax.config import gpt_oss_20b, gpt_oss_120b
from gptoss_jax.errors import CheckpointError
from tests.tiny import TINY

VOCABULARY = 300


def encode(text: str) -> list[int]:
    """One token a byte."""
    return list(text.encode())


def stand_in(tokens_seen: list[list[int]], logprobs: Sequence[float], prompt_length: int):
    """A model that gives the token after position `prompt_length - 1 + i` the log-probability `logprobs[i]`."""

    def logits(tokens: list[int]) -> np.ndarray:
        tokens_seen.append(tokens)
        scores = np.random.default_rng(0).normal(size=(len(tokens), VOCABULARY)).astype(np.float32)
        for step, logprob in enumerate(logprobs):
            row, token = prompt_length - 1 + step, tokens[prompt_length + step]
            others = np.delete(scores[row], token).astype(np.float64)
            # p / (p + rest) = exp(logprob), and an offset that a log-softmax must take out again.
            scores[row, token] = logprob - np.log1p(-np.exp(logprob)) + np.log(np.exp(others).sum())
            scores[row] += 5
        return scores

    return logits


@pytest.mark.parametrize("target", [GOLDEN_20B, GOLDEN_120B])
def test_model_with_the_published_probabilities_passes(target: GoldenTarget) -> None:
    seen: list[list[int]] = []
    report = check(stand_in(seen, target.logprobs, len(target.prompt)), encode, target)
    assert report.passed
    assert [step.found for step in report.steps] == pytest.approx(target.logprobs, abs=1e-5)
    assert seen == [encode(target.prompt + target.text[:12])], "one run, over prompt and target"
    assert str(report).endswith("passed")


@pytest.mark.parametrize(("error", "passes"), [(0.1 + 0.1 * 1.21875 - 0.01, True), (0.1 + 0.1 * 1.21875 + 0.01, False)])
def test_tolerance_is_absolute_plus_relative(error: float, passes: bool) -> None:
    logprobs = list(GOLDEN_20B.logprobs)
    logprobs[2] -= error
    report = check(stand_in([], logprobs, len(GOLDEN_20B.prompt)), encode, GOLDEN_20B)
    assert report.passed == passes
    assert ("out of tolerance" in str(report)) != passes


def test_predictions_shifted_by_one_fail() -> None:
    shifted = (*GOLDEN_20B.logprobs[1:], -1.0)
    assert not check(stand_in([], shifted, len(GOLDEN_20B.prompt)), encode, GOLDEN_20B).passed


def test_another_vocabulary_is_named() -> None:
    with pytest.raises(CheckpointError, match="10 tokens, 12 log-probabilities"):
        check(stand_in([], [], 1), lambda text: encode(text)[:10], GOLDEN_20B)


def test_each_published_size_has_its_target() -> None:
    assert target_for(gpt_oss_20b()) is GOLDEN_20B
    assert target_for(gpt_oss_120b()) is GOLDEN_120B
    with pytest.raises(CheckpointError, match="no published log-probabilities"):
        target_for(TINY)
