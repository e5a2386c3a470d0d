"""Weights put in a backend's own order: the same numbers, in place, a layer at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.model import transformer
from gptoss_jax.model.transformer import abstract, leaves, prepare
from gptoss_jax.sharding import make_mesh
from pallas_kernels import dispatch
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.experts import ExpertWeights, HopperExperts, TPUExperts, hopper_layout, tpu_layout
from pallas_kernels.experts.weights import ScaleTooLarge
from tests.tiny import TINY, random_model

TILED = dataclasses.replace(TINY, hidden_size=128, num_experts=8, vocab_size=136)
"""A tiny model whose widths are multiples of the Hopper kernels' tiles."""


@pytest.mark.parametrize("axes", [{}, {"expert": 2, "tensor": 2}], ids=["one device", "four devices"])
@pytest.mark.parametrize(
    ("impl", "layout", "order", "parts"),
    [("hopper", hopper_layout, HopperExperts, 1), ("tpu", tpu_layout, TPUExperts, 3)],
)
def test_prepared_weights_are_packed_in_place(impl, layout, order, parts, axes):
    model = random_model(TILED, mesh=make_mesh(**axes), dtype=jnp.bfloat16, impl=impl)
    published = [layer.experts.weights for layer in model.layers]
    assert all(isinstance(weights, ExpertWeights) for weights in published)
    before = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), published[0])
    if order is HopperExperts and axes:  # `tensor` cuts the experts' width, and shares the bias of down out
        before = dataclasses.replace(before, down_bias=before.down_bias.astype(jnp.float32) / axes["tensor"])
        before = hopper_layout.padded(before, axes["tensor"] * hopper_layout.PART_WIDTH)
    expected = layout.pack(before)

    assert prepare(model) is model
    for layer, before in zip(model.layers, published, strict=True):
        assert isinstance(layer.experts.weights, order)
        assert before.gate_up.blocks.is_deleted()
        assert before.down_bias.is_deleted()
        assert len(layer.attention.heads) == parts
        num_heads = sum(heads.weight.shape[0] for heads in layer.attention.heads)
        assert num_heads == TILED.num_heads + 2 * TILED.num_kv_heads
    found = model.layers[0].experts.weights
    for field in dataclasses.fields(order):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))
    assert found.gate_up_words.sharding.num_devices == model.mesh.size
    assert prepare(model).layers[0].experts.weights.gate_up_words is found.gate_up_words


def test_the_cpu_and_float32_keep_the_published_order():
    for dtype, impl in ((jnp.bfloat16, "auto"), (jnp.float32, "auto"), (jnp.bfloat16, "reference")):
        model = random_model(TILED, dtype=dtype, impl=impl)
        assert isinstance(prepare(model).layers[0].experts.weights, ExpertWeights)


@pytest.mark.parametrize("impl", ["hopper", "tpu"])
def test_an_abstract_model_gets_the_shapes_and_shardings_of_the_real_one(impl):
    mesh = make_mesh(expert=2)
    real = leaves(prepare(random_model(TILED, mesh=mesh, dtype=jnp.bfloat16, impl=impl)))
    assert leaves(prepare(abstract(TILED, mesh=mesh, impl=impl))) == real


def test_on_a_tpu_the_embeddings_rows_are_in_one_piece(monkeypatch):
    monkeypatch.setattr(transformer, "platform", lambda: "tpu")
    mesh = make_mesh(expert=2)
    real = random_model(TILED, mesh=mesh, dtype=jnp.bfloat16, impl="tpu")
    before = np.asarray(real.embedding.weight[...])
    prepare(real)
    np.testing.assert_array_equal(real.embedding.weight[...], before)
    assert real.embedding.weight.get_value().format.layout.major_to_minor == (0, 1)
    described = leaves(prepare(abstract(TILED, mesh=mesh, impl="tpu")))
    assert described["embedding.weight"].format.layout.major_to_minor == (0, 1)
    assert described["unembedding.weight"].format.layout is None


def test_widths_that_do_not_tile_are_refused():
    with pytest.raises(Unsupported, match="96"):
        prepare(random_model(dtype=jnp.bfloat16, impl="hopper"))


def with_a_large_scale(impl):
    """A model whose last layer holds a scale byte that the Hopper kernels cannot reach."""
    model = random_model(TILED, dtype=jnp.bfloat16, impl=impl)
    scales = model.layers[-1].experts.gate_up.scales
    changed = np.array(scales.get_value())
    changed[0, 0, 0] = 129
    scales.set_value(jax.device_put(changed, scales.get_value().sharding))
    return model


def published(model):
    return [
        isinstance(weights := layer.experts.weights, ExpertWeights) and not weights.down.blocks.is_deleted()
        for layer in model.layers
    ]


def test_scales_out_of_the_kernels_reach_are_refused_and_nothing_is_lost():
    model = with_a_large_scale("hopper")
    with pytest.raises(ScaleTooLarge, match="scale byte of 129"):
        prepare(model)
    assert all(published(model))


def test_weights_that_no_kernel_takes_stay_as_published_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "platform", lambda: "hopper")
    many = dataclasses.replace(TILED, experts_per_token=9, num_experts=16)
    for model, words in (
        (with_a_large_scale("auto"), "scale byte of 129"),
        (random_model(many, dtype=jnp.bfloat16), "1 to 8 experts per token, not 9"),
        (random_model(dtype=jnp.bfloat16), "96"),
    ):
        dispatch._warn_once.cache_clear()
        prepare(model)
        assert all(published(model))
        assert all(len(layer.attention.heads) == 1 for layer in model.layers)  # joined in any case
        assert words in caplog.text


def test_joined_heads_say_the_same_on_every_device():
    tokens = np.arange(12).reshape(2, 6)
    expected = random_model(impl="reference")(tokens)
    model = random_model(mesh=make_mesh(tensor=2), impl="reference")
    parts = [layer.attention.heads for layer in model.layers]
    with jax.set_mesh(model.mesh):
        for layer in model.layers:
            layer.attention.prepare("hopper")
    assert all(part.weight.is_deleted() for heads in parts for part in heads)
    np.testing.assert_allclose(model(tokens), expected, rtol=1e-5, atol=1e-5)
