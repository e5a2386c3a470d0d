import dataclasses
import json

import pytest

from gptoss_jax.config import ModelConfig, gpt_oss_20b, gpt_oss_120b
from gptoss_jax.errors import ConfigError
from tests.tiny import TINY

ORIGINAL_20B = {
    "num_hidden_layers": 24, "num_experts": 32, "experts_per_token": 4, "vocab_size": 201088, "hidden_size": 2880,
    "intermediate_size": 2880, "swiglu_limit": 7.0, "head_dim": 64, "num_attention_heads": 64,
    "num_key_value_heads": 8, "sliding_window": 128, "initial_context_length": 4096, "rope_theta": 150000,
    "rope_scaling_factor": 32.0, "rope_ntk_alpha": 1, "rope_ntk_beta": 32,
}  # fmt: skip
PUBLISHED_20B = gpt_oss_20b().to_json() | {"transformers_version": "4.55.0.dev0"}
del PUBLISHED_20B["swiglu_alpha"]  # newer than the published file


def transformers_5(config: dict) -> dict:
    """The same config as transformers 5 writes it."""
    rope = config["rope_scaling"] | {"rope_theta": config["rope_theta"]}
    rest = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta")}
    return rest | {"rope_parameters": rope, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    "source",
    [ORIGINAL_20B, PUBLISHED_20B, transformers_5(PUBLISHED_20B)],
    ids=["original", "hugging face", "transformers 5"],
)
def test_every_published_spelling_reads_as_the_20b(source):
    assert ModelConfig.from_json(source) == gpt_oss_20b()


def test_swiglu_limit_may_be_left_out():
    source = {key: value for key, value in ORIGINAL_20B.items() if key != "swiglu_limit"}
    assert ModelConfig.from_json(source).swiglu_limit == 7.0


@pytest.mark.parametrize("config", [gpt_oss_20b(), gpt_oss_120b(), TINY], ids=["20b", "120b", "tiny"])
def test_reading_what_was_written_gives_the_same(config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_json()))
    assert ModelConfig.read(path) == config


@pytest.mark.parametrize("source", [ORIGINAL_20B, PUBLISHED_20B], ids=["original", "hugging face"])
def test_a_missing_key_is_named(source):
    for key in ("num_hidden_layers", "head_dim", "sliding_window", "rope_theta"):
        rest = {name: value for name, value in source.items() if name != key}
        with pytest.raises(ConfigError, match=f"key '{key}' is missing: config.json: "):
            ModelConfig.from_json(rest)


@pytest.mark.parametrize("source", [ORIGINAL_20B, PUBLISHED_20B], ids=["original", "hugging face"])
def test_an_unknown_key_is_named(source):
    with pytest.raises(ConfigError, match=r"unknown keys \['num_shared_experts'\]: config.json: "):
        ModelConfig.from_json(source | {"num_shared_experts": 1})


def test_an_unknown_rope_key_is_named():
    rope = PUBLISHED_20B["rope_scaling"] | {"mscale": 1.0}
    with pytest.raises(ConfigError, match=r"unknown keys \['mscale'\]: config.json\[rope_scaling\]"):
        ModelConfig.from_json(PUBLISHED_20B | {"rope_scaling": rope})


@pytest.mark.parametrize(
    ("key", "value"),
    [("model_type", "llama"), ("attention_bias", False), ("tie_word_embeddings", True), ("hidden_act", "gelu")],
)
def test_another_architecture_is_refused(key, value):
    with pytest.raises(ConfigError, match=f"{key} is {value!r}, gpt-oss has"):
        ModelConfig.from_json(PUBLISHED_20B | {key: value})


def test_truncated_yarn_is_refused():
    rope = PUBLISHED_20B["rope_scaling"] | {"truncate": True}
    with pytest.raises(ConfigError, match="truncate is True"):
        ModelConfig.from_json(PUBLISHED_20B | {"rope_scaling": rope})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "4 layer kinds, 3 layers"),
        ({"num_kv_heads": 4}, "6 query heads, 4 kv heads"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"experts_per_token": 11, "num_experts_per_tok": 11}, "11 of 10 experts"),
        ({"hidden_size": 100}, "hidden_size 100 is no multiple"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5, no integer"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', no number"),
        ({"layer_kinds": ["linear"] * 4}, r"layer_types is \['linear', "),
        ({"layer_kinds": 5}, "layer_types is 5"),
        ({"layer_kinds": None}, "layer_types is None"),
        ({"layer_kinds": [["a"]]}, r"layer_types is \[\['a'\]\]"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf, no number"),
        ({"rope_theta": float("nan")}, "rope_theta is nan, no number"),
        ({"vocab_size": 10**400}, "vocab_size is 10+, no integer"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok is 6, experts_per_token is 5"),
        ({"initial_context_length": 8192}, "initial_context_length is 8192, original_max_position_embeddings is 4096"),
    ],
    ids=str,
)
def test_an_impossible_architecture_is_refused(change, message):
    # Through JSON, as users meet it: annotations are not checked there.
    written = {
        "num_layers": "num_hidden_layers", "num_kv_heads": "num_key_value_heads", "layer_kinds": "layer_types",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=f"{message}.*: here/config.json: "):
        ModelConfig.from_json(
            TINY.to_json() | {written.get(key, key): value for key, value in change.items()}, where="here/config.json"
        )


def test_an_absurd_number_of_layers_costs_nothing():
    for source in (ORIGINAL_20B, {key: value for key, value in PUBLISHED_20B.items() if key != "layer_types"}):
        with pytest.raises(ConfigError, match=r"num_hidden_layers is 1000000000000: config\.json"):
            ModelConfig.from_json(source | {"num_hidden_layers": 10**12})
    with pytest.raises(ConfigError, match="24 layer kinds, 1000000000000 layers"):
        ModelConfig.from_json(PUBLISHED_20B | {"num_hidden_layers": 10**12})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("9" * 5000, "not JSON"),
        ("[1]", "not a JSON object"),
    ],
    ids=range(5),
)
def test_an_unreadable_file_is_refused(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        ModelConfig.read(path)


def test_config_has_no_defaults():
    fields = dataclasses.fields(ModelConfig)
    assert all(
        field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING for field in fields
    )
