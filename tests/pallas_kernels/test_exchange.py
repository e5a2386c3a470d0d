"""Sums over devices: what the compiler's all-reduce adds up on the CPU, and what a mailbox takes. The kernel itself is
inline PTX and reaches into other devices' memory: tests/gpu/test_exchange.py runs it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.sharding import AXES, DEVICES, MODEL_AXES, make_mesh
from pallas_kernels.exchange import MOST_TOKENS, Mailbox, Parts, add_parts

T, S, D = 3, 2, 8


def draw(shape: tuple[int, ...], seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def place(array: jax.Array, mesh: Mesh, *axes: tuple[str, ...]) -> jax.Array:
    return jax.device_put(array, NamedSharding(mesh, P(*axes)))


@pytest.mark.parametrize("axes", [("tensor",), MODEL_AXES], ids=["tensor", "model"])
@pytest.mark.parametrize("biased", [False, True])
def test_every_device_gets_the_stream_with_the_parts_of_its_group(axes, biased):
    mesh = make_mesh(data=2, expert=2, tensor=2)
    parts, residual, bias = draw((8, T, S, D), 0), draw((T, D), 1), draw((D,), 2)

    def run(parts, residual, bias):
        stream, mailboxes = add_parts(Parts(parts[0]), residual, bias if biased else None, axes=axes, mailboxes={})
        assert mailboxes == {}
        return stream[None]

    summed = jax.shard_map(run, mesh=mesh, in_specs=(DEVICES, P(), P()), out_specs=DEVICES, check_vma=False)(
        place(parts, mesh, AXES), place(residual, mesh), place(bias, mesh)
    )
    grid = np.asarray(parts.sum(axis=2)).reshape(2, 2, 2, T, D)
    along = tuple({"expert": 1, "tensor": 2}[axis] for axis in axes)
    total = np.broadcast_to(grid.sum(axis=along, keepdims=True), grid.shape).reshape(8, T, D)
    np.testing.assert_allclose(summed, residual + total + (bias if biased else 0), rtol=1e-5, atol=1e-6)


def test_parts_of_experts_elsewhere_do_not_count_whatever_they_hold():
    values = draw((T, S, D), 0).at[1, 0].set(jnp.nan)
    parts = Parts(values, ids=jnp.array([[4, 5], [2, 4], [6, 5]]), first=jnp.array([4]), count=2)
    expected = [values[0].sum(axis=0), values[1, 1], values[2, 1]]
    np.testing.assert_allclose(parts.total(), jnp.stack(expected), rtol=1e-6)


@pytest.mark.parametrize(
    ("num_tokens", "senders", "holds"),
    [
        (MOST_TOKENS, 2, True),
        (MOST_TOKENS + 1, 2, False),
        (MOST_TOKENS, 3, True),
        (MOST_TOKENS, 4, False),
        (36, 8, True),
    ],
)
def test_a_mailbox_holds_what_fits_and_is_small_enough_to_go_to_all(num_tokens, senders, holds):
    mailbox = Mailbox.shape(MOST_TOKENS, D, senders=8)
    assert mailbox.holds(num_tokens, D, senders=senders) is holds
    assert not mailbox.holds(1, D, senders=9)


def test_a_mailbox_counts_the_sums_it_was_used_for():
    mailbox = Mailbox(jnp.zeros((1, 2, 2, 4), jnp.uint32), jnp.array([5], jnp.int32))
    twice = functools.reduce(lambda box, _: box.used(box.boxes), range(2), mailbox)
    assert twice.calls == 2
    settled = twice.settled()
    assert (settled.calls, settled.number.tolist()) == (0, [7])


def test_devices_that_meet_agree_on_the_number():
    mesh = make_mesh(expert=2, tensor=2)
    boxes = place(jnp.zeros((4, 2, 4, 1), jnp.uint32), mesh, AXES)
    met = jax.shard_map(
        lambda mailbox: mailbox.met(MODEL_AXES), mesh=mesh, in_specs=DEVICES, out_specs=DEVICES, check_vma=False
    )(Mailbox(boxes, place(jnp.array([3, 3, 3, 3], jnp.int32), mesh, AXES)))
    assert met.number.tolist() == [3, 3, 3, 3]
