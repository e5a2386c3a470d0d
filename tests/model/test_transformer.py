import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import PromptError, ShardingError
from gptoss_jax.generation.steps import prefill
from gptoss_jax.model.cache import Cache
from gptoss_jax.model.transformer import Transformer, abstract, ambient_mesh, build
from gptoss_jax.parameters import parameters
from gptoss_jax.sharding import make_mesh, place
from tests.tiny import TINY, assert_same_logits, random_model

TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (3, 150))
SHARDABLE = dataclasses.replace(
    TINY, num_experts=8, vocab_size=136, num_layers=2, layer_kinds=("sliding_attention", "full_attention")
)
"""A tiny model with sizes that divide over eight devices."""


@jax.jit
def advance(model: Transformer, tokens, counts, cache: Cache):
    with ambient_mesh(model.mesh):
        hidden, cache = model.advance(tokens, counts, cache)
        return model.logits(hidden), cache


def chunked_logits(model: Transformer, tokens: np.ndarray, chunk: int) -> np.ndarray:
    cache = Cache.create(
        model.config, batch=len(tokens), max_length=256, max_chunk=chunk, dtype=model.dtype, mesh=model.mesh
    )
    pieces = []
    for begin in range(0, tokens.shape[1], chunk):
        piece = tokens[:, begin : begin + chunk]
        counts = np.full(len(tokens), piece.shape[1], np.int32)
        padded = np.pad(piece, ((0, 0), (0, chunk - piece.shape[1])))
        logits, cache = advance(model, *place((padded, counts), model.mesh), cache)
        pieces.append(np.asarray(logits)[:, : piece.shape[1]])
    return np.concatenate(pieces, axis=1)


@pytest.fixture(scope="module")
def full_logits(tiny_model) -> np.ndarray:
    return np.asarray(tiny_model(TOKENS))


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_chunked_and_token_by_token_equal_the_full_forward(tiny_model, full_logits, chunk):
    assert_same_logits(chunked_logits(tiny_model, TOKENS, chunk), full_logits)


def test_ragged_rows_equal_each_row_alone(tiny_model, full_logits):
    lengths = [150, 1, 83]
    cache = Cache.create(TINY, batch=3, max_length=256, max_chunk=64, dtype=jnp.float32, mesh=tiny_model.mesh)
    last = np.zeros((3, TINY.vocab_size))
    for begin in range(0, 150, 64):
        chunk = np.pad(TOKENS[:, begin : begin + 64], ((0, 0), (0, max(0, begin + 64 - 150))))
        counts = np.clip(np.array(lengths) - begin, 0, 64).astype(np.int32)
        logits, cache = prefill(tiny_model, cache, *place((chunk, counts), tiny_model.mesh))
        last = np.where(counts[:, None] > 0, logits, last)
    for row, length in enumerate(lengths):
        assert_same_logits(last[row], full_logits[row, length - 1])
        alone = np.asarray(tiny_model(TOKENS[row : row + 1, :length]))[0, -1]
        assert_same_logits(last[row], alone)
    np.testing.assert_array_equal(cache.lengths, lengths)


def test_no_future_token_matters(tiny_model, full_logits):
    changed = TOKENS.copy()
    changed[:, 100] = (changed[:, 100] + 1) % TINY.vocab_size
    logits = np.asarray(tiny_model(changed))
    assert_same_logits(logits[:, :100], full_logits[:, :100])
    assert np.abs(logits[:, 100:] - full_logits[:, 100:]).max(axis=(1, 2)).min() > 1e-2


def one_layer(kind: str) -> ModelConfig:
    return dataclasses.replace(TINY, num_layers=1, layer_kinds=(kind,))


@pytest.mark.parametrize(("kind", "reaches"), [("sliding_attention", 7), ("full_attention", 40)])
def test_one_layer_sees_exactly_its_window(kind, reaches):
    model = random_model(one_layer(kind))
    tokens = TOKENS[:1, :40]
    before = np.asarray(model(tokens))
    changed = tokens.copy()
    changed[0, 0] = (changed[0, 0] + 1) % TINY.vocab_size
    moved = np.abs(np.asarray(model(changed)) - before).max(axis=(0, 2)) > 1e-6
    np.testing.assert_array_equal(np.flatnonzero(moved), np.arange(reaches))


