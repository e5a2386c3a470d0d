"""Describe a checkpoint, published or converted: what it is, how large, and what it fits into.

Reads headers and manifests only. The figures come from the architecture, which the files have been checked against.
"""

import collections
import dataclasses
import math
from pathlib import Path
from typing import Any

from convert.progress import format_bytes
from convert.source import open_source
from gptoss_jax.config import ModelConfig
from gptoss_jax.manifest import CONFIG, is_converted, partial_directory, read_manifest
from gptoss_jax.parameters import Parameter, num_active_parameters, num_parameters, parameters

MEMORY_GB = (16, 24, 48, 80, 141)
"""Of common accelerators."""
CONTEXTS = (4096, 32768, 131072)
_FREE_SHARE = 0.1
"""Of the memory, left to activations and the runtime."""
_BFLOAT16_BYTES = 2
# First match wins: the start of a path inside its layer, and the group it is listed in.
_GROUPS = (
    ("experts.", "experts"),
    ("router.", "router"),
    ("attention.", "attention"),
    ("attention_norm.", "norms"),
    ("experts_norm.", "norms"),
    ("norm.", "norms"),
    ("embedding.", "embedding"),
    ("unembedding.", "unembedding"),
)


@dataclasses.dataclass(frozen=True)
class Group:
    """The parameters of one kind, over all layers."""

    name: str
    num_arrays: int
    num_parameters: int
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSize:
    """Bytes of keys and values that one sequence needs in bfloat16."""

    bytes_per_token: int
    """In the full-attention layers; they keep every token."""
    fixed_bytes: int
    """In the sliding layers; they keep one window."""

    def num_bytes(self, num_tokens: int) -> int:
        return self.bytes_per_token * num_tokens + self.fixed_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What `inspect` found; `str` of it is a page of tables."""

    path: str
    form: str
    """The layout of published files, or "converted (Orbax)"."""
    config: ModelConfig
    num_parameters: int
    num_active_parameters: int
    """That one token is multiplied by."""
    num_bytes: int
    bytes_by_dtype: dict[str, int]
    files: tuple[tuple[str, int], ...]
    groups: tuple[Group, ...]
    cache: CacheSize

    def sequences(self, memory_gb: int, context: int) -> int:
        """How many sequences of `context` tokens fit beside the weights; -1 when the weights alone do not."""
        room = memory_gb * 1e9 * (1 - _FREE_SHARE) - self.num_bytes
        return math.floor(room / self.cache.num_bytes(context)) if room >= 0 else -1

    def to_json(self) -> dict[str, Any]:
        """For programs: the same figures."""
        fits = [
            {"memory_gb": memory, "context": context, "sequences": max(self.sequences(memory, context), 0)}
            for memory in MEMORY_GB
            for context in CONTEXTS
        ]
        return {**dataclasses.asdict(self), "config": self.config.to_json(), "fits": fits}

    def __str__(self) -> str:
        return "\n".join([*self._summary(), "", *self._group_table(), "", *self._fit_table()])

    def _summary(self) -> list[str]:
        config = self.config
        dtypes = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.bytes_by_dtype.items())
        names = ", ".join(name for name, _ in self.files)
        return [
            f"{self.path}: {self.form}",
            f"  {config.num_layers} layers, width {config.hidden_size}, {config.num_heads} query and "
            f"{config.num_kv_heads} kv heads of {config.head_dim}, vocabulary {config.vocab_size}",
            f"  {config.num_experts} experts of width {config.intermediate_size}, "
            f"{config.experts_per_token} for each token; context {config.max_context}, window {config.sliding_window}",
            f"  parameters {self.num_parameters:,}, active for one token {self.num_active_parameters:,}",
            f"  bytes {self.num_bytes:,}: {dtypes}",
            f"  {len(self.files)} files: {names}",
            f"  cache: {self.cache.bytes_per_token:,} bytes a token and {self.cache.fixed_bytes:,} a sequence",
        ]

    def _group_table(self) -> list[str]:
        rows = [
            [group.name, f"{group.num_arrays}", f"{group.num_parameters:,}", f"{group.num_bytes:,}"]
            for group in self.groups
        ]
        return _table(["group", "arrays", "parameters", "bytes"], rows)

    def _fit_table(self) -> list[str]:
        rows = []
        for memory in MEMORY_GB:
            counts = [self.sequences(memory, context) for context in CONTEXTS]
            rows.append([f"{memory} GB", *("weights do not fit" if count < 0 else f"{count:,}" for count in counts)])
        header = ["one device", *(f"sequences of {context:,}" for context in CONTEXTS)]
        return [*_table(header, rows), f"  ({_FREE_SHARE:.0%} of the memory left to activations; bfloat16 cache)"]


def inspect(path: str | Path) -> Report:
    """Describe the checkpoint at `path`: a converted directory, a published folder, or hf://owner/name."""
    directory = Path(path)
    if is_converted(directory) or (not directory.exists() and partial_directory(directory).exists()):
        manifest = read_manifest(directory)
        config = ModelConfig.read(directory / CONFIG)
        files = tuple((file.name, file.num_bytes) for file in manifest.source_files)
        return _report(str(path), f"converted (Orbax) from the {manifest.layout} layout", config, files)
    source = open_source(path)
    files = tuple((file.name, file.num_bytes) for file in source.files())
    report = _report(str(path), f"safetensors, {source.layout} layout", source.config, files)
    if source.layout == "bf16":
        bytes_by_dtype = {"bfloat16": source.num_bytes}
        return dataclasses.replace(report, num_bytes=source.num_bytes, bytes_by_dtype=bytes_by_dtype)
    return report


def cache_size(config: ModelConfig) -> CacheSize:
    """The key/value cache of one sequence."""
    layer_bytes = 2 * config.num_kv_heads * config.head_dim * _BFLOAT16_BYTES
    kinds = collections.Counter(config.layer_kinds)
    return CacheSize(
        bytes_per_token=kinds["full_attention"] * layer_bytes,
        fixed_bytes=kinds["sliding_attention"] * layer_bytes * config.sliding_window,
    )


def _report(path: str, form: str, config: ModelConfig, files: tuple[tuple[str, int], ...]) -> Report:
    tree = parameters(config).values()
    by_dtype: collections.Counter[str] = collections.Counter()
    for parameter in tree:
        by_dtype[{"blocks": "FP4 blocks", "scales": "E8M0 scales"}.get(parameter.leaf, "bfloat16")] += (
            parameter.num_bytes
        )
    return Report(
        path=path,
        form=form,
        config=config,
        num_parameters=num_parameters(config),
        num_active_parameters=num_active_parameters(config),
        num_bytes=sum(by_dtype.values()),
        bytes_by_dtype=dict(by_dtype),
        files=files,
        groups=_groups(list(tree)),
        cache=cache_size(config),
    )


def _groups(tree: list[Parameter]) -> tuple[Group, ...]:
    members: dict[str, list[Parameter]] = {name: [] for _, name in _GROUPS}
    for parameter in tree:
        inside = parameter.path.split(".", 2)[2] if parameter.path.startswith("layers.") else parameter.path
        members[next(name for start, name in _GROUPS if inside.startswith(start))].append(parameter)
    return tuple(
        Group(name, len(group), sum(p.num_values for p in group), sum(p.num_bytes for p in group))
        for name, group in members.items()
    )


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for first, *rest in [header, *rows]:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells))
    return lines
