"""Settings every test shares: eight CPU devices, and no silent promotion between dtypes.

They are made before JAX starts, so this file sets the environment rather than a fixture.
"""

import io
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from convert.converter import convert
from convert.synthetic import MODELS, write_checkpoint
from gptoss_jax.demo import make_checkpoint
from gptoss_jax.model.transformer import Transformer
from tests.tiny import random_model

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_dropped() -> Iterator[None]:
    """Unload what a module compiled: programs of all tests have more memory maps than Linux gives to one process.

    XLA for the CPU crashes at the limit (vm.max_map_count, 65530), as it compiles.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_model() -> Transformer:
    """The tiny model in float32 on one device, with seeded random weights."""
    return random_model(seed=3)


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint of random weights and the real vocabulary, beside the published one it is made of."""
    folder = tmp_path_factory.mktemp("demo")
    write_checkpoint(folder / "published", MODELS["tiny"](), seed=4)
    convert(folder / "published", folder / "converted", progress=io.StringIO())
    return folder / "converted"


@pytest.fixture(scope="session")
def trained_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model that is shipped, converted."""
    return make_checkpoint(tmp_path_factory.mktemp("trained") / "demo")
