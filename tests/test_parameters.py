"""The figures of SPEC section 1, computed from the architecture alone."""

import pytest

from gptoss_jax.config import MX_BLOCK, ModelConfig, gpt_oss_20b, gpt_oss_120b
from gptoss_jax.parameters import MX_BYTES, num_active_parameters, num_parameters, parameters
from pallas_kernels import mxfp4
from tests.tiny import TINY


@pytest.mark.parametrize(
    ("config", "total", "experts", "active"),
    [
        (gpt_oss_20b(), 20_914_757_184, 19_110_297_600, 3_608_307_264),
        (gpt_oss_120b(), 116_829_156_672, 114_661_785_600, 5_132_849_472),
    ],
)
def test_counts_are_the_published_ones(config: ModelConfig, total: int, experts: int, active: int) -> None:
    matrices = [p for p in parameters(config).values() if p.leaf in ("blocks", "scales")]
    assert num_parameters(config) == total
    assert sum(parameter.num_values for parameter in matrices) == experts
    assert num_active_parameters(config) == active


@pytest.mark.parametrize(
    ("config", "blocks", "scales", "bfloat16"),
    [
        (gpt_oss_20b(), 9_555_148_800, 597_196_800, 3_608_919_168),
        (gpt_oss_120b(), 57_330_892_800, 3_583_180_800, 4_334_742_144),
    ],
)
def test_bytes_are_the_published_ones(config: ModelConfig, blocks: int, scales: int, bfloat16: int) -> None:
    sizes = {"blocks": 0, "scales": 0, "bfloat16": 0}
    for parameter in parameters(config).values():
        sizes[parameter.leaf if parameter.leaf in sizes else parameter.dtype] += parameter.num_bytes
    assert sizes == {"blocks": blocks, "scales": scales, "bfloat16": bfloat16}


def test_contracted_dim_of_each_expert_matrix_is_blocked() -> None:
    tree = parameters(TINY)
    assert tree["layers.3.experts.gate_up.blocks"].shape == (10, 128, 3, 16)
    assert tree["layers.3.experts.down.blocks"].shape == (10, 96, 2, 16)
    assert tree["layers.3.experts.down.scales"].shape == (10, 96, 2)
    assert tree["layers.3.attention.output.weight"].shape == (96, 6, 8)


def test_block_is_that_of_the_kernels() -> None:
    assert (MX_BLOCK, MX_BYTES) == (mxfp4.BLOCK, mxfp4.BLOCK_BYTES)
