"""The demo: a small gpt-oss, the pipeline that runs on it, and the conversations that it learns from."""

from gptoss_jax.demo.expand import checkpoint
from gptoss_jax.demo.pipeline import CONVERTED, PUBLISHED, make_checkpoint, run

__all__ = ["CONVERTED", "PUBLISHED", "checkpoint", "make_checkpoint", "run"]
