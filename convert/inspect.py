"""Describe a checkpoint, published or converted: what it is, how large, and what it fits into.

Reads headers and manifests only. The figures come from the architecture, which the files have been checked against.
"""

import collections
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax

from convert.progress import format_bytes
from convert.source import HUB_PREFIX, open_source
from convert.table import table
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import CheckpointError
from gptoss_jax.generation.generate import PREFILL_TOKENS
from gptoss_jax.manifest import CONFIG, is_converted, is_partial, partial_directory, read_manifest
from gptoss_jax.model.cache import Cache
from gptoss_jax.parameters import Parameter, num_active_parameters, num_parameters, parameters

MEMORY_GB = (16, 24, 48, 80, 141)
"""Of common accelerators."""
CONTEXTS = (4096, 32768, 131072)
CHUNK, HOPPER_CHUNK = 512, PREFILL_TOKENS["hopper"]
"""Tokens of a prompt that `generate` reads at a time: on a CPU, on a Hopper GPU. A sliding layer's ring holds them."""
_FREE_SHARE = 0.1
"""Of the memory, left to activations and the runtime."""
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
    """The safetensors files, name and bytes; of a converted directory those it was made from."""
    is_converted: bool
    groups: tuple[Group, ...]
    cache_bytes: dict[int, int]
    """Of the keys and values of one sequence in bfloat16, by its tokens, its prompt read `cache_chunk` at a time."""
    hopper_cache_bytes: dict[int, int]
    """The same where a prompt is read alone on a Hopper GPU, `hopper_cache_chunk` tokens at a time."""
    cache_chunk: int = CHUNK
    hopper_cache_chunk: int = HOPPER_CHUNK

    def sequences(self, memory_gb: int, context: int) -> int:
        """How many sequences of `context` tokens fit beside the weights; -1 when the weights alone do not.

        Prompts are read `cache_chunk` tokens at a time.
        """
        room = memory_gb * 1e9 * (1 - _FREE_SHARE) - self.num_bytes
        return math.floor(room / self.cache_bytes[context]) if room >= 0 else -1

    def to_json(self) -> dict[str, Any]:
        """For programs: the same figures."""
        fits = [
            {"memory_gb": memory, "context": context, "sequences": max(self.sequences(memory, context), 0)}
            for memory in MEMORY_GB
            for context in self.cache_bytes
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
            f"  {'converted from ' if self.is_converted else ''}{len(self.files)} files: {names}",
            "  cache of one sequence:",
            f"    {_sizes(self.cache_bytes)}, read {self.cache_chunk} at a time (a CPU)",
            f"    {_sizes(self.hopper_cache_bytes)}, read {self.hopper_cache_chunk} at a time (a Hopper GPU)",
        ]

    def _group_table(self) -> list[str]:
        rows = [
            [group.name, f"{group.num_arrays}", f"{group.num_parameters:,}", f"{group.num_bytes:,}"]
            for group in self.groups
        ]
        return table(["group", "arrays", "parameters", "bytes"], rows)

    def _fit_table(self) -> list[str]:
        rows = []
        for memory in MEMORY_GB:
            counts = [self.sequences(memory, context) for context in self.cache_bytes]
            rows.append([f"{memory} GB", *("weights do not fit" if count < 0 else f"{count:,}" for count in counts)])
        header = ["one device", *(f"sequences of {context:,}" for context in self.cache_bytes)]
        more = max(size - self.cache_bytes[context] for context, size in self.hopper_cache_bytes.items())
        return [
            *table(header, rows),
            f"  ({_FREE_SHARE:.0%} of the memory left to activations; bfloat16 cache; prompts read {self.cache_chunk} "
            f"tokens at a time, or {self.hopper_cache_chunk} over all",
            f"  sequences on a Hopper GPU, which takes up to {format_bytes(more)} more in all)",
        ]


def inspect(path: str | Path) -> Report:
    """Describe the checkpoint at `path`: a converted directory or a published folder."""
    if str(path).startswith(HUB_PREFIX):  # which would be downloaded whole, for its headers
        raise CheckpointError(
            "not on this machine", where=str(path), fix="run gptoss-jax convert on it and inspect the result"
        )
    directory = Path(path)
    is_unfinished = is_partial(directory) if directory.exists() else partial_directory(directory).exists()
    if is_converted(directory) or is_unfinished:
        manifest = read_manifest(directory)
        config = ModelConfig.read(directory / CONFIG)
        files = tuple((file.name, file.num_bytes) for file in manifest.source_files)
        return _report(
            str(path), f"converted (Orbax) from the {manifest.layout} layout", config, files, is_converted=True
        )
    source = open_source(path)
    files = tuple((file.name, file.num_bytes) for file in source.files())
    report = _report(str(path), f"safetensors, {source.layout} layout", source.config, files)
    if source.layout == "bf16":
        bytes_by_dtype = {"bfloat16": source.num_bytes}
        return dataclasses.replace(report, num_bytes=source.num_bytes, bytes_by_dtype=bytes_by_dtype)
    return report


def cache_bytes(config: ModelConfig, *, chunk: int = CHUNK) -> dict[int, int]:
    """Bytes of the keys and values of one sequence in bfloat16, by its tokens; `chunk` of them are read at a time."""
    lengths = [length for length in CONTEXTS if length <= config.max_context] or [config.max_context]
    create = functools.partial(Cache.create, config, batch=1, max_chunk=chunk)
    return {length: jax.eval_shape(functools.partial(create, max_length=length)).nbytes for length in lengths}


def _report(
    path: str, form: str, config: ModelConfig, files: tuple[tuple[str, int], ...], *, is_converted: bool = False
) -> Report:
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
        is_converted=is_converted,
        cache_bytes=cache_bytes(config),
        hopper_cache_bytes=cache_bytes(config, chunk=HOPPER_CHUNK),
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


def _sizes(by_length: dict[int, int]) -> str:
    return ", ".join(f"{format_bytes(size)} for {length:,} tokens" for length, size in by_length.items())
