"""What a step must at least move and multiply, and how long that takes at the rates the card was measured at.

A floor counts what no program can leave out: the published bytes of the weights that are used, the keys and values
that are seen, and the products. Activations, logits and partial sums are not in it. Knows no JAX.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Literal, get_args

from gptoss_jax.config import LayerKind, ModelConfig
from gptoss_jax.parameters import Parameter, parameters

Number = int | float
Stage = Literal["qkv", "attention", "output", "router", "experts", "unembedding"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Part = Stage | Literal["everything", "collectives"]
"""What a step can leave out: a stage, or all of them."""
_KV_BYTES = 2  # bfloat16
_PER_PRODUCT = 2  # a multiplication and an addition
_PARTS: dict[Stage, tuple[str, ...]] = {
    "qkv": (".attention_norm.", ".query.", ".key.", ".value."),
    "attention": (".sinks",),
    "output": (".output.",),
    "router": (".experts_norm.", ".router."),
    "experts": (".experts.",),
    "unembedding": (".unembedding.", ".norm."),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """Bytes that must be read and floating point operations that must be done."""

    bytes: Number
    flops: Number

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def __sub__(self, other: "Work") -> "Work":
        return Work(self.bytes - other.bytes, self.flops - other.flops)

    def __truediv__(self, parts: int) -> "Work":
        return Work(self.bytes / parts, self.flops / parts)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The rates of the card, as measured in the same run."""

    read_bytes_per_s: Number
    dense_flops_per_s: Number

    def floor_ms(self, work: Work) -> float:
        """The longer of the two: reading at full rate, multiplying at full rate.

        Example:
            >>> Ceilings(read_bytes_per_s=4e12, dense_flops_per_s=800e12).floor_ms(Work(bytes=4e9, flops=8e9))
            1.0
        """
        return 1e3 * max(work.bytes / self.read_bytes_per_s, work.flops / self.dense_flops_per_s)


def stages(part: Part | None) -> tuple[Stage, ...]:
    """The stages of what a step leaves out; None leaves nothing out."""
    return STAGES if part == "everything" else tuple(stage for stage in STAGES if stage == part)


def experts_touched(config: ModelConfig, num_tokens: int) -> float:
    """How many experts of a layer are expected to be chosen by at least one token, with uniform routing.

    Example:
        >>> from gptoss_jax.config import gpt_oss_20b
        >>> [round(experts_touched(gpt_oss_20b(), tokens), 1) for tokens in (1, 8, 32)]
        [4.0, 21.0, 31.6]
    """
    idle = 1 - config.experts_per_token / config.num_experts
    return config.num_experts * (1 - idle**num_tokens)


def decode_work(config: ModelConfig, *, batch: int, context: Number, without: Collection[Stage] = ()) -> Work:
    """One step: a token for each of `batch` rows that see `context` tokens, stages `without` not counted.

    Example:
        >>> from gptoss_jax.config import gpt_oss_20b
        >>> round(decode_work(gpt_oss_20b(), batch=1, context=0).bytes / 1e9, 2)
        3.71
    """
    weights = _weights(config, num_tokens=batch, num_logits=batch, without=without)
    return weights if "attention" in without else weights + _attention(config, num_rows=batch, held=context, num_new=1)


def prefill_work(config: ModelConfig, *, num_tokens: int, num_rows: int = 1, without: Collection[Stage] = ()) -> Work:
    """Prompts of `num_tokens` each read from their beginnings, and the logits after their last tokens."""
    weights = _weights(config, num_tokens=num_rows * num_tokens, num_logits=num_rows, without=without)
    if "attention" in without:
        return weights
    return weights + _attention(config, num_rows=num_rows, held=0, num_new=num_tokens)


