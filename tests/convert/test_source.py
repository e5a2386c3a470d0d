import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from convert.layouts import LayoutName, source_tensors
from convert.source import open_source
from gptoss_jax.config import gpt_oss_20b, gpt_oss_120b
from gptoss_jax.errors import CheckpointError, ConfigError, ConversionError
from tests.convert.damage import Tensors, edit
from tests.tiny import TINY


@pytest.mark.parametrize(("folder", "layout"), [("hf", "hugging_face"), ("original", "original"), ("bf16", "bf16")])
def test_layout_is_told_by_content(pristine: Path, folder: str, layout: str) -> None:
    source = open_source(pristine / folder)
    assert source.layout == layout
    assert source.config == TINY


def test_layout_does_not_depend_on_file_names(published: Path) -> None:
    edit(published, lambda tensors: None)
    (published / "model.safetensors").rename(published / "pytorch_weights.safetensors")
    assert open_source(published).layout == "hugging_face"


def test_original_subfolder_of_a_repository_is_found(pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine / "original", tmp_path / "repository" / "original")
    assert open_source(tmp_path / "repository").layout == "original"


@pytest.mark.parametrize(
    ("layout", "num_20b", "num_120b"), [("original", 363, 543), ("hugging_face", 459, 687), ("bf16", 411, 615)]
)
def test_published_tensor_counts_and_bytes(layout: LayoutName, num_20b: int, num_120b: int) -> None:
    for config, number, num_bytes in (
        (gpt_oss_20b(), num_20b, 13_761_264_768),
        (gpt_oss_120b(), num_120b, 65_248_815_744),
    ):
        tensors = source_tensors(config, layout)
        assert len(tensors) == number
        if layout != "bf16":
            assert sum(tensor.num_bytes for tensor in tensors.values()) == num_bytes


def test_published_shapes_of_20b() -> None:
    tensors = source_tensors(gpt_oss_20b(), "original")
    assert tensors["block.0.attn.qkv.weight"].shape == (5120, 2880)
    assert tensors["block.0.attn.out.weight"].shape == (2880, 4096)
    assert tensors["block.0.mlp.mlp1_weight.blocks"].shape == (32, 5760, 90, 16)


def drop(tensors: Tensors) -> None:
    del tensors["model.layers.2.self_attn.sinks"]


def add(tensors: Tensors) -> None:
    tensors["model.layers.4.self_attn.sinks"] = tensors["model.layers.2.self_attn.sinks"]


def widen(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)


def reshape(tensors: Tensors) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"model\.layers\.2\.self_attn\.sinks is missing"),
        (add, r"model\.layers\.4\.self_attn\.sinks is unexpected"),
        (widen, r"model\.norm\.weight is F32, not BF16"),
        (reshape, r"model\.layers\.1\.self_attn\.o_proj\.weight has shape \[48, 96\], not \[96, 48\]"),
    ],
)
def test_wrong_tensor_is_named(published: Path, change, message: str) -> None:
    edit(published, change)
    with pytest.raises(CheckpointError, match=message):
        open_source(published)


def test_another_model_is_refused(published: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[f"llama.{name}"] = tensors.pop(name)

    edit(published, rename)
    with pytest.raises(CheckpointError, match="no gpt-oss layout among 79 tensors"):
        open_source(published)


@pytest.mark.parametrize("key", ["num_hidden_layers", "surprise"])
def test_config_key_missing_or_unknown_is_named(published: Path, key: str) -> None:
    content = json.loads((published / "config.json").read_text())
    content.pop(key, None) or content.setdefault(key, 1)
    (published / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=key):
        open_source(published)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_source(tmp_path / "nowhere")


def test_hub_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConversionError, match=r"not installed.*gptoss-jax\[hub\]"):
        open_source("hf://openai/gpt-oss-20b")


def test_hub_name_without_an_owner_is_refused() -> None:
    with pytest.raises(ConversionError, match="hf://owner/name"):
        open_source("hf://gpt-oss-20b")


def test_hub_download_is_opened(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda repository, **options: str(pristine / "hf"))
    assert open_source("hf://openai/gpt-oss-20b").config == TINY


def test_hub_out_of_reach_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def unreachable(repository: str, **options: object) -> str:
        raise hub.errors.LocalEntryNotFoundError("no connection\nand much more")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(ConversionError, match=r"cannot download \(no connection\): hf://openai/gpt-oss-20b"):
        open_source("hf://openai/gpt-oss-20b")


def test_absurd_number_of_layers_is_refused_at_once(published: Path) -> None:
    content = json.loads((published / "config.json").read_text())
    content |= {"num_hidden_layers": 10_000, "layer_types": ["full_attention"] * 10_000}
    (published / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"10000 layers by its config\.json, 79 tensors in its files"):
        open_source(published)
