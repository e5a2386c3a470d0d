import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.published import original_config
from convert.synthetic import SyntheticLayout, write_checkpoint
from gptoss_jax.config import ModelConfig, gpt_oss_20b
from gptoss_jax.errors import ConversionError
from tests.tiny import TINY


def load(folder: Path) -> dict[str, np.ndarray]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def test_layouts_hold_the_same_values(pristine: Path) -> None:
    root, original = load(pristine / "hf"), load(pristine / "original")
    assert (len(root), len(original)) == (19 * 4 + 3, 15 * 4 + 3)
    heads = [root[f"model.layers.2.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert np.array_equal(np.concatenate(heads), original["block.2.attn.qkv.weight"])
    assert np.array_equal(
        root["model.layers.3.mlp.experts.down_proj_blocks"], original["block.3.mlp.mlp2_weight.blocks"]
    )


def test_dequantized_layout_is_in_out_order(pristine: Path) -> None:
    root, dequantized = load(pristine / "hf"), load(pristine / "bf16")
    matrix = dequantized["model.layers.0.mlp.experts.gate_up_proj"]
    assert matrix.shape == (10, 96, 128)
    expert, output = 7, 5
    blocks = root["model.layers.0.mlp.experts.gate_up_proj_blocks"][expert, output]
    scales = root["model.layers.0.mlp.experts.gate_up_proj_scales"][expert, output]
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    for block in range(3):
        for byte in range(16):
            low, high = blocks[block, byte] & 15, blocks[block, byte] >> 4
            scale = 2.0 ** (int(scales[block]) - 127)
            column = block * 32 + byte * 2
            assert float(matrix[expert, column, output]) == table[low] * scale
            assert float(matrix[expert, column + 1, output]) == table[high] * scale


def test_same_seed_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_checkpoint(tmp_path / name, TINY, seed=seed, num_shards=1)
    first, second, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == second
    assert first != other


@pytest.mark.parametrize("layout", ["hf", "bf16"])
def test_threads_change_no_byte(layout: SyntheticLayout, tmp_path: Path) -> None:
    for name, num_threads in (("one", 1), ("three", 3)):
        write_checkpoint(tmp_path / name, TINY, layout=layout, num_shards=4, num_threads=num_threads)
    one, three = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "three"))
    assert one == three


def test_files_are_numbered_as_published(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", TINY, num_shards=3)
    write_checkpoint(tmp_path / "original", TINY, layout="original", num_shards=3)
    assert sorted(file.name for file in (tmp_path / "hf").glob("*.safetensors")) == [
        "model-00000-of-00002.safetensors",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert sorted(file.name for file in (tmp_path / "original").glob("*.safetensors")) == [
        "model--00001-of-00003.safetensors",
        "model--00002-of-00003.safetensors",
        "model--00003-of-00003.safetensors",
    ]


def test_index_counts_the_tensor_bytes(pristine: Path) -> None:
    index = json.loads((pristine / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in load(pristine / "hf").values())


def test_dtypes_name_the_packed_tensors(pristine: Path) -> None:
    dtypes = json.loads((pristine / "original" / "dtypes.json").read_text())
    assert dtypes["block.0.mlp.mlp1_weight.blocks"] == "FP4"
    assert dtypes["block.0.mlp.mlp1_weight.scales"] == "UE8"
    assert dtypes["block.0.mlp.mlp1_bias"] == "BF16"


def test_both_configs_say_the_same() -> None:
    for config in (TINY, gpt_oss_20b()):
        assert ModelConfig.from_json(original_config(config)) == config


def test_architecture_without_words_in_the_original_config_is_refused() -> None:
    import dataclasses

    kinds = ("full_attention",) * 4
    with pytest.raises(ConversionError, match="cannot express"):
        original_config(dataclasses.replace(TINY, layer_kinds=kinds))


def test_more_shards_than_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="80 shards of 79 tensors"):
        write_checkpoint(tmp_path, TINY, num_shards=80)
