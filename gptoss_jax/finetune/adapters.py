"""What a LoRA adapter is: its rank, its scale, which parameters it changes, and the shapes of its arrays."""

import dataclasses
from typing import Literal

from gptoss_jax.config import MX_BLOCK, ModelConfig
from gptoss_jax.parameters import Parameter, parameters

Target = Literal["attention", "router", "experts"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """How weights are changed: by `scale * lora_b @ lora_a`, for the experts each by its own.

    Example:
        >>> LoRA(rank=8, alpha=16.0, targets=("attention", "experts")).scale
        2.0
    """

    rank: int
    alpha: float
    targets: tuple[Target, ...]

    @property
    def scale(self) -> float:
        """What the product of the two arrays is multiplied by."""
        return self.alpha / self.rank


def adapter_shapes(config: ModelConfig, lora: LoRA) -> dict[str, tuple[int, ...]]:
    """The shape of every `PATH.lora_a` and `PATH.lora_b`, in the order of the parameters.

    PATH is that of a weight; of experts it is that of the matrix: `layers.0.experts.down`. The dims that the weight
    sums over go to `lora_a`, the others to `lora_b`, and of experts the first dim to both.

    Example:
        >>> from gptoss_jax.config import gpt_oss_20b
        >>> shapes = adapter_shapes(gpt_oss_20b(), LoRA(rank=8, alpha=16.0, targets=("attention", "experts")))
        >>> shapes["layers.0.attention.output.weight.lora_a"], shapes["layers.0.attention.output.weight.lora_b"]
        ((8, 64, 64), (2880, 8))
        >>> shapes["layers.0.experts.gate_up.lora_a"], shapes["layers.0.experts.gate_up.lora_b"]
        ((32, 8, 2880), (32, 5760, 8))
    """
    shapes = {}
    for parameter in parameters(config).values():
        if _target(parameter) not in lora.targets:
            continue
        path, shape = parameter.path, parameter.shape
        if parameter.leaf == "blocks":
            path = path.removesuffix(".blocks")
            num_experts, num_out, num_blocks, _ = shape
            shapes[f"{path}.lora_a"] = (num_experts, lora.rank, num_blocks * MX_BLOCK)
            shapes[f"{path}.lora_b"] = (num_experts, num_out, lora.rank)
        else:
            num_out = 1 if path.endswith("output.weight") else len(shape) - 1
            shapes[f"{path}.lora_a"] = (lora.rank, *shape[num_out:])
            shapes[f"{path}.lora_b"] = (*shape[:num_out], lora.rank)
    return shapes


def _target(parameter: Parameter) -> str | None:
    """What the parameter belongs to, if it is a matrix that LoRA can change."""
    if parameter.path.startswith("layers.") and parameter.leaf in ("weight", "blocks"):
        return parameter.path.split(".")[2]
    return None