def training_flops(config: ModelConfig, *, num_tokens: int, num_rows: int, adapter_values: int | None) -> Number:
    """One update by `num_rows` rows of `num_tokens`: what the model asks for, nothing computed twice.

    Forward, the gradients of all activations, and the gradients of all weights or, if `adapter_values` is not None, of
    so many values of adapters on frozen weights. An expert's adapter counts for the tokens that choose it.

    Example:
        >>> from gptoss_jax.config import gpt_oss_20b
        >>> flops = training_flops(gpt_oss_20b(), num_tokens=2048, num_rows=1, adapter_values=None)
        >>> round(flops / 1e12, 1)
        45.7
    """
    tokens = num_tokens * num_rows
    forward = _weights(config, num_tokens=tokens, num_logits=tokens, without=()).flops
    attention = _attention(config, num_rows=num_rows, held=0, num_new=num_tokens).flops
    if adapter_values is None:
        return 3 * (forward + attention)
    return 2 * forward + 3 * attention + 3 * _PER_PRODUCT * tokens * adapter_values


def experts_work(
    config: ModelConfig, part: Literal["gate_up", "down"], *, num_tokens: int, num_touched: Number
) -> Work:
    """One of a layer's two expert matrices, for tokens that chose `num_touched` experts."""
    packed = [parameter for path, parameter in _layer(config).items() if f".experts.{part}." in path]
    return Work(
        bytes=sum(parameter.num_bytes for parameter in packed) * num_touched / config.num_experts,
        flops=_PER_PRODUCT * num_tokens * config.experts_per_token * _values(packed) / config.num_experts,
    )


def attention_work(config: ModelConfig, kind: LayerKind, *, num_rows: int, held: Number, num_new: int) -> Work:
    """One layer's attention over the cache: `num_new` queries a row after `held` tokens, without the projections."""
    seen, reached = _visible(config, kind, held=held, num_new=num_new)
    width = config.head_dim
    return Work(
        bytes=num_rows * reached * 2 * config.num_kv_heads * width * _KV_BYTES,
        flops=num_rows * seen * 2 * _PER_PRODUCT * config.num_heads * width,
    )


def _visible(config: ModelConfig, kind: LayerKind, *, held: Number, num_new: int) -> tuple[Number, Number]:
    """Pairs of query and visible key in one row, and how many keys are visible to at least one of its queries."""
    window = config.sliding_window if kind == "sliding_attention" else math.inf
    first, last = held + 1, held + num_new  # keys that the first and the last query would see without a window
    if window >= last:
        return num_new * (first + last) / 2, last
    growing = max(0.0, window - held)  # queries whose keys have not reached the window yet
    pairs = growing * (first + window) / 2 + (num_new - growing) * window
    return pairs, min(last, window + num_new - 1)


def _attention(config: ModelConfig, *, num_rows: int, held: Number, num_new: int) -> Work:
    layers = (
        attention_work(config, kind, num_rows=num_rows, held=held, num_new=num_new) for kind in config.layer_kinds
    )
    return sum(layers, start=Work(0, 0))


def _stage(path: str) -> Stage | None:
    """Which stage reads a parameter; the embedding belongs to none."""
    if path == "embedding.weight":
        return None
    return next(stage for stage, parts in _PARTS.items() if any(part in f".{path}" for part in parts))


def _weights(config: ModelConfig, *, num_tokens: int, num_logits: int, without: Collection[Stage]) -> Work:
    """Every matrix but the embedding, of which only the tokens' rows are read, and those of stages left out."""
    total = Work(2 * num_tokens * config.hidden_size, 0)
    touched = experts_touched(config, num_tokens)
    for path, parameter in parameters(config).items():
        stage = _stage(path)
        if stage is None or stage in without:
            continue
        read, uses = 1.0, num_tokens
        if ".experts." in path:
            read, uses = touched / config.num_experts, num_tokens * config.experts_per_token / config.num_experts
        elif path == "unembedding.weight":
            uses = num_logits
        total += Work(parameter.num_bytes * read, _PER_PRODUCT * _values([parameter]) * uses)
    return total


def _values(matrices: list[Parameter]) -> int:
    """Entries that are multiplied by: those of matrices, not of biases, norms and sinks."""
    return sum(parameter.num_values for parameter in matrices if parameter.leaf in ("weight", "blocks"))


def _layer(config: ModelConfig) -> dict[str, Parameter]:
    return {path: parameter for path, parameter in parameters(config).items() if path.startswith("layers.0.")}
