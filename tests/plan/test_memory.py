"""Bytes: what plan says of weights and cache is what the compiled programs are called with."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.model.transformer import leaves
from gptoss_jax.plan.memory import argument_bytes, shard_bytes
from gptoss_jax.plan.points import Planner, Point
from gptoss_jax.plan.programs import abstract_model
from gptoss_jax.sharding import make_mesh
from tests.plan.devices import SMALL, cpus
from tests.tiny import random_model

BATCH, CONTEXT = 4, 200


@pytest.fixture(scope="module", params=[{}, {"data": 4, "tensor": 2}], ids=["1 device", "8 devices"])
def planned(request: pytest.FixtureRequest) -> tuple[Planner, Point]:
    topology = cpus(8)
    planner = Planner(SMALL, topology, topology.mesh(**request.param))
    return planner, planner.point(batch=BATCH, context=CONTEXT)


def test_weights_and_cache_are_the_programs_arguments(planned: tuple[Planner, Point]) -> None:
    planner, point = planned
    rows = BATCH // planner.mesh.shape["data"]
    prefill, decode = point.steps["prefill"].usage, point.steps["decode"].usage
    tokens_and_counts = rows * point.chunk * 4 + rows * 4
    assert point.weights + point.cache + tokens_and_counts == prefill.arguments
    assert prefill.other_arguments == tokens_and_counts
    assert 0 < decode.other_arguments < 1000  # a few numbers for each row
    assert point.weights == planner.weights
    assert point.weights + point.cache == planner.held(batch=BATCH, context=CONTEXT)


def test_cache_is_donated(planned: tuple[Planner, Point]) -> None:
    _, point = planned
    logits = BATCH * SMALL.vocab_size * 4
    assert point.steps["prefill"].usage.results <= logits + 1000


def test_weights_are_those_of_a_model_that_is_there() -> None:
    mesh = make_mesh(data=4, tensor=2)
    model = random_model(SMALL, mesh=mesh, dtype=jnp.bfloat16)
    first = mesh.devices.flat[0]
    there = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(model)
        for shard in leaf.addressable_shards
        if shard.device == first
    )
    assert shard_bytes(abstract_model(SMALL, mesh)) == there
    assert there < sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves(model).values())


def test_arrays_on_a_tpu_fill_whole_tiles() -> None:
    mesh = make_mesh(data=2)
    leaf = jax.ShapeDtypeStruct((20, 3, 100), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))

    def size(*tiling: tuple[int, ...], order: tuple[int, ...] = (0, 1, 2)) -> int:
        layout = SimpleNamespace(major_to_minor=order, tiling=tiling)
        return argument_bytes([leaf], [SimpleNamespace(layout=layout)])

    assert size() == shard_bytes([leaf]) == 10 * 3 * 100 * 2
    assert size((8, 128), (2, 1)) == 10 * 8 * 128 * 2
    assert size((8, 128), (2, 1), order=(1, 0, 2)) == 3 * 16 * 128 * 2
    assert argument_bytes([leaf], [SimpleNamespace(layout=None)]) == 6000
