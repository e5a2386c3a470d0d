"""The shortest time of a step on a mesh: each stage's work divided as the mesh divides it, at the chip's own rates."""

import functools
import math
from collections.abc import Callable

from jax.sharding import Mesh

from gptoss_jax.bench.roofline import STAGES, Stage, Work, decode_work, prefill_work
from gptoss_jax.config import ModelConfig
from gptoss_jax.sharding import MODEL_AXES, head_axes

_HEADS: tuple[Stage, ...] = ("qkv", "attention", "output")
_ALL: tuple[Stage, ...] = ("experts", "unembedding")


def decode_floor(config: ModelConfig, mesh: Mesh, *, batch: int, context: int) -> Work:
    """One device's part of a decode step. Of the experts that all rows chose, each device has an equal part.

    Example:
        >>> from gptoss_jax.config import gpt_oss_20b
        >>> from gptoss_jax.sharding import make_mesh
        >>> work = decode_floor(gpt_oss_20b(), make_mesh(), batch=8, context=1024)
        >>> work.bytes == decode_work(gpt_oss_20b(), batch=8, context=1024).bytes
        True
    """
    rows = batch // mesh.shape["data"]
    return _divided(functools.partial(decode_work, config, batch=rows, context=context), config, mesh)


def prefill_floor(config: ModelConfig, mesh: Mesh, *, batch: int, num_tokens: int) -> Work:
    """One device's part of the first chunk of prompts, `num_tokens` of each row."""
    rows = batch // mesh.shape["data"]
    return _divided(functools.partial(prefill_work, config, num_rows=rows, num_tokens=num_tokens), config, mesh)


def _divided(work: Callable[..., Work], config: ModelConfig, mesh: Mesh) -> Work:
    """Heads are shared by the devices of their axes, experts and vocabulary by those of both; the router by none."""
    shared_by = dict.fromkeys(_HEADS, head_axes(config.num_kv_heads, mesh)) | dict.fromkeys(_ALL, MODEL_AXES)
    whole, total = work(), work(without=STAGES)  # what belongs to no stage is nobody's alone
    for stage in STAGES:
        devices = math.prod(mesh.shape[axis] for axis in shared_by.get(stage, ()))
        total += (whole - work(without=(stage,))) / devices
    return total
