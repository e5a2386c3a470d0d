"""The tiny architecture of the tests: every dim different, so that a swapped pair of dims cannot pass."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptoss_jax.config import ModelConfig
from gptoss_jax.model.transformer import Transformer, abstract, fill, leaves
from pallas_kernels.dispatch import Impl

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


def random_model(
    config: ModelConfig = TINY,
    *,
    mesh: Mesh | None = None,
    dtype=jnp.float32,
    seed: int = 0,
    spread: float = 0.1,
    scale_bytes: tuple[int, int] = (118, 123),
    impl: Impl = "auto",
) -> Transformer:
    """A model with NumPy's random weights: the same on every mesh and in every dtype, and nothing to compile.

    `spread` is the matrices' standard deviation, `scale_bytes` the experts' (the second left out).
    """
    random = np.random.default_rng(seed)
    model = abstract(config, mesh=mesh, dtype=dtype, impl=impl)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith("blocks"):
            return random.integers(0, 256, shape, np.uint8)
        if path.endswith("scales"):
            return random.integers(*scale_bytes, shape, np.uint8)
        if path.endswith("norm.scale"):
            return 1 + 0.1 * random.normal(size=shape)
        return random.normal(size=shape) * (1.0 if len(shape) == 1 or "embedding" in path else spread)

    arrays = {
        path: jax.device_put(draw(path, leaf.shape).astype(leaf.dtype), leaf.sharding)
        for path, leaf in leaves(model).items()
    }
    return fill(model, arrays)


def assert_same_logits(found, expected, *, tolerance: float = 1e-5) -> None:
    """The largest difference is at most `tolerance` of the logits' standard deviation."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    worst = np.abs(found - expected).max() / expected.std()
    assert worst <= tolerance, f"largest difference is {worst:.2e} of the standard deviation"
