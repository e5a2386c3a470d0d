"""The training loss and its gradients against the plain oracle, on one device and on meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from gptoss_jax.finetune.adapters import TARGETS, LoRA, adapter_shapes
from gptoss_jax.finetune.loss import _piece
from gptoss_jax.finetune.optimizer import optimizer
from gptoss_jax.finetune.placement import training_mesh
from gptoss_jax.finetune.settings import OPTIMIZERS, FineTuning
from gptoss_jax.finetune.step import make_program
from gptoss_jax.sharding import make_mesh
from pallas_kernels.mxfp4 import straight_through
from tests.finetune import oracle
from tests.finetune.batches import conversations, random_batch
from tests.tiny import TINY, random_model

CONFIG = dataclasses.replace(TINY.first_layers(2), num_heads=8, num_kv_heads=4, num_experts=8, vocab_size=128)
BATCH = random_batch([[9, 14, 5], [20, 3], [30], [11, 11]], sequence_length=32, vocab_size=CONFIG.vocab_size)
ADAPTERS = LoRA(rank=3, alpha=6.0, targets=TARGETS)
TOLERANCE = 2e-4


@functools.cache
def parameters():
    """A checkpoint's parameters on the host."""
    state = nnx.to_flat_state(nnx.state(random_model(CONFIG, seed=5)))
    return {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in state}


@functools.cache
def adapters():
    """Adapters that change every weight they are for."""
    random = np.random.default_rng(6)
    shapes = adapter_shapes(CONFIG, ADAPTERS)
    return {path: random.normal(size=shape).astype(np.float32) * 0.2 for path, shape in shapes.items()}


@functools.cache
def masters():
    return {path: np.asarray(value) for path, value in oracle.dense(parameters()).items()}


def made_on(mesh_sizes, *, lora=None, quantize=False, update=None, dtype=jnp.float32, **options):
    mesh = training_mesh(make_mesh(**mesh_sizes))
    return make_program(
        CONFIG, mesh, lora=lora, quantize=quantize, dtype=dtype, update=update or optax.sgd(1.0), **options
    )


def placed(made, arrays, specs):
    return {path: jax.device_put(value, NamedSharding(made.mesh, specs[path])) for path, value in arrays.items()}


def compiled(function, *arguments):
    """Compiled for the CPU without optimizations: in a fifth of the time."""
    return function.lower(*arguments).compile(compiler_options={"xla_backend_optimization_level": 0})


def updated(made, trained, frozen, *, parts=1, batch=BATCH):
    state = made.start(placed(made, trained, made.trained_specs))
    arguments = state, placed(made, frozen, made.frozen_specs), made.place(batch, parts=parts)
    return compiled(made.compile_step(), *arguments)(*arguments)


def loss_and_gradients(made, trained, frozen, **options):
    """By one update of plain gradient descent at rate 1: the change is the gradient of the mean loss."""
    state, report = updated(made, trained, frozen, **options)
    assert int(state.step) == 1
    return report, {path: trained[path] - np.asarray(value) for path, value in state.trained.items()}


def assert_close(found, expected, *, tolerance=TOLERANCE):
    for path, value in expected.items():
        scale = np.abs(value).max()
        worst = np.abs(found[path] - value).max()
        assert worst <= tolerance * scale + 1e-7, f"{path}: {worst:.2e} of {scale:.2e}"
        assert scale > 1e-6 or path.endswith("key.bias"), f"{path} has no gradient: this cannot fail"


@functools.cache
def expected_of_adapters():
    weights = oracle.dense(parameters())

    def loss(changed):
        changed = oracle.merged(weights, changed, ADAPTERS)
        return oracle.loss_sum(changed, conversations(BATCH), CONFIG) / BATCH.weights.sum()

    return compiled(jax.jit(jax.value_and_grad(loss)), adapters())(adapters())


