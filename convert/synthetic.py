"""Seeded random checkpoints in the published layouts, for tests, measurements and the demo.

    python -m convert.synthetic OUT --model tiny|20b|120b --layout hf|original|bf16 --seed N --shards K

The same (config, seed) gives the same parameters in every layout. Tensors are drawn and written a few megabytes at a
time, so a 120b takes no more memory than a tiny one.
"""

import argparse
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from convert.layouts import LayoutName, SourceTensor, source_tensors
from gptoss_jax.config import MX_BLOCK, ModelConfig, gpt_oss_20b, gpt_oss_120b
from gptoss_jax.errors import ConversionError
from gptoss_jax.parameters import Parameter
from pallas_kernels.mxfp4 import CODE_VALUES

SyntheticLayout = Literal["hf", "original", "bf16"]

_LAYOUTS: dict[str, LayoutName] = {"hf": "hugging_face", "original": "original", "bf16": "bf16"}
_CHUNK_VALUES = 1 << 22
_FP4_VALUES = np.array(CODE_VALUES, np.float32)
_FP4_RMS = float(np.sqrt(np.mean(_FP4_VALUES**2)))


def write_checkpoint(
    directory: Path, config: ModelConfig, *, seed: int = 0, layout: SyntheticLayout = "hf", num_shards: int = 2
) -> None:
    """Write a random checkpoint of `config` straight into `directory`, named as the published files are."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = source_tensors(config, _LAYOUTS[layout])
    shards = _split(list(tensors.values()), num_shards)
    file_names = _file_names(layout, num_shards)
    for file_name, shard in zip(file_names, shards, strict=True):
        _write_safetensors(directory / file_name, shard, seed)
    if num_shards > 1:
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors.values())},
            "weight_map": {t.name: name for name, shard in zip(file_names, shards, strict=True) for t in shard},
        }
        _write_json(directory / "model.safetensors.index.json", index)
    if layout == "original":
        _write_json(directory / "config.json", original_config(config))
        _write_json(directory / "dtypes.json", {name: _published_dtype(tensor) for name, tensor in tensors.items()})
    else:
        published = config.to_json()
        if layout == "bf16":
            del published["quantization_config"]
        _write_json(directory / "config.json", published)


def original_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of the `original/` folder; refuses an architecture it has no words for."""
    published = {
        "num_hidden_layers": config.num_layers,
        "num_experts": config.num_experts,
        "experts_per_token": config.experts_per_token,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "swiglu_limit": config.swiglu_limit,
        "head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "sliding_window": config.sliding_window,
        "initial_context_length": config.original_context,
        "rope_theta": config.rope_theta,
        "rope_scaling_factor": config.rope_factor,
        "rope_ntk_alpha": config.rope_beta_slow,
        "rope_ntk_beta": config.rope_beta_fast,
    }
    if ModelConfig.from_json(published) != config:
        raise ConversionError(
            "the original/ config.json cannot express this architecture",
            where="layer kinds, rms_norm_eps, swiglu_alpha or max_context",
            fix="write the Hugging Face layout",
        )
    return published


