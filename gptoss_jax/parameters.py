"""Every parameter of a checkpoint: its path, dims, shape and stored dtype, and how many there are.

The one list that conversion, restore, `inspect` and `verify` agree on. It knows no file and no device.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from gptoss_jax.config import MX_BLOCK, ModelConfig

StoredDtype = Literal["bfloat16", "uint8"]

MX_BYTES = MX_BLOCK // 2
"""Bytes of one block: two 4-bit codes each."""

_GLOBAL = {
    "embedding.weight": "V D",
    "norm.scale": "D",
    "unembedding.weight": "V D",
}
_LAYER = {
    "attention_norm.scale": "D",
    "attention.query.weight": "N H D",
    "attention.query.bias": "N H",
    "attention.key.weight": "K H D",
    "attention.key.bias": "K H",
    "attention.value.weight": "K H D",
    "attention.value.bias": "K H",
    "attention.sinks": "N",
    "attention.output.weight": "D N H",
    "attention.output.bias": "D",
    "experts_norm.scale": "D",
    "router.weight": "E D",
    "router.bias": "E",
    "experts.gate_up.blocks": "E 2F J 16",
    "experts.gate_up.scales": "E 2F J",
    "experts.gate_up.bias": "E 2F",
    "experts.down.blocks": "E D J 16",
    "experts.down.scales": "E D J",
    "experts.down.bias": "E D",
}
_PACKED = ("blocks", "scales")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One array of the checkpoint tree."""

    path: str
    """Dotted; the layer index is one component: `layers.3.attention.sinks`."""
    dims: tuple[str, ...]
    """One name of the dims' alphabet (gptoss_jax/config.py) for each entry of `shape`."""
    shape: tuple[int, ...]
    dtype: StoredDtype

    @property
    def leaf(self) -> str:
        """The last path component: weight, bias, scale, sinks, blocks or scales."""
        return self.path.rpartition(".")[2]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * (2 if self.dtype == "bfloat16" else 1)

    @property
    def num_values(self) -> int:
        """Model parameters it stands for: two a byte of blocks, none for the scales."""
        return {"blocks": 2, "scales": 0}.get(self.leaf, 1) * math.prod(self.shape)


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """All parameters by path, in the order the forward pass meets them.

    Example:
        >>> from gptoss_jax.config import gpt_oss_20b
        >>> parameters(gpt_oss_20b())["layers.0.attention.query.weight"].shape
        (64, 64, 2880)
    """
    return {parameter.path: parameter for parameter in _walk(config)}


def num_parameters(config: ModelConfig) -> int:
    """All parameters of the model."""
    return sum(parameter.num_values for parameter in _walk(config))


def num_active_parameters(config: ModelConfig) -> int:
    """Parameters one token is multiplied by: all but the embedding table and the experts it does not choose."""
    experts = sum(parameter.num_values for parameter in _walk(config) if ".experts." in parameter.path)
    idle_experts = experts // config.num_experts * (config.num_experts - config.experts_per_token)
    return num_parameters(config) - idle_experts - config.vocab_size * config.hidden_size


def _walk(config: ModelConfig) -> Iterator[Parameter]:
    yield _parameter(config, "embedding.weight", _GLOBAL["embedding.weight"])
    for layer in range(config.num_layers):
        for name, dims in _LAYER.items():
            yield _parameter(config, f"layers.{layer}.{name}", dims)
    for path in ("norm.scale", "unembedding.weight"):
        yield _parameter(config, path, _GLOBAL[path])


def _parameter(config: ModelConfig, path: str, dims: str) -> Parameter:
    contracted = config.intermediate_size if ".down." in path else config.hidden_size
    sizes = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "E": config.num_experts,
        "2F": 2 * config.intermediate_size,
        "J": contracted // MX_BLOCK,
        "16": MX_BYTES,
    }
    names = tuple(dims.split())
    dtype: StoredDtype = "uint8" if path.endswith(_PACKED) else "bfloat16"
    return Parameter(path, names, tuple(sizes[name] for name in names), dtype)
