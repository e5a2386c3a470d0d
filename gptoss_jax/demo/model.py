"""The demo model's architecture, and the random weights that its training begins with."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from gptoss_jax.config import ModelConfig, gpt_oss_20b

MOST_BYTES = 8_000_000
"""What may be shipped."""


def demo_config(vocab_size: int = gpt_oss_20b().vocab_size) -> ModelConfig:
    """gpt-oss in small: 6 layers, 8 experts of which a token chooses 2, heads of the published width.

    Every part has work to do in a conversation of some hundred tokens. The window of 32 is crossed by all of them. YaRN
    stretches from 256 positions by the published factor: of the 32 rotated pairs 22 turn 32 times as slowly as without
    it, 9 somewhat more slowly, and scores are 1.8 times as large; with the published 4,096 most of the change would be
    in pairs that hardly turn over so few positions. Widths are multiples of 64, which the Hopper kernels take.

    Example:
        >>> demo_config().hidden_size, demo_config().max_context
        (256, 8192)
    """
    published = gpt_oss_20b()
    return dataclasses.replace(
        published,
        num_layers=6,
        layer_kinds=published.layer_kinds[:6],
        hidden_size=256,
        intermediate_size=192,
        num_heads=4,
        num_kv_heads=2,
        num_experts=8,
        experts_per_token=2,
        sliding_window=32,
        original_context=256,
        max_context=8192,
        vocab_size=vocab_size,
    )


def initial_weights(shapes: Mapping[str, tuple[int, ...]], *, num_layers: int, seed: int) -> dict[str, np.ndarray]:
    """Float32 masters to begin with, by path.

    Matrices keep the scale of what they multiply; what adds to the residual stream starts smaller by the square root
    of the number of additions (Radford et al. 2019). The embedding starts at 1, biases and sinks at zero.

    Example:
        >>> weights = initial_weights({"norm.scale": (2,), "unembedding.weight": (808, 256)}, num_layers=6, seed=1)
        >>> weights["norm.scale"].tolist(), round(float(weights["unembedding.weight"].std()), 3)
        ([1.0, 1.0], 0.062)
    """
    return {path: _initial(path, shapes[path], num_layers, (seed, place)) for place, path in enumerate(sorted(shapes))}


def _initial(path: str, shape: tuple[int, ...], num_layers: int, seed: tuple[int, int]) -> np.ndarray:
    if not path.endswith(".weight"):
        return np.full(shape, 1.0 if path.endswith(".scale") else 0.0, np.float32)
    deviation = 1.0
    if path != "embedding.weight":
        contracted = shape[1:] if path.endswith("attention.output.weight") else shape[-1:]
        deviation = math.prod(contracted) ** -0.5
    if path.endswith(("attention.output.weight", "experts.down.weight")):
        deviation *= (2 * num_layers) ** -0.5
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(deviation)
