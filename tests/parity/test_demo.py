"""The demo model, expanded to the published layout, writes the same in transformers as here."""

from types import SimpleNamespace

import numpy as np
import pytest

import gptoss_jax
from convert.converter import convert
from gptoss_jax.demo.corpus import evaluation_prompts
from gptoss_jax.demo.evaluate import GROUPS
from gptoss_jax.demo.expand import SHIPPED, expand
from tests.demo.conftest import first_prompt
from tests.parity.oracles import run_oracle

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("_oracles")]

NUM_TOKENS = 64


@pytest.mark.skipif(not SHIPPED.is_file(), reason=f"the trained weights, {SHIPPED.name}, are not there yet")
def test_same_text_from_the_same_safetensors(tmp_path) -> None:
    """One prompt of each kind, answered greedily in float32; of tool prompts, the call."""
    published = expand(tmp_path / "published")
    convert(published, tmp_path / "converted")
    model = gptoss_jax.load(tmp_path / "converted", dtype="float32")
    num_kinds = sum(len(kinds) for kinds in GROUPS.values())
    prompts = [first_prompt(prompt) for prompt in evaluation_prompts(seed=11, count=num_kinds)]
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((num_kinds, lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    case = SimpleNamespace(prompts=lambda: {"demo.tokens": tokens, "demo.lengths": lengths})
    said = run_oracle("transformers", published, case, "--greedy", str(NUM_TOKENS), "--only-greedy")["demo.greedy"]
    ours = gptoss_jax.generate(model, prompts, gptoss_jax.Sampling(temperature=0.0), max_new_tokens=NUM_TOKENS)
    for completion, theirs in zip(ours, said, strict=True):
        assert completion.ids == theirs[: len(completion.ids)].tolist()
    assert sum(completion.finish_reason == "stop" for completion in ours) >= 3
