"""The programs of the gate, compiled for one to eight H200s from shapes alone: a step, a chunk of prefill, an update.

`python -m tests.gpu_gate.programs NAME RESULT.json` compiles one of them at two depths, in a process of its own, so
that what ptxas says on the standard output belongs to it.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from gptoss_jax.bench.launches import Launch, count, program_launches, step_launches
from gptoss_jax.config import gpt_oss_20b
from gptoss_jax.finetune.settings import Method
from gptoss_jax.generation.generate import PREFILL_TOKENS
from gptoss_jax.generation.sampling import Sampling
from gptoss_jax.plan.collectives import Collective, program_collectives, step_collectives
from gptoss_jax.plan.programs import DRAWN, abstract_cache, abstract_model, lowered_decode, lowered_prefill
from gptoss_jax.plan.topologies import find
from tests.gpu_gate.limits import MESHES
from tests.gpu_gate.training import lowered_update

DEPTHS = (2, 4)
"""Layers: as many sliding as full ones. The difference is what layers cost, the rest what the step costs once."""
_METHODS: dict[str, Method] = {"train": "lora", "full": "full"}
_WHOLE = ("prefill", *_METHODS)
"""Programs that are a step, not a loop of steps."""
_CONTEXT = 1088
_TOKENS = PREFILL_TOKENS["hopper"]


def compiled(name: str, depth: int, mesh: Mesh) -> Any:
    """The program called `name`, of the 20b at full width with `depth` layers."""
    kind, number, *_ = name.split("-")
    config = gpt_oss_20b().first_layers(depth)
    if kind in _METHODS:
        return lowered_update(config, mesh, method=_METHODS[kind], sequence_length=int(number)).compile()
    model = abstract_model(config, mesh)
    if kind == "prefill":
        length = int(number)
        cache = abstract_cache(model, batch=1, max_length=length, max_chunk=_TOKENS)
        return lowered_prefill(model, cache, length).compile()
    batch = int(number)
    cache = abstract_cache(model, batch=batch, max_length=_CONTEXT, max_chunk=_TOKENS // batch)
    return lowered_decode(model, cache, DRAWN if kind == "draw" else Sampling(temperature=0.0)).compile()


def figures(name: str) -> dict[str, Any]:
    """Launches a layer and outside of the layers, temporaries of the deeper program, and the list of its launches."""
    _, _, *mesh_name = name.split("-", 2)
    axes = MESHES["".join(mesh_name)]
    mesh = find(f"h200:{math.prod(axes.values())}").mesh(**axes)
    programs = [compiled(name, depth, mesh) for depth in DEPTHS]
    listed = [_launches(name, program.as_text()) for program in programs]
    shallow, deep = (count(launches) for launches in listed)
    per_layer = (deep - shallow) / (DEPTHS[1] - DEPTHS[0])
    sent = _collectives(name, programs[1].as_text())
    return {
        "collectives_per_layer": sum(collective.per_layer for collective in sent),
        "collectives_outside": sum(collective.count - DEPTHS[1] * collective.per_layer for collective in sent),
        "launches_per_layer": per_layer,
        "launches_outside": shallow - DEPTHS[0] * per_layer,
        "temporary_bytes": programs[1].memory_analysis().temp_size_in_bytes,
        "list": [dataclasses.asdict(launch) for launch in listed[0]],
    }


def _launches(name: str, text: str) -> list[Launch]:
    return program_launches(text) if name.startswith(_WHOLE) else step_launches(text)


def _collectives(name: str, text: str) -> list[Collective]:
    read = program_collectives if name.startswith(_WHOLE) else step_collectives
    return read(text, DEPTHS[1])


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(figures(sys.argv[1])))
