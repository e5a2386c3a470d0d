"""What a published checkpoint has beside its tensors: the JSON files of each layout, and how its shards are named."""

from pathlib import Path
from typing import Any

from convert.layouts import LayoutName, SourceTensor, source_tensors
from convert.safetensors_writer import write_json
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import ConversionError
from gptoss_jax.manifest import CONFIG

GENERATION = {
    "bos_token_id": 199998,
    "do_sample": True,
    "eos_token_id": [200002, 199999, 200012],
    "pad_token_id": 199999,
}
"""The published generation_config.json, but for the version of transformers."""


def write_configs(directory: Path, config: ModelConfig, layout: LayoutName) -> None:
    """Write config.json, and what the layout has beside it: generation_config.json, or dtypes.json in `original/`.

    Raises ConversionError for an architecture that the layout has no words for.
    """
    if layout == "original":
        write_json(directory / CONFIG, original_config(config))
        dtypes = {name: _published_dtype(tensor) for name, tensor in source_tensors(config, layout).items()}
        write_json(directory / "dtypes.json", dtypes)
        return
    content = config.to_json()
    if layout == "bf16":
        del content["quantization_config"]
        content["torch_dtype"] = "bfloat16"  # which transformers takes for float32 when nothing is said
    write_json(directory / CONFIG, content)
    write_json(directory / "generation_config.json", GENERATION)


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


def shard_names(layout: LayoutName, num_shards: int, *, first: int = 1) -> list[str]:
    """File names that count from `first`: `original/` with two hyphens, a single file without a number.

    Hugging Face's programs count from 1, as `original/` does; the published root folders count from 0 up to the number
    they name.

    Example:
        >>> shard_names("hugging_face", 2)
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    if num_shards == 1:
        return ["model.safetensors"]
    hyphens, last = "--" if layout == "original" else "-", first + num_shards - 1
    return [f"model{hyphens}{k:05}-of-{last:05}.safetensors" for k in range(first, last + 1)]


def _published_dtype(tensor: SourceTensor) -> str:
    return {"blocks": "FP4", "scales": "UE8"}.get(tensor.holds[0].leaf, "BF16")
