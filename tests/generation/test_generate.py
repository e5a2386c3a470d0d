import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.config import gpt_oss_20b
from gptoss_jax.errors import PromptError, SamplingError
from gptoss_jax.generation import generate as generation
from gptoss_jax.generation.generate import generate, stream
from gptoss_jax.generation.sampling import Sampling
from gptoss_jax.model.transformer import abstract
from gptoss_jax.sharding import make_mesh
from tests.model.test_transformer import SHARDABLE
from tests.tiny import TINY, random_model

GREEDY = Sampling(temperature=0.0)
DRAWN = Sampling(temperature=1.3, top_k=60, top_p=0.95, seed=11)
RANDOM = np.random.default_rng(0)
PROMPTS = [RANDOM.integers(0, TINY.vocab_size, length).tolist() for length in (3, 41, 150)]
NEW_TOKENS = 12


@pytest.fixture(scope="module", autouse=True)
def _several_chunks():
    """Short chunks, so that short prompts take several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(generation.PREFILL_TOKENS, "cpu", 96)  # for three prompts, chunks of 32
        yield


@pytest.fixture(scope="module")
def greedy(tiny_model):
    return generate(tiny_model, PROMPTS, GREEDY, max_new_tokens=NEW_TOKENS, stop_ids=(), top_logprobs=3)


def test_greedy_equals_taking_the_argmax_of_a_full_forward_each_time(tiny_model, greedy):
    # One forward over the prompt and all that followed: each token must be the argmax at the place before it.
    for prompt, completion in zip(PROMPTS, greedy, strict=True):
        logits = np.asarray(tiny_model(np.array([prompt + completion.ids])))[0]
        expected = logits[len(prompt) - 1 : -1].argmax(axis=-1)
        np.testing.assert_array_equal(completion.ids, expected)


def test_logprobs_are_the_models_own(tiny_model, greedy):
    prompt, completion = PROMPTS[1], greedy[1]
    logits = tiny_model(np.array([prompt + completion.ids]))[0, len(prompt) - 1 : -1]
    logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    for token, row in zip(completion.tokens, logprobs, strict=True):
        assert token.logprob == pytest.approx(row[token.id], abs=1e-4)
        best = np.argsort(-row)[:3]
        assert [entry for entry, _ in token.top_logprobs] == best.tolist()
        np.testing.assert_allclose([logprob for _, logprob in token.top_logprobs], row[best], atol=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_neighbours_change_nothing(tiny_model, sampling):
    together = generate(tiny_model, PROMPTS, sampling, max_new_tokens=NEW_TOKENS, stop_ids=())
    for prompt, completion in zip(PROMPTS, together, strict=True):
        [alone] = generate(tiny_model, [prompt], sampling, max_new_tokens=NEW_TOKENS, stop_ids=())
        assert alone.ids == completion.ids


def test_rows_may_have_samplings_of_their_own(tiny_model, greedy):
    prompts = [PROMPTS[1]] * 3
    samplings = [GREEDY, DRAWN, dataclasses.replace(DRAWN, seed=12)]
    completions = generate(tiny_model, prompts, samplings, max_new_tokens=NEW_TOKENS, stop_ids=())
    assert completions[0].ids == greedy[1].ids
    assert len({tuple(completion.ids) for completion in completions}) == 3


def test_stream_yields_what_generate_returns(tiny_model):
    [completion] = generate(tiny_model, PROMPTS[:1], DRAWN, max_new_tokens=40, stop_ids=())
    tokens = list(stream(tiny_model, PROMPTS[0], DRAWN, max_new_tokens=40, stop_ids=()))
    assert [token.id for token in tokens] == completion.ids
    assert [token.finish_reason for token in tokens] == [None] * 39 + ["length"]


def test_a_stop_id_ends_its_row_only_and_is_returned(tiny_model, greedy):
    ids = [completion.ids for completion in greedy]
    stop = next(token for token in ids[0][1:] if token not in ids[0][:1])
    stopped = generate(tiny_model, PROMPTS, GREEDY, max_new_tokens=NEW_TOKENS, stop_ids=(stop,))
    for full, completion in zip(ids, stopped, strict=True):
        length = full.index(stop) + 1 if stop in full else NEW_TOKENS
        assert completion.ids == full[:length]
        assert completion.finish_reason == ("stop" if stop in full else "length")


def test_decoding_ends_as_soon_as_all_rows_have_stopped(tiny_model, greedy, monkeypatch):
    dispatches = []
    decode = generation.decode
    monkeypatch.setattr(generation, "decode", lambda *args, **kw: dispatches.append(1) or decode(*args, **kw))
    stops = {completion.ids[1] for completion in greedy}
    generate(tiny_model, PROMPTS, GREEDY, max_new_tokens=5000, stop_ids=tuple(stops))
    assert len(dispatches) == 1


def test_more_tokens_than_one_dispatch_holds(tiny_model, monkeypatch):
    [expected] = generate(tiny_model, PROMPTS[:1], DRAWN, max_new_tokens=20, stop_ids=())
    monkeypatch.setattr(generation, "DECODE_BUFFER", 6)
    [found] = generate(tiny_model, PROMPTS[:1], DRAWN, max_new_tokens=20, stop_ids=())
    assert found.ids == expected.ids


def test_the_first_token_may_be_the_last(tiny_model, greedy):
    [completion] = generate(tiny_model, PROMPTS[:1], GREEDY, max_new_tokens=1, stop_ids=())
    assert completion.ids == greedy[0].ids[:1]
    [completion] = generate(tiny_model, PROMPTS[:1], GREEDY, max_new_tokens=9, stop_ids=(greedy[0].ids[0],))
    assert (completion.ids, completion.finish_reason) == (greedy[0].ids[:1], "stop")


def test_no_prompts_give_no_completions(tiny_model):
    assert generate(tiny_model, [], max_new_tokens=3) == []


def test_generation_ends_where_the_context_does():
    model = random_model(dataclasses.replace(TINY, max_context=20, num_layers=2, layer_kinds=TINY.layer_kinds[:2]))
    completions = generate(model, [[1] * 15, [2] * 20], GREEDY, max_new_tokens=2**70, stop_ids=())
    assert [(len(completion.ids), completion.finish_reason) for completion in completions] == [
        (6, "length"),
        (1, "length"),
    ]


@pytest.mark.parametrize(("data", "expert", "tensor"), [(2, 2, 2), (1, 4, 2), (4, 1, 1)])
def test_every_mesh_gives_the_same_tokens(data, expert, tensor):
    # Three prompts on four data shards: rows are padded.
    prompts = [[token % SHARDABLE.vocab_size for token in prompt] for prompt in PROMPTS]
    samplings = [GREEDY, DRAWN, GREEDY]
    expected = generate(random_model(SHARDABLE), prompts, samplings, max_new_tokens=8, stop_ids=())
    model = random_model(SHARDABLE, mesh=make_mesh(data=data, expert=expert, tensor=tensor))
    found = generate(model, prompts, samplings, max_new_tokens=8, stop_ids=())
    assert [completion.ids for completion in found] == [completion.ids for completion in expected]


def test_bfloat16_generates():
    model = random_model(dtype=jnp.bfloat16)
    [completion] = generate(model, PROMPTS[:1], GREEDY, max_new_tokens=5, stop_ids=())
    assert len(completion.ids) == 5


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "no tokens: prompt 1: give at least one token"),
        ([[0] * (TINY.max_context + 1)], "131073 tokens: prompt 0: the context is 131072 tokens"),
        ([[1], [5, 130]], r"token id 130 at \(1,\): prompt 1: ids of this model's vocabulary are 0 to 129"),
        ([[-1]], r"token id -1 at \(0,\): prompt 0"),
        ([np.array([[1]])], r"int64 values of shape \(1, 1\): prompt 0: give integer ids in 1 dim"),
        ([np.array([1.9])], r"float64 values of shape \(1,\): prompt 0: give integer ids in 1 dim"),
    ],
    ids=["empty", "too long", "over the vocabulary", "negative", "two dims", "no integers"],
)
def test_bad_prompts_are_refused(tiny_model, prompts, message):
    with pytest.raises(PromptError, match=message):
        generate(tiny_model, prompts, max_new_tokens=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 3, "top_logprobs": 21}, "top_logprobs is 21: generate: choose 0 to 20"),
        ({"max_new_tokens": 3, "sampling": [GREEDY, GREEDY]}, "2 samplings for 1 prompts"),
    ],
    ids=["no tokens", "too many logprobs", "too many samplings"],
)
def test_bad_settings_are_refused(tiny_model, settings, message):
    with pytest.raises(SamplingError, match=message):
        generate(tiny_model, [[1]], **settings)


@pytest.mark.parametrize(
    ("devices", "least"), [([{"bytes_limit": 16}, None, {"bytes_limit": 14}, {}], 14), ([None, {}], None), ([], None)]
)
def test_memory_is_that_of_the_device_with_the_least(monkeypatch, devices, least):
    local = [SimpleNamespace(memory_stats=lambda found=found: found) for found in devices]
    mesh = make_mesh()
    monkeypatch.setitem(vars(mesh), "local_devices", local)  # a cached property
    assert generation._memory_limit(mesh) == least


@pytest.mark.parametrize(("gigabytes", "tokens"), [(141, 8192), (16, 1024), (14, 512)])
def test_prompts_are_read_in_shorter_chunks_where_memory_is_short(monkeypatch, gigabytes, tokens):
    monkeypatch.setattr(generation, "platform", lambda: "hopper")
    monkeypatch.setattr(generation, "_memory_limit", lambda _: gigabytes * 10**9)
    model = abstract(gpt_oss_20b())
    assert generation.prefill_chunk(model, 1) == tokens
    assert generation.prefill_chunk(model, 4) == tokens // 4
