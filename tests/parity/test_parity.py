"""The converted, loaded model against transformers (float32) and against the reference torch model (bfloat16).

Each test runs on the committed goldens, and on the oracles run live (`-m parity`, which `make parity` calls).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptoss_jax
from gptoss_jax.model.transformer import Layer, Transformer, ambient_mesh
from gptoss_jax.sharding import place
from tests.parity.oracles import NUM_GREEDY, Golden
from tests.parity.recipes import checksum
from tests.parity.workshop import Workshop

LARGEST_DIFFERENCE = 5e-4
"""Of float32 logits, over their standard deviation."""
LARGEST_RESIDUAL_DIFFERENCE = 1e-4
"""Of the float32 residual stream, over its deviation, in prompts below 100 positions."""
MARGIN = 0.05
AGREEMENT = 0.99
"""Share of the positions with a float32 margin above MARGIN where the most probable token is the reference's."""
MAX_CHUNKS = 40
MIN_COMPARED = 20

PROMPTS = pytest.mark.parametrize("prompt", ["short", "ragged", "long"])
CACHED_PROMPTS = pytest.mark.parametrize("prompt", ["ragged", "long"])


def test_checkpoint_is_the_one_the_oracles_read(workshop: Workshop, golden: Golden) -> None:
    for layout, expected in golden.checksums.items():
        assert checksum(workshop.checkpoints / layout) == expected


@PROMPTS
@pytest.mark.parametrize("layout", ["hf", "original"])
def test_float32_logits_are_those_of_transformers(workshop: Workshop, golden: Golden, prompt: str, layout: str) -> None:
    expected = golden.prompts[prompt]
    logits = all_logits(workshop, layout, "float32", prompt)
    difference = np.abs(logits[expected.kept] - expected.logits).max()
    assert difference <= LARGEST_DIFFERENCE * expected.deviation
    decided = expected.margin > 2 * LARGEST_DIFFERENCE * expected.deviation
    np.testing.assert_array_equal(logits.argmax(-1)[decided], expected.top[decided])


@pytest.mark.parametrize(
    ("prompt", "dtype"), [("short", "float32"), ("ragged", "float32"), ("long", "float32"), ("long", "bfloat16")]
)
def test_most_probable_token_is_that_of_the_reference(
    workshop: Workshop, golden: Golden, prompt: str, dtype: str
) -> None:
    expected = golden.prompts[prompt]
    top = all_logits(workshop, "original", dtype, prompt).argmax(-1)
    decided = expected.margin > MARGIN
    assert (top == expected.reference_top)[decided].mean() >= AGREEMENT


def test_residual_stream_after_each_layer(workshop: Workshop, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names the first layer that differs, which the logits cannot."""
    expected = golden.prompts["short"]
    residuals = _residuals(workshop, "short", monkeypatch)[:, expected.kept]
    for num_layers, (found, wanted) in enumerate(zip(residuals, expected.residuals, strict=True)):
        difference = np.abs(found - wanted).max() / wanted.std()
        assert difference <= LARGEST_RESIDUAL_DIFFERENCE, f"after {num_layers} layers: {difference}"


@CACHED_PROMPTS
def test_chunked_prefill_is_transformers_in_one_pass(workshop: Workshop, golden: Golden, prompt: str) -> None:
    expected = golden.prompts[prompt]
    cached = _cached_logits(workshop, prompt, expected.positions[expected.kept])
    places = zip(expected.rows[expected.kept].tolist(), expected.positions[expected.kept].tolist(), strict=True)
    compared = [
        (cached[place], logits) for place, logits in zip(places, expected.logits, strict=True) if place in cached
    ]
    assert len(compared) >= MIN_COMPARED
    found, wanted = np.stack(compared, axis=1)
    assert np.abs(found - wanted).max() <= LARGEST_DIFFERENCE * expected.deviation


@CACHED_PROMPTS
def test_greedy_continuation_is_that_of_transformers(workshop: Workshop, golden: Golden, prompt: str) -> None:
    arrays = workshop.case.prompts()
    rows = [
        row[:length].tolist()
        for row, length in zip(arrays[f"{prompt}.tokens"], arrays[f"{prompt}.lengths"], strict=True)
    ]
    completions = gptoss_jax.generate(
        workshop.model("hf", "float32"),
        rows,
        gptoss_jax.Sampling(temperature=0.0),
        max_new_tokens=NUM_GREEDY,
        stop_ids=(),
    )
    assert [list(completion.ids) for completion in completions] == golden.prompts[prompt].greedy.tolist()


@functools.cache
def all_logits(workshop: Workshop, layout: str, dtype: str, prompt: str) -> np.ndarray:
    """The model's logits at every position, row after row, without padding."""
    arrays = workshop.case.prompts()
    tokens, lengths = arrays[f"{prompt}.tokens"], arrays[f"{prompt}.lengths"]
    logits = np.asarray(workshop.model(layout, dtype)(tokens))
    return logits[np.arange(tokens.shape[1]) < lengths[:, None]]


def _cached_logits(workshop: Workshop, prompt: str, positions: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """Logits by (row, position) of a prompt read into a cache in chunks, the last tokens one by one, as in decoding.

    A chunk gives the logits of its last token only, so chunks end at some of `positions`.
    """
    model = workshop.model("hf", "float32")
    arrays = workshop.case.prompts()
    tokens, lengths = arrays[f"{prompt}.tokens"], arrays[f"{prompt}.lengths"]
    num_rows, width = tokens.shape
    some = positions[np.linspace(0, len(positions) - 1, MAX_CHUNKS).astype(int)]
    ends = sorted({*(some + 1).tolist(), *range(max(1, width - 4), width + 1)})
    longest = int(max(np.diff([0, *ends])))
    cache = gptoss_jax.Cache.create(
        model.config, batch=num_rows, max_length=width, max_chunk=longest, dtype=jnp.float32, mesh=model.mesh
    )
    found = {}
    for begin, end in zip([0, *ends], ends, strict=False):
        chunk = np.zeros((num_rows, 1 if end - begin == 1 else longest), np.int32)
        chunk[:, : end - begin] = tokens[:, begin:end]
        counts = np.clip(lengths - begin, 0, end - begin).astype(np.int32)
        logits, cache = gptoss_jax.prefill(model, cache, *place((chunk, counts), model.mesh))
        found |= {
            (row, begin + count - 1): np.asarray(logits[row]) for row, count in enumerate(counts.tolist()) if count
        }
    return found


def _residuals(workshop: Workshop, prompt: str, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The residual stream of a prompt of one row [L + 1, T, D]: the embedding, then after each layer."""
    model = workshop.model("hf", "float32")
    seen: list[jax.Array] = []
    call = Layer.__call__

    def recording(layer: Layer, x: jax.Array, *arguments: Any, **options: Any) -> Any:
        out = call(layer, x, *arguments, **options)
        seen.extend([out[0]] if seen else [x, out[0]])
        return out

    @jax.jit
    def run(model: Transformer, tokens: jax.Array) -> jax.Array:
        with ambient_mesh(model.mesh):
            num_tokens = tokens.shape[1]
            cache = gptoss_jax.Cache.create(
                model.config, batch=1, max_length=num_tokens, max_chunk=num_tokens, dtype=model.dtype
            )
            model.advance(tokens, jnp.full((1,), num_tokens, jnp.int32), cache)
            return jnp.concatenate(seen)

    with monkeypatch.context() as patch:
        patch.setattr(Layer, "__call__", recording)
        return np.asarray(run(model, place(workshop.case.prompts()[f"{prompt}.tokens"], model.mesh)))
