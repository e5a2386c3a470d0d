import numpy as np
import pytest

from gptoss_jax.finetune.adapters import LoRA, Target, adapter_shapes
from gptoss_jax.parameters import parameters
from tests.tiny import TINY


@pytest.mark.parametrize(
    ("target", "num_matrices", "example"),
    [
        ("attention", 16, ("layers.3.attention.key.weight", (3, 96), (2, 8, 3))),
        ("router", 4, ("layers.1.router.weight", (3, 96), (10, 3))),
        ("experts", 8, ("layers.2.experts.down", (10, 3, 64), (10, 96, 3))),
    ],
)
def test_target_selects_its_matrices_in_every_layer(target: Target, num_matrices: int, example) -> None:
    shapes = adapter_shapes(TINY, LoRA(rank=3, alpha=1.0, targets=(target,)))
    assert len(shapes) == 2 * num_matrices
    path, shape_a, shape_b = example
    assert (shapes[f"{path}.lora_a"], shapes[f"{path}.lora_b"]) == (shape_a, shape_b)


def test_product_of_the_arrays_has_the_shape_of_the_weight() -> None:
    shapes = adapter_shapes(TINY, LoRA(rank=3, alpha=1.0, targets=("attention", "router")))
    for path in {name.rpartition(".")[0] for name in shapes}:
        a, b = (np.zeros(shapes[f"{path}.lora_{side}"], np.float32) for side in "ab")
        assert np.tensordot(b, a, axes=1).shape == parameters(TINY)[path].shape
