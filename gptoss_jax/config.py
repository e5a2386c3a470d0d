"""What the model is: its architecture and nothing else (no placement, no sampling, no dtype).

The legend of the letters that name dims, here and in every annotation, einsum and sharding rule:

    B batch row      T query token       S key/value slot (cache length)     L layer      V vocabulary
    D model width    N query head        K kv head      G = N // K           H head width
    E expert         F expert width      A active experts per token          M = B*T*A dispatched rows
    J MX block along the contracted dim (32 values: 16 bytes + 1 scale)      P page of the cache
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from gptoss_jax.errors import ConfigError

LayerKind = Literal["sliding_attention", "full_attention"]

# Hugging Face keys that say nothing about the architecture, and those this architecture fixes to one value.
_IGNORED = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype",
        "eos_token_id", "id2label", "initializer_range", "is_encoder_decoder", "label2id", "output_attentions",
        "output_hidden_states", "output_router_logits", "pad_token_id", "problem_type", "quantization_config",
        "return_dict", "router_aux_loss_coef", "torch_dtype", "transformers_version", "use_cache",
    }
)  # fmt: skip
_FIXED = {"model_type": "gpt_oss", "attention_bias": True, "tie_word_embeddings": False, "hidden_act": "silu"}
# JSON knows Infinity and integers of any length; every number of an architecture is far below this.
_LARGEST = 1 << 53
_MOST_LAYERS = 1 << 12

MX_BLOCK = 32
"""Values that share one scale byte."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of one gpt-oss model.

    Example:
        >>> config = gpt_oss_20b()
        >>> config.num_layers, config.num_experts, config.head_dim
        (24, 32, 64)
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    num_experts: int
    experts_per_token: int
    vocab_size: int
    layer_kinds: tuple[LayerKind, ...]
    sliding_window: int
    """Keys a sliding layer sees, the query's own included."""
    max_context: int
    original_context: int
    """Context the rotary frequencies were trained for, before YaRN stretched it."""
    rope_theta: float
    rope_factor: float
    rope_beta_fast: float
    rope_beta_slow: float
    rms_norm_eps: float
    swiglu_alpha: float
    swiglu_limit: float

    def __post_init__(self) -> None:
        def check(holds: bool, what: str) -> None:
            if not holds:
                raise ConfigError(f"impossible architecture: {what}", where="config", fix="correct the config")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float):
                check(0 < value < math.inf, f"{field.name} is {value}")
        check(
            len(self.layer_kinds) == self.num_layers, f"{len(self.layer_kinds)} layer kinds, {self.num_layers} layers"
        )
        check(self.num_heads % self.num_kv_heads == 0, f"{self.num_heads} query heads, {self.num_kv_heads} kv heads")
        check(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd, rotary embedding pairs its dims")
        check(self.experts_per_token <= self.num_experts, f"{self.experts_per_token} of {self.num_experts} experts")
        for name in ("hidden_size", "intermediate_size"):
            size = getattr(self, name)
            check(size % MX_BLOCK == 0, f"{name} {size} is no multiple of the {MX_BLOCK}-value MXFP4 block")

    @classmethod
    def from_json(cls, source: Mapping[str, Any], *, where: str = "config.json") -> "ModelConfig":
        """Read a parsed config.json: Hugging Face's (transformers 4 or 5 spelling) or `original/`'s.

        Raises ConfigError naming every key that is missing, unknown, or set to what this architecture is not.
        """
        read = _Reader(source, where)
        is_hugging_face = "model_type" in source or "num_local_experts" in source
        fields = _hugging_face(read) if is_hugging_face else _original(read)
        read.refuse_leftovers()
        try:
            return cls(**fields)
        except ConfigError as impossible:  # which does not know the file
            raise ConfigError(impossible.what, where=where, fix="use the published config.json") from impossible

    @classmethod
    def read(cls, path: Path) -> "ModelConfig":
        """Read the config.json at `path`."""
        try:
            parsed = json.loads(path.read_text())
        except FileNotFoundError as missing:
            raise ConfigError("no config.json", where=str(path), fix="name a checkpoint folder") from missing
        except (ValueError, RecursionError) as broken:
            raise ConfigError(f"not JSON ({broken})", where=str(path), fix="download it again") from broken
        if not isinstance(parsed, dict):
            raise ConfigError("not a JSON object", where=str(path), fix="download it again")
        return cls.from_json(parsed, where=str(path))

    def first_layers(self, count: int) -> "ModelConfig":
        """The same architecture with its first `count` layers only.

        Example:
            >>> gpt_oss_20b().first_layers(2).layer_kinds
            ('sliding_attention', 'full_attention')
        """
        return dataclasses.replace(self, num_layers=count, layer_kinds=self.layer_kinds[:count])

    def to_json(self) -> dict[str, Any]:
        """The Hugging Face config.json of this architecture; `from_json` of it gives the same config."""
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "attention_bias": True,
            "attention_dropout": 0.0,
            "eos_token_id": 200002,
            "pad_token_id": 199999,
            "experts_per_token": self.experts_per_token,
            "num_experts_per_tok": self.experts_per_token,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initial_context_length": self.original_context,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "layer_types": list(self.layer_kinds),
            "max_position_embeddings": self.max_context,
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "num_local_experts": self.num_experts,
            "output_router_logits": False,
            "quantization_config": {
                "modules_to_not_convert": [
                    "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
                ],
                "quant_method": "mxfp4",
            },
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": {
                "beta_fast": self.rope_beta_fast,
                "beta_slow": self.rope_beta_slow,
                "factor": self.rope_factor,
                "original_max_position_embeddings": self.original_context,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": self.rope_theta,
            "router_aux_loss_coef": 0.9,
            "sliding_window": self.sliding_window,
            "swiglu_alpha": self.swiglu_alpha,
            "swiglu_limit": self.swiglu_limit,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }  # fmt: skip


