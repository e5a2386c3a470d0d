"""Fine-tuning runs that were never trained: random adapters or masters on a converted checkpoint."""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np

from convert.expert_matrices import dequantized
from convert.zarr import open_array, read_rows
from gptoss_jax.config import ModelConfig
from gptoss_jax.finetune.adapters import LoRA, adapter_shapes
from gptoss_jax.finetune.runs import digest_of
from gptoss_jax.finetune.trained import Trained
from gptoss_jax.manifest import CONFIG, PARAMETERS
from gptoss_jax.parameters import parameters


@dataclasses.dataclass(frozen=True)
class Run(Trained):
    """As gptoss_jax/finetune/trained.py opens one, with its arrays in memory."""

    arrays: dict[str, np.ndarray]

    def read(self, path: str, rows: slice = slice(None)) -> np.ndarray:
        return self.arrays[path][rows]


def _run(base: Path, config: ModelConfig, method: str, lora: LoRA | None, arrays: dict[str, np.ndarray]) -> Run:
    shapes = {path: values.shape for path, values in arrays.items()}
    return Run(base, digest_of(base), config, method, lora, step=7, shapes=shapes, folder=base, arrays=arrays)


def lora_run(base: Path, *, rank: int = 3, alpha: float = 1.5, targets=("attention", "router", "experts")) -> Run:
    """Adapters of sixteenths, so that float32 multiplies them without rounding, in any order."""
    random = np.random.default_rng(5)
    config = ModelConfig.read(base / CONFIG)
    lora = LoRA(rank=rank, alpha=alpha, targets=targets)
    arrays = {
        path: (random.integers(-4, 5, shape) / 16).astype(np.float32)
        for path, shape in adapter_shapes(config, lora).items()
    }
    return _run(base, config, "lora", lora, arrays)


def master_run(base: Path, method: Literal["full", "qat"]) -> Run:
    """Every weight of `base` in float32, a little moved."""
    random = np.random.default_rng(6)
    arrays = {path: values + random.normal(0, 0.01, values.shape) for path, values in base_weights(base).items()}
    config = ModelConfig.read(base / CONFIG)
    return _run(base, config, method, None, {path: values.astype(np.float32) for path, values in arrays.items()})


def base_weights(base: Path) -> dict[str, np.ndarray]:
    """Every weight of a converted checkpoint in float32, the experts' matrices as `PATH.weight`."""
    stored = {}
    for path, parameter in parameters(ModelConfig.read(base / CONFIG)).items():
        stored[path] = read_rows(open_array(base / PARAMETERS / path), 0, parameter.shape[0])
    weights = {path: values.astype(np.float32) for path, values in stored.items() if values.dtype != np.uint8}
    for path in stored:
        if path.endswith(".blocks"):
            matrix = path.removesuffix(".blocks")
            weights[f"{matrix}.weight"] = dequantized(stored[path], stored[f"{matrix}.scales"])
    return weights


def trained_weights(run: Run) -> dict[str, np.ndarray]:
    """The exact float32 weights of the run, named as `base_weights` names them."""
    weights = base_weights(run.base)
    if run.lora is None:
        return weights | run.arrays
    for name in list(run.arrays):
        path, _, side = name.rpartition(".")
        if side == "lora_a":
            a, b = run.arrays[name], run.arrays[f"{path}.lora_b"]
            product = b @ a if ".experts." in path else np.tensordot(b, a, axes=1)
            weight = path if path in weights else f"{path}.weight"
            weights[weight] = weights[weight] + np.float32(run.lora.scale) * product
    return weights
