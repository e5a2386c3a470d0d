"""Random weights follow the recipe, and do not depend on where they are drawn."""

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.bench.weights import random_model
from gptoss_jax.model.transformer import Transformer, abstract, leaves
from gptoss_jax.sharding import make_mesh
from tests.tiny import TINY


def arrays(model: Transformer) -> dict[str, np.ndarray]:
    from flax import nnx

    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray]:
    return arrays(random_model(TINY, dtype=jnp.float32))


def test_recipe(drawn: dict[str, np.ndarray]) -> None:
    deviations = {"embedding.weight": 1, "unembedding.weight": 0.02, "layers.0.attention.query.weight": 0.02}
    for path, deviation in deviations.items():
        assert drawn[path].std() == pytest.approx(deviation, rel=0.05), path
        assert abs(drawn[path].mean()) < 0.05 * deviation
    assert (drawn["layers.2.router.bias"] == 0).all()
    assert (drawn["layers.1.attention_norm.scale"] == 1).all()
    assert set(np.unique(drawn["layers.3.experts.down.scales"])) == {119, 120}
    codes = drawn["layers.3.experts.gate_up.blocks"]
    assert np.bincount(codes.ravel(), minlength=256).min() > 0.6 * codes.size / 256
    assert not np.array_equal(codes, drawn["layers.2.experts.gate_up.blocks"])


def test_every_parameter_is_as_the_model_says() -> None:
    found = arrays(random_model(TINY))
    expected = leaves(abstract(TINY))
    assert {path: (array.shape, array.dtype) for path, array in found.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in expected.items()
    }


def test_mesh_changes_nothing(drawn: dict[str, np.ndarray]) -> None:
    spread = arrays(random_model(TINY, dtype=jnp.float32, mesh=make_mesh(data=2, tensor=2)))
    assert spread.keys() == drawn.keys()
    assert all(np.array_equal(spread[path], drawn[path]) for path in drawn)


def test_seed_matters(drawn: dict[str, np.ndarray]) -> None:
    other = arrays(random_model(TINY, dtype=jnp.float32, seed=1))
    assert not np.array_equal(other["embedding.weight"], drawn["embedding.weight"])
