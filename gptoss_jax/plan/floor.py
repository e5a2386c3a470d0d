"""The shortest time of a step on a mesh: each stage's work divided as the mesh divides it, at the chip's own rates."""

import functools
from collections.abc import Callable

from jax.sharding import Mesh

from gptoss_jax.bench.roofline import STAGES, Stage, Work, decode_work, prefill_work
from gptoss_jax.config import ModelConfig

_AXES: dict[Stage, tuple[str, ...]] = {
    "qkv": ("tensor",),
    "attention": ("tensor",),
    "output": ("tensor",),
    "router": (),
    "experts": ("expert", "tensor"),
    "unembedding": ("expert", "tensor"),
}
"""The mesh axes, beside `data` for the rows, over which devices share a stage's work."""


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
    return _divided(functools.partial(decode_work, config, batch=rows, context=context), mesh)


def prefill_floor(config: ModelConfig, mesh: Mesh, *, batch: int, num_tokens: int) -> Work:
    """One device's part of the first chunk of prompts, `num_tokens` of each row."""
    rows = batch // mesh.shape["data"]
    return _divided(functools.partial(prefill_work, config, num_rows=rows, num_tokens=num_tokens), mesh)


def _divided(work: Callable[..., Work], mesh: Mesh) -> Work:
    whole, total = work(), work(without=STAGES)  # what belongs to no stage is nobody's alone
    for stage in STAGES:
        devices = 1
        for axis in _AXES[stage]:
            devices *= mesh.shape[axis]
        total += (whole - work(without=(stage,))) / devices
    return total
