"""Deliberate faults in a model, each in one part of the architecture, in a float32 model on the CPU.

A fault of the config is made in a copy of the checkpoint's config.json, one of the parameters in the loaded model, and
that of the router in the one function that chooses experts.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import gptoss_jax
from gptoss_jax.config import ModelConfig
from gptoss_jax.manifest import CONFIG
from gptoss_jax.model import layers
from gptoss_jax.model.transformer import Transformer
from pallas_kernels.projections import reference

MISLEADING = ("interleaving", "window", "yarn")
"""With one of these the shipped model answers wrong."""
SUBTLE = ("sinks", "router")
"""With one of these it answers right, being too sure of its words; only numbers tell (docs/demo.md)."""
FAULTS = (*MISLEADING, *SUBTLE)


@contextmanager
def faulty(checkpoint: Path, fault: str, folder: Path) -> Iterator[Transformer]:
    """The model of a converted checkpoint with a fault; `folder` is a new directory for what that takes."""
    with pytest.MonkeyPatch.context() as patch:
        changes = {"window": {"sliding_window": 8192}, "yarn": {"rope_factor": 1.0}}.get(fault, {})
        model = gptoss_jax.load(_changed(checkpoint, folder, **changes), dtype="float32")
        for layer in model.layers:
            if fault == "sinks":
                _set(layer.attention.sinks, jnp.full_like(layer.attention.sinks[...], -1e9))
            if fault == "interleaving":
                packed = layer.experts.gate_up
                for part in (packed.blocks, packed.scales, packed.bias):
                    _set(part, _halves(part[...]))
        if fault == "router":
            patch.setattr(layers, "route", _over_all_experts)
            jax.clear_caches()  # programs that were compiled without the fault
        yield model
    if fault == "router":
        jax.clear_caches()


def _set(parameter: nnx.Param, value: jax.Array) -> None:
    parameter.set_value(jax.device_put(value, parameter[...].sharding))


def _halves(rows: jax.Array) -> jax.Array:
    """Gate and up rows as all gates, then all ups, where the model has them in turn."""
    return jnp.concatenate([rows[:, ::2], rows[:, 1::2]], axis=1)


def _over_all_experts(x, norm_scale, weight, bias, *, eps, experts_per_token, impl):
    """As `route`, but the shares of the chosen experts are of the softmax over all of them."""
    normed, expert_ids, _ = reference.route(x, norm_scale, weight, bias, eps=eps, experts_per_token=experts_per_token)
    shares = jax.nn.softmax(reference.multiply(normed, weight) + bias.astype(jnp.float32), axis=-1)
    return normed, expert_ids, jnp.take_along_axis(shares, expert_ids, axis=-1)


def _changed(checkpoint: Path, folder: Path, **changes: float) -> Path:
    """The checkpoint with another config."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / CONFIG).unlink()
    config = dataclasses.replace(ModelConfig.read(checkpoint / CONFIG), **changes)
    (folder / CONFIG).write_text(json.dumps(config.to_json()))
    return folder
