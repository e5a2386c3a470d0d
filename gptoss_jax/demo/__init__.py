"""The demo: a small checkpoint, the pipeline that runs on it, and the conversations that a small model learns from."""

from gptoss_jax.demo.pipeline import CONVERTED, PUBLISHED, QUESTION, make_checkpoint, run

__all__ = ["CONVERTED", "PUBLISHED", "QUESTION", "make_checkpoint", "run"]
