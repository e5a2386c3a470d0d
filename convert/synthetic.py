"""Seeded random checkpoints in the published layouts, for tests and measurements.

    python -m convert.synthetic OUT --model tiny|20b|120b --layout hf|original|bf16 --seed N --shards K --threads T

The same (config, seed) gives the same parameters in every layout. Tensors are drawn and written a few megabytes at a
time, so a 120b takes no more memory than a tiny one. With several threads, as many shards are written at a time.
"""

import argparse
import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from convert.expert_matrices import dequantized, in_out
from convert.layouts import LayoutName, SourceTensor, source_tensors
from convert.published import shard_names, write_configs
from convert.safetensors_writer import write_shards
from gptoss_jax.config import MX_BLOCK, ModelConfig, gpt_oss_20b, gpt_oss_120b
from gptoss_jax.errors import ConversionError
from gptoss_jax.parameters import Parameter
from pallas_kernels.mxfp4 import CODE_VALUES

SyntheticLayout = Literal["hf", "original", "bf16"]

_LAYOUTS: dict[str, LayoutName] = {"hf": "hugging_face", "original": "original", "bf16": "bf16"}
_CHUNK_VALUES = 1 << 22
_FP4_RMS = float(np.sqrt(np.mean(np.square(CODE_VALUES))))


def write_checkpoint(
    directory: Path,
    config: ModelConfig,
    *,
    seed: int = 0,
    layout: SyntheticLayout = "hf",
    num_shards: int = 2,
    num_threads: int = 1,
) -> None:
    """Write a random checkpoint of `config` straight into `directory`, named as the published files are."""
    if num_threads < 1:
        raise ConversionError(f"{num_threads} threads", where="num_threads", fix="ask for at least one")
    directory.mkdir(parents=True, exist_ok=True)
    tensors = source_tensors(config, _LAYOUTS[layout])
    shards = _split(list(tensors.values()), num_shards)
    names = shard_names(_LAYOUTS[layout], num_shards, first=1 if layout == "original" else 0)
    chunks = functools.partial(_tensor_chunks, seed=seed)
    with ThreadPoolExecutor(num_threads) as pool:
        write_shards(directory, dict(zip(names, shards, strict=True)), chunks, each=pool.map)
    write_configs(directory, config, _LAYOUTS[layout])


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
        yield in_out(dequantized(expert_blocks, expert_scales))


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
    parser.add_argument("--threads", type=int, default=1, help="shards written at a time (default: %(default)s)")
    options = parser.parse_args()
    write_checkpoint(
        options.directory,
        MODELS[options.model](),
        seed=options.seed,
        layout=options.layout,
        num_shards=options.shards,
        num_threads=options.threads,
    )


if __name__ == "__main__":
    main()
