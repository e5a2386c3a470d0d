"""One process of test_generation: restore a checkpoint onto each mesh, generate, and write down what came out."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

import gptoss_jax as gj
from gptoss_jax import distributed
from gptoss_jax.sharding import fetch

PROMPTS = [[1, 2, 3, 4, 5], [7, 8], [9] * 20]
SAMPLING = [gj.Sampling(temperature=0.0), gj.Sampling(seed=1), gj.Sampling()]
"""The last row's seed is drawn."""
MAX_NEW_TOKENS = 6


def results(checkpoint: Path, *, order: list[int] | None = None, **axes: int) -> dict[str, Any]:
    """What the model does on the mesh of these axes over the devices, taken in this order."""
    devices = order and [jax.devices()[index] for index in order]
    before = bytes_read()
    model = gj.load(checkpoint, mesh=gj.make_mesh(**axes, devices=devices), dtype=jnp.float32)
    read = bytes_read() - before
    completions = gj.generate(model, PROMPTS, SAMPLING, max_new_tokens=MAX_NEW_TOKENS)
    found = {"bytes read": read, "ids": [completion.ids for completion in completions]}
    if "expert" not in axes:
        rows = np.array(PROMPTS[:1] * 2, np.int32)
        found["logits"] = fetch(model(rows), model.mesh).tolist()
    return found


def bytes_read() -> int:
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


if __name__ == "__main__":
    checkpoint, output, meshes, coordinator, process_id = sys.argv[1:]
    distributed.initialize(coordinator, 2, int(process_id))
    Path(output).write_text(json.dumps([results(Path(checkpoint), **mesh) for mesh in json.loads(meshes)]))
