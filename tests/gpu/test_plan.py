"""What a plan says of the GPU that is there, against a run: `pytest -m gpu tests/gpu/test_plan.py`."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

from gptoss_jax.bench.weights import random_model
from gptoss_jax.config import gpt_oss_20b
from gptoss_jax.generation.generate import generate
from gptoss_jax.generation.sampling import Sampling
from gptoss_jax.plan.points import Planner
from gptoss_jax.plan.topologies import PRESENT, find

pytestmark = pytest.mark.gpu
log = logging.getLogger(__name__)

BATCH, CONTEXT, NEW = 64, 8192, 17


def test_predicted_memory_is_within_five_per_cent_of_what_a_run_takes():
    config, topology = gpt_oss_20b(), find(PRESENT)
    point = Planner(config, topology, topology.mesh()).point(batch=BATCH, context=CONTEXT)
    model = random_model(config)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (BATCH, CONTEXT - NEW + 1), np.int32)
    generate(model, list(prompts), Sampling(seed=1), max_new_tokens=NEW, stop_ids=())
    statistics = jax.devices()[0].memory_stats()
    peak = statistics["peak_bytes_in_use"]
    log.info(
        "predicted %.3f GB, taken %.3f GB, JAX may take %.2f GB",
        point.needed / 1e9,
        peak / 1e9,
        statistics["bytes_limit"] / 1e9,
    )
    assert topology.memory_bytes == statistics["bytes_limit"]
    assert abs(point.needed / peak - 1) < 0.05


def test_plan_of_the_gpu_present_is_that_of_the_table():
    present = find(PRESENT)
    name = next((name for name in ("h100:1", "h200:1") if find(name).chip == present.chip), None)
    if name is None:
        pytest.skip(f"{present.chip.name} is in no table")
    config = gpt_oss_20b().first_layers(2)
    limit = min(present.memory_bytes, find(name).memory_bytes)
    assert max(present.memory_bytes, find(name).memory_bytes) < 1.01 * limit
    here, there = (
        Planner(config, dataclasses.replace(topology, memory_bytes=limit), topology.mesh()).point(batch=8, context=2048)
        for topology in (present, find(name))
    )
    assert (here.weights, here.cache, here.chunk) == (there.weights, there.cache, there.chunk)
    assert abs(here.needed / there.needed - 1) < 0.02