def parameter_chunks(parameter: Parameter, seed: int) -> Iterator[np.ndarray]:
    """Draw a parameter in consecutive slices of its first dim: one expert each, or a few megabytes of rows.

    Depends on the path and the seed alone, so every layout gets the same values.
    """
    digest = hashlib.sha256(f"{seed} {parameter.path}".encode()).digest()
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))
    rows, *columns = parameter.shape
    num_rows = 1 if ".experts." in parameter.path else max(1, _CHUNK_VALUES // math.prod(columns))
    for start in range(0, rows, num_rows):
        yield _draw(generator, parameter, (min(num_rows, rows - start), *columns))


def _draw(generator: np.random.Generator, parameter: Parameter, shape: tuple[int, ...]) -> np.ndarray:
    if parameter.leaf == "blocks":
        return np.frombuffer(generator.bytes(math.prod(shape)), np.uint8).reshape(shape)
    if parameter.leaf == "scales":
        # Centred so that a matrix of uniform codes has the usual 1/sqrt(fan in) deviation: 119..121 for 20b.
        fan_in = parameter.shape[-1] * MX_BLOCK
        centre = 127 - round(math.log2(_FP4_RMS * math.sqrt(fan_in)))
        return generator.integers(centre - 1, centre + 2, shape, np.uint8)
    mean, deviation = _distribution(parameter)
    values = generator.standard_normal(shape, np.float32)
    values *= deviation
    values += mean
    return values.astype(ml_dtypes.bfloat16)


def _distribution(parameter: Parameter) -> tuple[float, float]:
    """Mean and deviation: every tensor differs from its neutral value, so that leaving one out shows."""
    if parameter.path == "embedding.weight":
        return 0.0, 1.0
    if parameter.leaf == "weight":
        columns = parameter.shape[1:] if parameter.path.endswith("output.weight") else parameter.shape[-1:]
        return 0.0, 1 / math.sqrt(math.prod(columns))
    return {"scale": (1.0, 0.1), "bias": (0.0, 0.1), "sinks": (0.0, 0.5)}[parameter.leaf]


def _tensor_chunks(tensor: SourceTensor, seed: int) -> Iterator[np.ndarray]:
    if not tensor.is_dequantized:
        for parameter in tensor.holds:
            yield from parameter_chunks(parameter, seed)
        return
    blocks, scales = (parameter_chunks(parameter, seed) for parameter in tensor.holds)
    for expert_blocks, expert_scales in zip(blocks, scales, strict=True):
        codes = np.stack([expert_blocks & 15, expert_blocks >> 4], axis=-1)  # the low nibble comes first
        values = _FP4_VALUES[codes.reshape(*expert_scales.shape, MX_BLOCK)]
        values = np.ldexp(values, expert_scales[..., None].astype(np.int32) - 127)
        matrix = values.reshape(1, expert_scales.shape[1], -1).astype(ml_dtypes.bfloat16)
        yield np.ascontiguousarray(matrix.swapaxes(1, 2))


def _write_safetensors(path: Path, tensors: Sequence[SourceTensor], seed: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            for chunk in _tensor_chunks(tensor, seed):
                file.write(chunk.reshape(-1).view(np.uint8).data)


def _split(tensors: Sequence[SourceTensor], num_shards: int) -> list[list[SourceTensor]]:
    """Cut the list into shards of about equal bytes, wherever the cut falls, as the published files do."""
    if not 1 <= num_shards <= len(tensors):
        raise ConversionError(
            f"{num_shards} shards of {len(tensors)} tensors",
            where="num_shards",
            fix="ask for no more shards than tensors",
        )
    total = sum(tensor.num_bytes for tensor in tensors)
    shards: list[list[SourceTensor]] = [[]]
    written = 0
    for position, tensor in enumerate(tensors):
        shards_left = num_shards - len(shards)
        is_full = written >= total * len(shards) / num_shards
        if shards[-1] and shards_left and (is_full or len(tensors) - position == shards_left):
            shards.append([])
        shards[-1].append(tensor)
        written += tensor.num_bytes
    return shards


def _file_names(layout: SyntheticLayout, num_shards: int) -> list[str]:
    """As published: the root folder counts from 0 up to the number it names, `original/` from 1."""
    if num_shards == 1:
        return ["model.safetensors"]
    if layout == "original":
        return [f"model--{k:05}-of-{num_shards:05}.safetensors" for k in range(1, num_shards + 1)]
    return [f"model-{k:05}-of-{num_shards - 1:05}.safetensors" for k in range(num_shards)]


def _published_dtype(tensor: SourceTensor) -> str:
    return {"blocks": "FP4", "scales": "UE8"}.get(tensor.holds[0].leaf, "BF16")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _small(vocab_size: int = 201088) -> ModelConfig:
    """A model that a laptop converts in a second: the published vocabulary and proportions, two layers."""
    return dataclasses.replace(
        gpt_oss_20b(),
        num_layers=2,
        layer_kinds=gpt_oss_20b().layer_kinds[:2],
        hidden_size=64,
        intermediate_size=64,
        num_heads=8,
        num_kv_heads=2,
        head_dim=16,
        num_experts=8,
        vocab_size=vocab_size,
    )


MODELS = {"tiny": _small, "20b": gpt_oss_20b, "120b": gpt_oss_120b}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convert.synthetic", description="Write a seeded random checkpoint in a published layout."
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--layout", choices=_LAYOUTS, default="hf")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=2)
    options = parser.parse_args()
    write_checkpoint(
        options.directory,
        MODELS[options.model](),
        seed=options.seed,
        layout=options.layout,
        num_shards=options.shards,
    )


if __name__ == "__main__":
    main()
