"""The three safetensors layouts of gpt-oss, and which parameters of our tree each of their tensors holds.

    original        the `original/` folder of the published repositories; queries, keys and values in one tensor
    hugging_face    the root folder of the published repositories
    bf16            community exports: the experts dequantized, [E, in, out]

The first two hold the same bytes: a tensor is its parameters' bytes one after the other. Only tensor names tell
the layouts apart, never file names. No file is opened here.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Literal

from convert.safetensors_writer import Tensor
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import CheckpointError
from gptoss_jax.parameters import Parameter, parameters

LayoutName = Literal["original", "hugging_face", "bf16"]

_ORIGINAL_GLOBAL = {
    "embedding.weight": "embedding.weight",
    "norm.scale": "norm.scale",
    "unembedding.weight": "unembedding.weight",
}
_ORIGINAL_LAYER = {
    "attn.norm.scale": "attention_norm.scale",
    "attn.qkv.weight": "attention.query.weight attention.key.weight attention.value.weight",
    "attn.qkv.bias": "attention.query.bias attention.key.bias attention.value.bias",
    "attn.sinks": "attention.sinks",
    "attn.out.weight": "attention.output.weight",
    "attn.out.bias": "attention.output.bias",
    "mlp.norm.scale": "experts_norm.scale",
    "mlp.gate.weight": "router.weight",
    "mlp.gate.bias": "router.bias",
    "mlp.mlp1_weight.blocks": "experts.gate_up.blocks",
    "mlp.mlp1_weight.scales": "experts.gate_up.scales",
    "mlp.mlp1_bias": "experts.gate_up.bias",
    "mlp.mlp2_weight.blocks": "experts.down.blocks",
    "mlp.mlp2_weight.scales": "experts.down.scales",
    "mlp.mlp2_bias": "experts.down.bias",
}
_HUGGING_FACE_GLOBAL = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "unembedding.weight",
}
_HUGGING_FACE_SHARED = {
    "input_layernorm.weight": "attention_norm.scale",
    "self_attn.q_proj.weight": "attention.query.weight",
    "self_attn.q_proj.bias": "attention.query.bias",
    "self_attn.k_proj.weight": "attention.key.weight",
    "self_attn.k_proj.bias": "attention.key.bias",
    "self_attn.v_proj.weight": "attention.value.weight",
    "self_attn.v_proj.bias": "attention.value.bias",
    "self_attn.o_proj.weight": "attention.output.weight",
    "self_attn.o_proj.bias": "attention.output.bias",
    "self_attn.sinks": "attention.sinks",
    "post_attention_layernorm.weight": "experts_norm.scale",
    "mlp.router.weight": "router.weight",
    "mlp.router.bias": "router.bias",
    "mlp.experts.gate_up_proj_bias": "experts.gate_up.bias",
    "mlp.experts.down_proj_bias": "experts.down.bias",
}
_HUGGING_FACE_LAYER = _HUGGING_FACE_SHARED | {
    "mlp.experts.gate_up_proj_blocks": "experts.gate_up.blocks",
    "mlp.experts.gate_up_proj_scales": "experts.gate_up.scales",
    "mlp.experts.down_proj_blocks": "experts.down.blocks",
    "mlp.experts.down_proj_scales": "experts.down.scales",
}
_BF16_LAYER = _HUGGING_FACE_SHARED | {
    "mlp.experts.gate_up_proj": "experts.gate_up.blocks experts.gate_up.scales",
    "mlp.experts.down_proj": "experts.down.blocks experts.down.scales",
}
# For each layout: prefix of a layer's tensors, names outside the layers, names in a layer.
_TABLES = {
    "original": ("block", _ORIGINAL_GLOBAL, _ORIGINAL_LAYER),
    "hugging_face": ("model.layers", _HUGGING_FACE_GLOBAL, _HUGGING_FACE_LAYER),
    "bf16": ("model.layers", _HUGGING_FACE_GLOBAL, _BF16_LAYER),
}


@dataclasses.dataclass(frozen=True)
class SourceTensor(Tensor):
    """One tensor a layout must contain."""

    holds: tuple[Parameter, ...]
    """Its parameters, one after the other along the rows; for a dequantized matrix, its blocks and scales."""

    @property
    def is_dequantized(self) -> bool:
        """Whether it is an expert matrix written out in bfloat16, [E, in, out]."""
        return self.dtype == "BF16" and self.holds[0].dtype == "uint8"


def source_tensors(config: ModelConfig, layout: LayoutName) -> dict[str, SourceTensor]:
    """Every tensor `layout` has for this architecture, by name."""
    prefix, global_names, layer_names = _TABLES[layout]
    tree = parameters(config)
    tensors = {name: _source_tensor(name, [tree[path]]) for name, path in global_names.items()}
    for layer in range(config.num_layers):
        for suffix, paths in layer_names.items():
            name = f"{prefix}.{layer}.{suffix}"
            tensors[name] = _source_tensor(name, [tree[f"layers.{layer}.{path}"] for path in paths.split()])
    return tensors


def detect(names: Collection[str], *, where: str) -> LayoutName:
    """Tell the layout from the tensor names alone."""
    if "embedding.weight" in names:
        return "original"
    if "model.embed_tokens.weight" in names:
        return "bf16" if any(name.endswith(".mlp.experts.gate_up_proj") for name in names) else "hugging_face"
    raise CheckpointError(
        f"no gpt-oss layout among {len(names)} tensors (neither 'embedding.weight' nor 'model.embed_tokens.weight')",
        where=where,
        fix="name a gpt-oss checkpoint folder",
    )


def check(
    found: Mapping[str, tuple[str, tuple[int, ...]]], config: ModelConfig, layout: LayoutName, *, where: str
) -> dict[str, SourceTensor]:
    """Compare what the headers say (name to dtype and shape) with what the architecture needs; return the latter.

    Raises CheckpointError naming the tensors that are missing, unexpected, or of another dtype or shape.
    """
    expected = source_tensors(config, layout)
    faults = [
        *(f"{name} is missing" for name in expected if name not in found),
        *(f"{name} is unexpected" for name in found if name not in expected),
    ]
    for name, tensor in expected.items():
        dtype, shape = found.get(name, (tensor.dtype, tensor.shape))
        if dtype != tensor.dtype:
            faults.append(f"{name} is {dtype}, not {tensor.dtype}")
        if shape != tensor.shape:
            faults.append(f"{name} has shape {list(shape)}, not {list(tensor.shape)}")
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise CheckpointError(
            "; ".join(faults[:4]) + more, where=where, fix="download the checkpoint and its config.json again"
        )
    return expected


def _source_tensor(name: str, holds: list[Parameter]) -> SourceTensor:
    first = holds[0]
    if len(holds) == 2:  # blocks and scales of a matrix that the layout keeps dequantized, [E, in, out]
        experts, rows, num_blocks, num_bytes = first.shape
        return SourceTensor(name, (experts, num_blocks * num_bytes * 2, rows), "BF16", tuple(holds))
    _, *columns = _published_shape(first)
    num_rows = sum(_published_shape(parameter)[0] for parameter in holds)
    dtype = "U8" if first.dtype == "uint8" else "BF16"
    return SourceTensor(name, (num_rows, *columns), dtype, tuple(holds))


def _published_shape(parameter: Parameter) -> tuple[int, ...]:
    """Published tensors keep heads and their width in one dim."""
    shape: list[int] = []
    for dim, size in zip(parameter.dims, parameter.shape, strict=True):
        if dim == "H":
            shape[-1] *= size
        else:
            shape.append(size)
    return tuple(shape)
