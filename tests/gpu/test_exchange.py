"""Sums through other GPUs' memory: exactly those of plain additions, the same bits everywhere, many times over."""

import math

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

D, TURNS, EXPERTS = 2880, 50, 8
MESHES = {"two": {"expert": 2}, "four": {"expert": 4}, "eight": {"expert": 8}, "two by two": {"data": 2, "expert": 2}}


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("num_tokens", [1, 8, 33, 128])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["all parts", "parts of experts here"])
def test_sums_are_exact_and_equal_everywhere(axes: dict[str, int], num_tokens: int, elsewhere: bool) -> None:
    """Whole numbers, so that no order of additions rounds; each turn of the loop adds to what the last one made."""
    if math.prod(axes.values()) > jax.device_count():
        pytest.skip(f"{jax.device_count()} devices")
    mesh = make_mesh(**axes)
    groups, size = axes.get("data", 1), axes["expert"]
    held = EXPERTS // size
    random = np.random.default_rng(num_tokens)
    values = random.integers(-3, 4, (mesh.size, num_tokens, 4, D)).astype(np.float32)
    ids = random.integers(0, EXPERTS, (num_tokens, 4)).astype(np.int32)
    bias = random.integers(-3, 4, D).astype(np.float32)

    def place(array, spec):
        return jax.device_put(array, NamedSharding(mesh, spec))

    def turn(parts, stream, bias, mailboxes):
        first = (held * jax.lax.axis_index("expert")).reshape(1)
        there = Parts(parts[0], ids, first, count=held) if elsewhere else Parts(parts[0])
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
            turn,
            mesh=mesh,
            in_specs=(DEVICES, P("data"), P(), DEVICES),
            out_specs=(P("data"), DEVICES),
            check_vma=False,
        )
        return jax.lax.fori_loop(0, TURNS, lambda _, state: each(parts, state[0], bias, state[1]), (stream, mailboxes))

    shape = Mailbox.shape(num_tokens, D, senders=size)
    boxes = jax.tree.map(lambda leaf: place(np.zeros((mesh.size, *leaf.shape[1:]), leaf.dtype), DEVICES), shape)
    stream, mailboxes = run(
        place(values, DEVICES),
        place(np.zeros((groups * num_tokens, D), jnp.bfloat16), P("data")),
        place(bias.astype(jnp.bfloat16), P()),
        {MODEL_AXES: boxes},
    )
    parts = values.reshape(groups, size, num_tokens, 4, D)
    if elsewhere:
        parts = parts * (ids // held == np.arange(size)[:, None, None])[..., None]
    added = parts.sum(axis=(1, 3)).reshape(groups * num_tokens, D)
    expected = np.zeros_like(added)
    for _ in range(3 * TURNS):
        expected = expected % 4 + added + bias
    for shard in stream.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data, np.float32), expected[shard.index])
    mailed = shape.holds(num_tokens, D, senders=size)  # else it was the compiler's all-reduce
    assert mailboxes[MODEL_AXES].number.tolist() == [3 * TURNS * mailed] * mesh.size