def test_gradients_flow_to_every_float_parameter():
    model = random_model()
    structure, floats, rest = nnx.split(model, lambda _, leaf: leaf.dtype == jnp.float32, ...)

    def loss(floats):
        logits = nnx.merge(structure, floats, rest)(TOKENS[:2, :20])
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 7])

    gradients = jax.jit(jax.grad(loss))(floats)
    for path, gradient in nnx.to_flat_state(gradients):
        values = np.asarray(gradient.get_value())
        assert np.isfinite(values).all(), path
        assert (values != 0).any(), path


@pytest.fixture(scope="module")
def one_device_logits() -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(1).integers(0, SHARDABLE.vocab_size, (8, 70))
    return tokens, np.asarray(random_model(SHARDABLE)(tokens))


MESHES = [
    (data, expert, tensor)
    for tensor in (1, 2)  # the divisors of 2 kv heads
    for expert in (1, 2, 4, 8)
    if (data := 8 // (expert * tensor))
]


@pytest.mark.parametrize(("data", "expert", "tensor"), MESHES)
def test_every_mesh_gives_the_one_device_logits(data, expert, tensor, one_device_logits):
    tokens, expected = one_device_logits
    model = random_model(SHARDABLE, mesh=make_mesh(data=data, expert=expert, tensor=tensor))
    assert_same_logits(np.asarray(model(tokens)), expected)


def test_weights_and_cache_are_split_as_the_tables_say():
    mesh = make_mesh(data=2, expert=2, tensor=2)
    model = random_model(SHARDABLE, mesh=mesh)
    experts = model.layers[0].experts.gate_up.blocks[...]
    assert experts.addressable_shards[0].data.shape == (2, *experts.shape[1:])
    heads = model.layers[0].attention.query.weight[...]
    assert heads.addressable_shards[0].data.shape == (3, *heads.shape[1:])
    cache = Cache.create(SHARDABLE, batch=4, max_length=64, mesh=mesh)
    assert cache.keys[0].addressable_shards[0].data.shape == (2, 1, *cache.keys[0].shape[2:])


def test_parameters_are_those_of_the_checkpoint():
    state = nnx.to_flat_state(nnx.state(abstract(TINY)))
    found = {".".join(map(str, path)): (leaf.shape, str(leaf.dtype)) for path, leaf in state}
    assert found == {path: (entry.shape, entry.dtype) for path, entry in parameters(TINY).items()}


def test_bfloat16_stays_near_float32():
    wide, narrow = random_model(), random_model(dtype=jnp.bfloat16)
    expected = np.asarray(wide(TOKENS))
    difference = np.asarray(narrow(TOKENS)) - expected
    assert np.linalg.norm(difference) < 5e-2 * np.linalg.norm(expected)
    # A single row takes a path of its own on the CPU (pallas_kernels.projections.reference.multiply).
    assert np.linalg.norm(np.asarray(narrow(TOKENS[:1, :1])) - expected[:1, :1]) < 5e-2 * np.linalg.norm(
        expected[:1, :1]
    )


@pytest.mark.parametrize("bad", [-1, TINY.vocab_size])
def test_ids_outside_the_vocabulary_are_refused(tiny_model, bad):
    with pytest.raises(PromptError, match=rf"token id {bad} at \(0, 2\).*0 to 129"):
        tiny_model(np.array([[1, 2, bad]]))


def test_a_row_over_the_context_is_refused():
    short = dataclasses.replace(one_layer("full_attention"), max_context=8)
    with pytest.raises(PromptError, match="9 tokens: prompt: the context is 8 tokens"):
        random_model(short)(np.zeros((1, 9), np.int32))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"tensor": 4}, "2 kv heads do not divide over tensor = 4"),
        ({"expert": 4}, "10 experts do not divide over expert \\* tensor = 4"),
        ({"data": 16}, "needs 16 devices.*8 cpu device"),
        ({"data": 0}, "axis data has size 0"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(axes, message):
    with pytest.raises(ShardingError, match=message):
        build(TINY, mesh=make_mesh(**axes))


def test_a_mesh_with_other_axes_is_refused():
    with pytest.raises(ShardingError, match="use make_mesh"):
        build(TINY, mesh=jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,)))


def test_a_batch_that_does_not_divide_is_refused():
    model = random_model(mesh=make_mesh(data=2))
    with pytest.raises(ShardingError, match="3 rows do not divide over data = 2"):
        model(TOKENS)