@functools.cache
def expected_of_masters(*, quantized=False, absent_rows=0):
    weights = {path: jnp.asarray(value) for path, value in masters().items()}
    if quantized:
        weights = {
            path: straight_through(jnp.asarray(value)) if path.endswith(("gate_up.weight", "down.weight")) else value
            for path, value in moved().items()
        }

    def loss(weights):
        found = oracle.loss_sum(weights, conversations(BATCH), CONFIG, absent_rows=absent_rows)
        return found / BATCH.weights.sum()

    return compiled(jax.jit(jax.value_and_grad(loss)), weights)(weights)


def moved():
    """Masters that are not MXFP4 values."""
    random = np.random.default_rng(7)
    return {
        path: (value * random.uniform(0.8, 1.2, value.shape)).astype(np.float32) for path, value in masters().items()
    }


@pytest.mark.parametrize("sizes", [{}, {"expert": 8}, {"data": 2, "expert": 2, "tensor": 2}], ids=str)
def test_adapters_have_the_oracles_gradients(sizes):
    report, gradients = loss_and_gradients(made_on(sizes, lora=ADAPTERS), adapters(), parameters())
    loss, expected = expected_of_adapters()
    assert float(report.loss) == pytest.approx(float(loss), rel=1e-5)
    assert_close(gradients, expected)


@pytest.mark.parametrize(("sizes", "size"), [({}, 32), ({}, 48), ({"tensor": 4}, 12)], ids=str)
def test_pieces_of_the_vocabulary_change_nothing(sizes, size, monkeypatch):
    """Of 128 rows: four pieces, or three of which the last is filled up; of each device's 32, three of odd length."""
    monkeypatch.setattr("gptoss_jax.finetune.loss._piece", lambda vocab_size, num_rows: size)
    report, gradients = loss_and_gradients(made_on(sizes), masters(), {})
    loss, expected = expected_of_masters()
    assert float(report.loss) == pytest.approx(float(loss), rel=1e-5)
    assert_close(gradients, expected)


@pytest.mark.parametrize(
    ("vocab_size", "num_rows", "size"), [(128, 64, 128), (201088, 8192, 3142), (200003, 8192, 4082)]
)
def test_pieces_divide_the_vocabulary_if_they_need_not_be_small(vocab_size, num_rows, size):
    """200,003 is a prime."""
    assert _piece(vocab_size, num_rows) == size


@pytest.mark.parametrize("sizes", [{}, {"data": 4, "expert": 2}, {"tensor": 4}], ids=str)
def test_masters_have_the_oracles_gradients(sizes):
    report, gradients = loss_and_gradients(made_on(sizes), masters(), {})
    loss, expected = expected_of_masters()
    assert float(report.loss) == pytest.approx(float(loss), rel=1e-5)
    assert_close(gradients, expected)


def test_parts_of_a_batch_add_up_to_the_batch():
    """Parts with different numbers of trained tokens: each token counts the same, whichever part it is in."""
    report, gradients = loss_and_gradients(made_on({}, lora=ADAPTERS), adapters(), parameters(), parts=4)
    loss, expected = expected_of_adapters()
    assert float(report.loss) == pytest.approx(float(loss), rel=1e-5)
    assert float(report.tokens) == BATCH.weights.sum()
    assert_close(gradients, expected)


def test_quantized_masters_are_trained_straight_through():
    report, gradients = loss_and_gradients(made_on({"data": 2, "expert": 2}, quantize=True), moved(), {})
    loss, expected = expected_of_masters(quantized=True)
    assert float(report.loss) == pytest.approx(float(loss), rel=1e-5)
    assert_close(gradients, expected)


def test_absent_rows_of_the_vocabulary_are_in_the_softmax():
    # So many that they matter beside logits of the size that random weights give.
    rows = 10**9
    report, gradients = loss_and_gradients(made_on({"expert": 2}, absent_rows=rows), masters(), {})
    loss, expected = expected_of_masters(absent_rows=rows)
    assert float(loss) > float(expected_of_masters()[0]) + 0.1
    assert float(report.loss) == pytest.approx(float(loss), rel=1e-5)
    assert_close(gradients, expected)


