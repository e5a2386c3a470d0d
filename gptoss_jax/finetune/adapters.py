"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685): which parameters get one, its two factors, how they start.

An adapter adds `scale * lora_b @ lora_a` to a weight; an expert matrix has one for each expert.
"""

import dataclasses
import hashlib
import math
from typing import Literal, get_args

import numpy as np

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import TrainingError

Target = Literal["attention", "router", "experts"]
TARGETS: tuple[Target, ...] = get_args(Target)
A, B = "lora_a", "lora_b"

_RANK = "r"
# By target: the weight's path in a layer, and the dims of its two factors.
_FACTORS = {
    "attention": {
        "attention.query.weight": ("r D", "N H r"),
        "attention.key.weight": ("r D", "K H r"),
        "attention.value.weight": ("r D", "K H r"),
        "attention.output.weight": ("r N H", "D r"),
    },
    "router": {"router.weight": ("r D", "E r")},
    "experts": {
        "experts.gate_up": ("E r D", "E 2F r"),
        "experts.down": ("E r F", "E D r"),
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """What to adapt, and how strongly.

    Example:
        >>> LoRA(rank=8, alpha=16.0).scale
        2.0
    """

    rank: int
    alpha: float
    targets: tuple[Target, ...] = ("attention",)

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("alpha", self.alpha)):
            if not 0 < value < math.inf:
                raise TrainingError(f"{name} {value}", where="LoRA", fix="give a number above 0")

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by: alpha / rank."""
        return self.alpha / self.rank


def adapter_dims(config: ModelConfig, lora: LoRA) -> dict[str, str]:
    """The dims of every adapter array, by path, in the letters of gptoss_jax/config.py and r for the rank."""
    return {
        f"layers.{layer}.{name}.{factor}": dims
        for layer in range(config.num_layers)
        for target in TARGETS
        if target in lora.targets
        for name, both in _FACTORS[target].items()
        for factor, dims in zip((A, B), both, strict=True)
    }


def adapter_shapes(config: ModelConfig, lora: LoRA) -> dict[str, tuple[int, ...]]:
    """The shape of every adapter array, by path: the adapted weight's path, then `lora_a` or `lora_b`.

    Example:
        >>> from gptoss_jax.config import gpt_oss_20b
        >>> adapter_shapes(gpt_oss_20b(), LoRA(rank=8, alpha=16.0))["layers.0.attention.query.weight.lora_b"]
        (64, 64, 8)
    """
    sizes = {
        "D": config.hidden_size,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "E": config.num_experts,
        "F": config.intermediate_size,
        "2F": 2 * config.intermediate_size,
        _RANK: lora.rank,
    }
    return {path: tuple(sizes[dim] for dim in dims.split()) for path, dims in adapter_dims(config, lora).items()}


def initial_adapter(path: str, dims: str, shape: tuple[int, ...], *, seed: int) -> np.ndarray:
    """Where an adapter array starts: `lora_b` at zero, so that nothing changes; `lora_a` uniform in +-1/sqrt(inputs).

    Float32; depends on the seed and the path alone.
    """
    if path.endswith(B):
        return np.zeros(shape, np.float32)
    digest = hashlib.sha256(f"{seed} {path}".encode()).digest()
    inputs = math.prod(shape[dims.split().index(_RANK) + 1 :])
    bound = 1 / math.sqrt(inputs)
    return np.random.default_rng(list(digest)).uniform(-bound, bound, shape).astype(np.float32)
