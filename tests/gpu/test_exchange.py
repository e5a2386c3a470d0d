"""Sums through other GPUs' memory: exactly those of plain additions, the same bits everywhere, many times over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.sharding import DEVICES, MODEL_AXES, make_mesh
from pallas_kernels.exchange import Mailbox, Parts, add_parts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        jax.default_backend() == "cpu" or jax.device_count() < 2, reason="needs two GPUs that reach each other's memory"
    ),
]

D, TURNS = 2880, 50


@pytest.mark.parametrize("num_tokens", [1, 8, 33, 128])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["all parts", "parts of experts here"])
def test_sums_are_exact_and_equal_everywhere(num_tokens, elsewhere):
    """Whole numbers, so that no order of additions rounds; each turn of the loop adds to what the last one made."""
    mesh = make_mesh(expert=2)
    random = np.random.default_rng(num_tokens)
    values = random.integers(-3, 4, (2, num_tokens, 4, D)).astype(np.float32)
    ids = random.integers(0, 8, (num_tokens, 4)).astype(np.int32)
    bias = random.integers(-3, 4, D).astype(np.float32)

    def place(array, spec):
        return jax.device_put(array, NamedSharding(mesh, spec))

    def turn(parts, stream, bias, mailboxes):
        first = (4 * jax.lax.axis_index("expert")).reshape(1)
        there = Parts(parts[0], ids, first, count=4) if elsewhere else Parts(parts[0])
        for _ in range(3):  # an odd number: both buffers of a pair begin a turn
            stream, mailboxes = add_parts(there, stream % 4, bias, axes=MODEL_AXES, mailboxes=mailboxes)
        return stream, {axes: mailbox.settled() for axes, mailbox in mailboxes.items()}

    @jax.jit
    def run(parts, stream, bias, mailboxes):
        mailboxes = jax.shard_map(
            lambda boxes: {axes: box.met(axes) for axes, box in boxes.items()},
            mesh=mesh,
            in_specs=DEVICES,
            out_specs=DEVICES,
            check_vma=False,
        )(mailboxes)
        each = jax.shard_map(
            turn, mesh=mesh, in_specs=(DEVICES, P(), P(), DEVICES), out_specs=(P(), DEVICES), check_vma=False
        )
        return jax.lax.fori_loop(0, TURNS, lambda _, state: each(parts, state[0], bias, state[1]), (stream, mailboxes))

    shape = Mailbox.shape(num_tokens, D, senders=2)
    boxes = jax.tree.map(lambda leaf: place(np.zeros((2, *leaf.shape[1:]), leaf.dtype), DEVICES), shape)
    stream, mailboxes = run(
        place(values, DEVICES),
        place(np.zeros((num_tokens, D), jnp.bfloat16), P()),
        place(bias.astype(jnp.bfloat16), P()),
        {MODEL_AXES: boxes},
    )
    added = values.sum(axis=(0, 2))
    if elsewhere:
        added = sum((values[device] * ((ids // 4) == device)[..., None]).sum(axis=1) for device in range(2))
    expected = np.zeros((num_tokens, D), np.float32)
    for _ in range(3 * TURNS):
        expected = expected % 4 + added + bias
    for shard in stream.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data, np.float32), expected)
    assert mailboxes[MODEL_AXES].number.tolist() == [3 * TURNS] * 2