def test_rows_of_padding_change_nothing():
    padded = jax.tree.map(lambda leaf: np.pad(leaf, ((0, 2), (0, 0))), BATCH)
    report, gradients = loss_and_gradients(made_on({}, lora=ADAPTERS), adapters(), parameters(), batch=padded)
    plain, expected = loss_and_gradients(made_on({}, lora=ADAPTERS), adapters(), parameters())
    assert float(report.loss) == pytest.approx(float(plain.loss), rel=1e-6)
    np.testing.assert_array_equal(report.expert_counts, plain.expert_counts)
    assert_close(gradients, expected, tolerance=1e-5)


def test_routers_balance_is_measured_and_trained():
    """The auxiliary loss of one layer, from the oracle's own router, and its gradient by finite differences."""
    balanced = made_on({"data": 2}, balance=0.5)
    report, gradients = loss_and_gradients(balanced, masters(), {})
    plain, without = loss_and_gradients(made_on({}), masters(), {})
    path = "layers.1.router.bias"
    direction = np.zeros_like(masters()[path])
    direction[np.argmax(np.abs(gradients[path] - without[path]))] = 1.0
    step = 1e-2

    evaluate = balanced.compile_evaluation()

    def balance(sign):
        shifted = masters() | {path: masters()[path] + sign * step * direction}
        trained = placed(balanced, shifted, balanced.trained_specs)
        sums = evaluate(trained, {}, balanced.place(BATCH, parts=1))
        return float(sums.balance / sums.tokens)

    real = (BATCH.segments > 0).sum()
    assert float(report.balance) == pytest.approx(float(plain.balance), rel=1e-5)
    np.testing.assert_array_equal(report.expert_counts.sum(axis=1), real * CONFIG.experts_per_token)
    slope = (balance(1) - balance(-1)) / (2 * step)
    found = ((gradients[path] - without[path]) * direction).sum() / 0.5
    assert found == pytest.approx(slope, rel=0.05)


def test_bfloat16_is_near_float32():
    report, gradients = loss_and_gradients(made_on({}, lora=ADAPTERS, dtype=jnp.bfloat16), adapters(), parameters())
    loss, expected = expected_of_adapters()
    assert float(report.loss) == pytest.approx(float(loss), rel=0.02)
    path = "layers.1.experts.down.lora_b"
    correlation = np.corrcoef(gradients[path].reshape(-1), expected[path].reshape(-1))[0, 1]
    assert correlation > 0.97


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_lowers_the_loss_and_its_moments_are_split_as_the_masters(name):
    rule = optimizer(FineTuning(optimizer=name, learning_rate=3e-3, schedule="constant", clip_norm=1e9), 4)
    made = made_on({"data": 2, "expert": 4}, update=rule)
    state = made.start(placed(made, masters(), made.trained_specs))
    batch = made.place(BATCH, parts=1)
    step = compiled(made.compile_step(), state, {}, batch)
    before = jax.tree.map(lambda leaf: leaf.sharding, state)
    reports = []
    for _ in range(3):
        state, report = step(state, {}, batch)
        reports.append(float(report.loss))
    assert reports[2] < reports[0]
    assert before == jax.tree.map(lambda leaf: leaf.sharding, state), "another program for the second update"
    path = "layers.0.experts.gate_up.weight"
    part = state.trained[path].addressable_shards[0].data
    assert part.size * 8 == state.trained[path].size
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == state.trained[path].shape]
    assert len(moments) == 2 * {"adamw": 2, "lion": 1, "adafactor": 1, "sgd": 0}[name]
    assert all(moment.addressable_shards[0].data.shape == part.shape for moment in moments)
