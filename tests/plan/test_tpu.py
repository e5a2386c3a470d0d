"""Plans for TPUs, where libtpu is installed: bytes against the compiler's own, and what it says a device has."""

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest

from gptoss_jax.plan.chips import TPUS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="no compiler for TPUs: install the extra `tpu`"
    ),
]


def answer(script: str) -> Any:
    """What the script prints, in a process of its own: libtpu stays in memory."""
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_weights_and_cache_are_the_programs_arguments_tiles_included() -> None:
    plan = answer("""if True:
        import dataclasses, json
        from gptoss_jax.config import gpt_oss_20b
        from gptoss_jax.plan.points import Planner
        from gptoss_jax.plan.topologies import find

        topology = find("v5e:2x2")
        planner = Planner(gpt_oss_20b().first_layers(2), topology, topology.mesh(expert=4))
        print(json.dumps(dataclasses.asdict(planner.point(batch=8, context=1024)) | {"held": planner.weights}))
    """)
    usage = plan["steps"]["prefill"]["usage"]
    tokens, counts = 8 * 256 * 4, 128 * 4
    assert plan["chunk"] == 256
    assert usage["other_arguments"] == tokens + counts, "the rest of what the compiler counts"
    assert plan["held"] < plan["weights"] < 1.02 * plan["held"]
    for step in plan["steps"].values():
        assert 0 < step["estimated_seconds"] < 0.1
        assert step["usage"]["code"] > 0
        layers = [found for found in step["collectives"] if found["per_layer"]]
        assert [(found["kind"], found["count"]) for found in layers] == [("all-reduce", 5)]


def test_two_threads_find_topologies_at_the_same_time() -> None:
    """JAX asks whether libtpu is loaded and then loads it, once; here it takes its time in between."""
    found = answer("""if True:
        import json, time
        from concurrent.futures import ThreadPoolExecutor
        from jaxlib import xla_client
        from gptoss_jax.plan.topologies import find

        is_loaded = xla_client.pjrt_plugin_loaded
        xla_client.pjrt_plugin_loaded = lambda name: is_loaded(name) or time.sleep(0.2)
        with ThreadPoolExecutor(2) as pool:
            print(json.dumps([topology.name for topology in pool.map(find, ["v5e:2x2", "v5p:2x2x1"])]))
    """)
    assert found == ["v5e:2x2", "v5p:2x2x1"]


def test_memory_of_each_generation_is_what_its_compiler_says() -> None:
    said = answer("""if True:
        import json, re
        import jax
        from jax.sharding import NamedSharding, PartitionSpec
        from gptoss_jax.plan.topologies import SLICES, find

        said = {}
        for generation, shapes in SLICES.items():
            place = NamedSharding(find(f"{generation}:{shapes[1]}").mesh(), PartitionSpec())
            huge = jax.ShapeDtypeStruct((2**28, 1024), "bfloat16", sharding=place)
            try:
                jax.jit(lambda x: 2 * x).lower(huge).compile()
            except jax.errors.JaxRuntimeError as error:
                said[generation] = float(re.search(r"available HBM \\(([0-9.]+)G\\)", str(error)).group(1))
        print(json.dumps(said))
    """)
    assert said == {name: round(chip.memory_bytes / 2**30, 2) for name, chip in TPUS.items()}
