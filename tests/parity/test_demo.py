"""The demo model that is shipped writes the same in transformers as here, and is as sure of each token."""

from pathlib import Path

import numpy as np
import pytest

import gptoss_jax
from gptoss_jax.demo.compact import Compact
from gptoss_jax.demo.expand import SHIPPED
from gptoss_jax.harmony.tokens import STOP_IDS
from gptoss_jax.model.transformer import Transformer
from tests.demo.faults import FAULTS, faulty
from tests.parity.demo import NUM_TOKENS, Written, committed, live, prompts

LARGEST_DIFFERENCE = 1e-3
"""Of a margin in float32; half of them are above 14."""
NOTICED = 20 * LARGEST_DIFFERENCE


@pytest.fixture(params=["committed", pytest.param("live", marks=pytest.mark.parity)])
def written(request: pytest.FixtureRequest) -> Written:
    if request.param == "committed":
        return committed()
    request.getfixturevalue("_oracles")
    return live()


def largest_difference(model: Transformer, written: Written) -> float:
    """Of the margins; infinite where the text is another."""
    completions = gptoss_jax.generate(
        model, prompts(), gptoss_jax.Sampling(temperature=0.0), max_new_tokens=NUM_TOKENS, top_logprobs=2
    )
    differences = []
    for completion, ids, margins in zip(completions, written.ids, written.margins, strict=True):
        length = len(completion.ids)
        if completion.ids != ids[:length].tolist():
            return np.inf
        best, second = np.array([token.top_logprobs for token in completion.tokens])[:, :, 1].T
        differences.append(np.abs(best - second - margins[:length]).max())
    return max(differences)


@pytest.mark.slow
def test_same_text_and_margins_from_the_same_safetensors(trained_checkpoint: Path, written: Written) -> None:
    assert str(written.weights) == Compact.open(SHIPPED).sha256, "make parity-golden"
    assert np.isin(written.ids, STOP_IDS).any(axis=1).sum() >= 3, "whole answers"
    model = gptoss_jax.load(trained_checkpoint, dtype="float32")
    assert largest_difference(model, written) <= LARGEST_DIFFERENCE


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_noticed(trained_checkpoint: Path, tmp_path: Path, fault: str) -> None:
    with faulty(trained_checkpoint, fault, tmp_path / fault) as model:
        assert largest_difference(model, committed()) > NOTICED