class _Reader:
    """Hands out the keys of one JSON object and knows which nobody asked for."""

    def __init__(self, source: Mapping[str, Any], where: str) -> None:
        self.left = dict(source)
        self.where = where

    def __call__(self, key: str, default: Any = None) -> Any:
        if key not in self.left and default is None:
            raise ConfigError(f"key {key!r} is missing", where=self.where, fix="use the published config.json")
        return self.left.pop(key, default)

    def integer(self, key: str) -> int:
        value = self(key)
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > _LARGEST:
            raise ConfigError(
                f"{key} is {value!r:.60}, no integer", where=self.where, fix="use the published config.json"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _LARGEST:  # NaN neither
            raise ConfigError(
                f"{key} is {value!r:.60}, no number", where=self.where, fix="use the published config.json"
            )
        return float(value)

    def layer_kinds(self, num_layers: int) -> tuple[LayerKind, ...]:
        """`layer_types`, or the alternation that a config.json without it stands for."""
        if "layer_types" not in self.left:
            if num_layers > _MOST_LAYERS:
                raise ConfigError(
                    f"num_hidden_layers is {num_layers}", where=self.where, fix="use the published config.json"
                )
            return _alternating(num_layers)
        kinds = self("layer_types")
        known = get_args(LayerKind)
        if not isinstance(kinds, list) or not all(kind in known for kind in kinds):
            raise ConfigError(
                f"layer_types is {kinds!r:.60}", where=self.where, fix=f"list one of {known} for each layer"
            )
        return tuple(kinds)

    def same(self, key: str, other: str, value: int) -> None:
        """Take a key that may be left out, and may not contradict the `value` that `other` has."""
        found = self(key, value)
        if found != value:
            raise ConfigError(
                f"{key} is {found!r}, {other} is {value!r}", where=self.where, fix="use the published config.json"
            )

    def nested(self, key: str) -> "_Reader":
        value = self(key)
        if not isinstance(value, dict):
            raise ConfigError(f"key {key!r} is no object", where=self.where, fix="use the published config.json")
        return _Reader(value, f"{self.where}[{key}]")

    def expect(self, key: str, value: Any, *, default: Any = None) -> None:
        found = self(key, default)
        if found != value:
            raise ConfigError(
                f"{key} is {found!r}, gpt-oss has {value!r}", where=self.where, fix="only gpt-oss models are supported"
            )

    def refuse_leftovers(self) -> None:
        if self.left:
            raise ConfigError(
                f"unknown keys {sorted(self.left)}", where=self.where, fix="use the published config.json"
            )


def _hugging_face(read: _Reader) -> dict[str, Any]:
    for key, value in _FIXED.items():
        read.expect(key, value, default=value)
    fields: dict[str, Any] = {
        "num_layers": read.integer("num_hidden_layers"),
        "hidden_size": read.integer("hidden_size"),
        "num_heads": read.integer("num_attention_heads"),
        "num_kv_heads": read.integer("num_key_value_heads"),
        "head_dim": read.integer("head_dim"),
        "intermediate_size": read.integer("intermediate_size"),
        "num_experts": read.integer("num_local_experts"),
        "experts_per_token": read.integer(
            "experts_per_token" if "experts_per_token" in read.left else "num_experts_per_tok"
        ),
        "vocab_size": read.integer("vocab_size"),
        "sliding_window": read.integer("sliding_window"),
        "max_context": read.integer("max_position_embeddings"),
        "rms_norm_eps": read.number("rms_norm_eps"),
        "swiglu_alpha": read.number("swiglu_alpha", 1.702),
        "swiglu_limit": read.number("swiglu_limit", 7.0),
    }
    fields["layer_kinds"] = read.layer_kinds(fields["num_layers"])
    read.same("num_experts_per_tok", "experts_per_token", fields["experts_per_token"])
    if "rope_parameters" in read.left:  # transformers 5
        rope = read.nested("rope_parameters")
        fields["rope_theta"] = rope.number("rope_theta")
    else:
        rope = read.nested("rope_scaling")
        fields["rope_theta"] = read.number("rope_theta")
    rope.expect("rope_type", "yarn")
    rope.expect("truncate", False)
    fields |= {
        "rope_factor": rope.number("factor"),
        "rope_beta_fast": rope.number("beta_fast"),
        "rope_beta_slow": rope.number("beta_slow"),
        "original_context": rope.integer("original_max_position_embeddings"),
    }
    rope.refuse_leftovers()
    read.same("initial_context_length", "original_max_position_embeddings", fields["original_context"])
    for key in _IGNORED:
        read.left.pop(key, None)
    return fields


def _original(read: _Reader) -> dict[str, Any]:
    num_layers = read.integer("num_hidden_layers")
    original_context = read.integer("initial_context_length")
    rope_factor = read.number("rope_scaling_factor")
    return {
        "num_layers": num_layers,
        "hidden_size": read.integer("hidden_size"),
        "num_heads": read.integer("num_attention_heads"),
        "num_kv_heads": read.integer("num_key_value_heads"),
        "head_dim": read.integer("head_dim"),
        "intermediate_size": read.integer("intermediate_size"),
        "num_experts": read.integer("num_experts"),
        "experts_per_token": read.integer("experts_per_token"),
        "vocab_size": read.integer("vocab_size"),
        "sliding_window": read.integer("sliding_window"),
        "layer_kinds": read.layer_kinds(num_layers),
        "max_context": int(original_context * rope_factor),
        "original_context": original_context,
        "rope_theta": read.number("rope_theta"),
        "rope_factor": rope_factor,
        "rope_beta_fast": read.number("rope_ntk_beta"),
        "rope_beta_slow": read.number("rope_ntk_alpha"),
        "swiglu_limit": read.number("swiglu_limit", 7.0),
        # Hard-coded in openai/gpt-oss gpt_oss/torch/model.py, absent from its config.json.
        "swiglu_alpha": 1.702,
        "rms_norm_eps": 1e-5,
    }


def _alternating(num_layers: int) -> tuple[LayerKind, ...]:
    """Even layers slide, odd layers see everything (openai/gpt-oss gpt_oss/torch/model.py)."""
    return tuple("sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(num_layers))


def _published(num_layers: int, num_experts: int) -> ModelConfig:
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=2880,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        intermediate_size=2880,
        num_experts=num_experts,
        experts_per_token=4,
        vocab_size=201088,
        layer_kinds=_alternating(num_layers),
        sliding_window=128,
        max_context=131072,
        original_context=4096,
        rope_theta=150000.0,
        rope_factor=32.0,
        rope_beta_fast=32.0,
        rope_beta_slow=1.0,
        rms_norm_eps=1e-5,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
    )


def gpt_oss_20b() -> ModelConfig:
    """The architecture of openai/gpt-oss-20b."""
    return _published(num_layers=24, num_experts=32)


def gpt_oss_120b() -> ModelConfig:
    """The architecture of openai/gpt-oss-120b."""
    return _published(num_layers=36, num_experts=128)
