"""The training loss and its gradients against the plain oracle, on one device and on meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptoss_jax.finetune.adapters import TARGETS, LoRA
from gptoss_jax.finetune.placement import training_mesh
from gptoss_jax.finetune.step import program
from gptoss_jax.sharding import make_mesh
from jax.sharding import NamedSharding
from pallas_kernels.mxfp4 import dequantize, quantize
from tests.finetune import oracle
from tests.finetune.batches import conversations, random_batch
from tests.tiny import TINY, random_model

CONFIG = dataclasses.replace(TINY.first_layers(2), num_heads=8, num_kv_heads=4, num_experts=8, vocab_size=128)
BATCH = random_batch([[9, 14, 5], [20, 3], [30], [11, 11]], sequence_length=32, vocab_size=CONFIG.vocab_size)
ADAPTERS = LoRA(rank=3, alpha=6.0, targets=TARGETS)
MESHES = [{}, {"data": 4}, {"expert": 4}, {"tensor": 2}, {"data": 2, "expert": 2, "tensor": 2}, {"expert": 8}]


@functools.cache
def parameters():
    """A checkpoint's parameters on the host."""
    model = random_model(CONFIG, seed=5)
    from flax import nnx

    state = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in state}


@functools.cache
def adapters():
    random = np.random.default_rng(6)
    from gptoss_jax.finetune.adapters import adapter_shapes

    shapes = adapter_shapes(CONFIG, ADAPTERS)
    return {path: random.normal(size=shape).astype(np.float32) * 0.2 for path, shape in shapes.items()}


def made_on(mesh_sizes, *, lora=None, quantize=False, **options):
    mesh = training_mesh(make_mesh(**mesh_sizes))
    return program(
        CONFIG, mesh, lora=lora, quantize=quantize, dtype=jnp.float32, update=optax.sgd(1.0), **options
    )


def placed(made, arrays, specs):
    return {path: jax.device_put(value, NamedSharding(made.mesh, specs[path])) for path, value in arrays.items()}


def loss_and_gradients(made, trained, frozen, *, parts=1, batch=BATCH):
    """By one update of plain gradient descent at rate 1: the change is the gradient of the mean loss."""
    before = {path: np.asarray(value) for path, value in trained.items()}
    state = made.start(placed(made, trained, made.trained_specs))
    state, report = made.compile_step()(state, placed(made, frozen, made.frozen_specs), made.place(batch, parts=parts))
    assert int(state.step) == 1
    return report, {path: before[path] - np.asarray(value) for path, value in state.trained.items()}


def assert_close(found, expected, *, tolerance):
    for path, value in expected.items():
        scale = np.abs(value).max()
        worst = np.abs(found[path] - value).max()
        assert worst <= tolerance * scale + 1e-7, f"{path}: {worst:.2e} of {scale:.2e}"
        assert scale > 0 or path.endswith("key.bias"), f"{path} has no gradient: the test cannot fail"


@functools.cache
def expected_of_adapters():
    weights = oracle.dense(parameters())

    def loss(changed):
        tokens = BATCH.weights.sum()
        return oracle.loss_sum(oracle.merged(weights, changed, ADAPTERS), conversations(BATCH), CONFIG) / tokens

    return jax.jit(jax.value_and_grad(loss))(adapters())


@functools.cache
def expected_of_masters(quantized=False):
    weights = oracle.dense(parameters())

    def loss(weights):
        return oracle.loss_sum(weights, conversations(BATCH), CONFIG) / BATCH.weights.sum()

    return jax.jit(jax.value_and_grad(loss))(weights)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_adapters_have_the_oracles_gradients(sizes):
    report, gradients = loss_and_gradients(made_on(sizes, lora=ADAPTERS), adapters(), parameters())
    loss, expected = expected_of_adapters()
    assert float(report.loss) == pytest.approx(float(loss), rel=1e-5)
    assert_close(gradients, expected, tolerance=2e-4)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_masters_have_the_oracles_gradients(sizes):
    report, gradients = loss_and_gradients(made_on(sizes), oracle.dense(parameters()), {})
    loss, expected = expected_of_masters()
    assert float(report.loss) == pytest.approx(float(loss), rel=1e-5)
    assert_close(gradients, expected, tolerance=2e-4)
