"""The whole model on a Hopper GPU, at the published widths: its kernels lose nothing against float32."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptoss_jax.bench.weights import random_model
from gptoss_jax.config import gpt_oss_20b, gpt_oss_120b
from gptoss_jax.generation.generate import generate
from gptoss_jax.generation.sampling import Sampling
from gptoss_jax.generation.steps import prefill
from gptoss_jax.model.cache import Cache
from gptoss_jax.model.transformer import abstract, fill, leaves

pytestmark = pytest.mark.gpu

PROMPT_TOKENS = 200
DECODED_TOKENS = 70
# Of the logits' standard deviation; as in tests/parity, where the recipe makes 0.05 this share.
MARGIN = 0.2
AGREEMENT = 0.99
# Of the logits' norm. The plain bfloat16 model on a CPU is 1.6e-2 away from float32 (20b, this seed).
ERROR = 2e-2


def wide(config, num_layers: int = 4):
    """A few layers of a published model, with a vocabulary that keeps the comparison short."""
    return dataclasses.replace(
        config, num_layers=num_layers, layer_kinds=config.layer_kinds[:num_layers], vocab_size=8192
    )


def teacher_forced(model, tokens: np.ndarray) -> np.ndarray:
    """The logits after the prompt and after each further token, the prompt read in one chunk, the rest one by one."""
    batch, length = tokens.shape
    cache = Cache.create(
        model.config, batch=batch, max_length=length, max_chunk=PROMPT_TOKENS, dtype=model.dtype, mesh=model.mesh
    )
    logits, cache = prefill(model, cache, tokens[:, :PROMPT_TOKENS], np.full(batch, PROMPT_TOKENS, np.int32))
    collected = [np.asarray(logits)]
    for position in range(PROMPT_TOKENS, length - 1):
        logits, cache = prefill(model, cache, tokens[:, position : position + 1], np.ones(batch, np.int32))
        collected.append(np.asarray(logits))
    return np.stack(collected, axis=1)


@pytest.mark.parametrize("config", [gpt_oss_20b(), gpt_oss_120b()], ids=["20b", "120b"])
@pytest.mark.parametrize("batch", [1, 3])
def test_hopper_logits_are_as_good_as_bfloat16_can_be(config, batch):
    config = wide(config)
    tokens = np.random.default_rng(batch).integers(0, config.vocab_size, (batch, PROMPT_TOKENS + DECODED_TOKENS))
    tokens = tokens.astype(np.int32)
    found = teacher_forced(random_model(config, seed=5), tokens)
    expected = np.asarray(rounded_in_float32(config)(tokens))[:, PROMPT_TOKENS - 1 : -1]

    second, first = np.sort(expected, axis=-1)[..., -2:].transpose(2, 0, 1)
    counted = first - second > MARGIN * expected.std()
    agree = found.argmax(axis=-1) == expected.argmax(axis=-1)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    figures = f"top-1 {agree[counted].mean():.4f} of {counted.sum()} counted, error {error:.2e}"
    assert counted.sum() > 15, figures
    assert agree[counted].mean() >= AGREEMENT, figures
    assert error < ERROR, figures


def rounded_in_float32(config):
    """The float32 model that holds exactly the bfloat16 model's weights; the reference implementation runs it."""
    narrow = random_model(config, seed=5, impl="reference")
    model = abstract(config, dtype=jnp.float32, impl="reference")
    values = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(narrow))}
    return fill(model, {path: values[path].astype(leaf.dtype) for path, leaf in leaves(model).items()})


def test_tokens_do_not_change_from_run_to_run():
    model = random_model(wide(gpt_oss_20b(), 2), seed=1)
    prompts = [np.random.default_rng(row).integers(0, 8192, 30 + row).tolist() for row in range(5)]
    first, second = (
        [c.ids for c in generate(model, prompts, Sampling(seed=3), max_new_tokens=40, stop_ids=())] for _ in range(2)
    )
    assert first == second
