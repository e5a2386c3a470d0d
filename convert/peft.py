"""A LoRA as a PEFT adapter for transformers' gpt-oss: the names and shapes of its tensors, and its config.

PEFT (0.21, tuners/lora/layer.py) adapts an attention projection as a Linear, and the router and the experts as bare
parameters: `lora_A` has the ranks of all experts one after the other, `lora_B` one column for each rank and expert, the
expert running fastest. Of two parameters of one module the second wraps the first, whose names then say `base_layer`.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from convert.safetensors_writer import Tensor
from gptoss_jax.errors import ConversionError
from gptoss_jax.finetune.adapters import LoRA
from gptoss_jax.finetune.trained import Trained

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_MODULES = {
    "attention.query.weight": "self_attn.q_proj",
    "attention.key.weight": "self_attn.k_proj",
    "attention.value.weight": "self_attn.v_proj",
    "attention.output.weight": "self_attn.o_proj",
    "router.weight": "mlp.router",
    "experts.gate_up": "mlp.experts.base_layer",
    "experts.down": "mlp.experts",
}
_PARAMETERS = {
    "router": ["mlp.router.weight"],
    "experts": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


@dataclasses.dataclass(frozen=True)
class AdapterTensor(Tensor):
    """One array of the adapter."""

    path: str
    """What the run calls it."""


def adapter_config(lora: LoRA) -> dict[str, Any]:
    """What adapter_config.json holds; it names no base model, since a checkpoint does not know where it came from."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"] if "attention" in lora.targets else [],
        "target_parameters": [name for target in lora.targets for name in _PARAMETERS.get(target, [])] or None,
    }


def adapter_tensors(run: Trained) -> list[AdapterTensor]:
    """Every tensor of the adapter. Raises ConversionError for experts that PEFT cannot adapt."""
    if run.lora is not None and "experts" in run.lora.targets and run.config.num_experts == 1:
        raise ConversionError(
            "PEFT takes the matrices of a single expert for those of a Linear",
            where="mlp.experts.gate_up_proj, mlp.experts.down_proj",
            fix="leave out --peft: merge the adapter",
        )
    return [_tensor(path, shape) for path, shape in run.shapes.items()]


def adapter_values(run: Trained, tensor: AdapterTensor) -> Iterator[np.ndarray]:
    """The values of a tensor, in one go: as many as one weight of one layer has."""
    values = run.read(tensor.path)
    if ".experts." in tensor.path and tensor.path.endswith("lora_b"):
        values = values.transpose(1, 2, 0)  # [E, out, rank] to [out, rank, E]
    yield values


def _tensor(path: str, shape: tuple[int, ...]) -> AdapterTensor:
    _, layer, weight = path.split(".", 2)
    weight, _, side = weight.rpartition(".")
    name = f"base_model.model.model.layers.{layer}.{_MODULES[weight]}.lora_{side[-1].upper()}.weight"
    return AdapterTensor(name, _shape(shape, weight, side), "F32", path)


def _shape(shape: tuple[int, ...], weight: str, side: str) -> tuple[int, int]:
    """The tensor is a matrix: [ranks, in] of lora_a, [out, ranks] of lora_b."""
    if weight.startswith("experts."):
        num_experts, rows, columns = shape
        return (num_experts * rows, columns) if side == "lora_a" else (rows, columns * num_experts)
    return (shape[0], math.prod(shape[1:])) if side == "lora_a" else (math.prod(shape[:-1]), shape[-1])
