"""The tiny architecture of the tests: every dim different, so that a swapped pair of dims cannot pass."""

from gptoss_jax.config import ModelConfig

TINY = ModelConfig(
    num_layers=4,
    hidden_size=96,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=64,
    num_experts=10,
    experts_per_token=5,
    vocab_size=130,
    layer_kinds=("sliding_attention", "full_attention", "sliding_attention", "full_attention"),
    sliding_window=7,
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
