"""Run, shard, study and fine-tune OpenAI's gpt-oss models in JAX, with the experts kept in MXFP4.

Names are imported on first use, so that importing the package, or asking the command line for help, does not wait
for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptoss_jax.chat import Chat
    from gptoss_jax.checkpoint import load
    from gptoss_jax.config import ModelConfig, gpt_oss_20b, gpt_oss_120b
    from gptoss_jax.finetune.settings import FineTuning
    from gptoss_jax.finetune.trainer import fine_tune
    from gptoss_jax.generation.follow import dismiss, follow
    from gptoss_jax.generation.generate import Completion, Token, generate, stream
    from gptoss_jax.generation.sampling import Sampling, SamplingRows
    from gptoss_jax.generation.steps import decode, prefill, start
    from gptoss_jax.model.cache import Cache
    from gptoss_jax.model.transformer import Transformer, build
    from gptoss_jax.sharding import make_mesh

_HOMES = {
    "Cache": "model.cache",
    "Chat": "chat",
    "Completion": "generation.generate",
    "FineTuning": "finetune.settings",
    "ModelConfig": "config",
    "Sampling": "generation.sampling",
    "SamplingRows": "generation.sampling",
    "Token": "generation.generate",
    "Transformer": "model.transformer",
    "build": "model.transformer",
    "decode": "generation.steps",
    "dismiss": "generation.follow",
    "fine_tune": "finetune.trainer",
    "follow": "generation.follow",
    "generate": "generation.generate",
    "gpt_oss_20b": "config",
    "gpt_oss_120b": "config",
    "load": "checkpoint",
    "make_mesh": "sharding",
    "prefill": "generation.steps",
    "start": "generation.steps",
    "stream": "generation.generate",
}

__all__ = [
    "Cache",
    "Chat",
    "Completion",
    "FineTuning",
    "ModelConfig",
    "Sampling",
    "SamplingRows",
    "Token",
    "Transformer",
    "build",
    "decode",
    "dismiss",
    "fine_tune",
    "follow",
    "generate",
    "gpt_oss_20b",
    "gpt_oss_120b",
    "load",
    "make_mesh",
    "prefill",
    "start",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
