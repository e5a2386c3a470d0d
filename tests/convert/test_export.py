"""Exports of converted checkpoints, untouched: the bytes, the files beside them, and what is refused."""

import json
import resource
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from convert.converter import convert
from convert.export import REPORT, export
from convert.export_weights import Weights
from convert.source import open_source
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import CheckpointError, ConversionError
from gptoss_jax.manifest import PARAMETERS, read_manifest
from tests.tiny import TINY


def contents(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor, in whatever file it is."""
    return {
        name: (str(values.dtype), values.shape, values.tobytes())
        for file in sorted(folder.glob("*.safetensors"))
        for name, values in load_file(file).items()
    }


@pytest.mark.parametrize("layout", ["hf", "original"])
@pytest.mark.parametrize("source", ["hf", "original"])
def test_tensors_are_the_published_bytes(pristine: Path, tmp_path: Path, source: str, layout) -> None:
    convert(pristine / source, tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "out", layout=layout)
    assert contents(tmp_path / "out") == contents(pristine / layout)


def test_dequantized_export_is_the_bf16_layout(pristine: Path, converted: Path, tmp_path: Path) -> None:
    export(converted, tmp_path / "out", dtype="bf16")
    assert contents(tmp_path / "out") == contents(pristine / "bf16")
    source = open_source(tmp_path / "out")
    assert (source.layout, source.config) == ("bf16", TINY)


def test_hugging_face_files(converted: Path, tmp_path: Path) -> None:
    export(converted, tmp_path / "out")
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["config.json", "export.json", "generation_config.json", "model.safetensors"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    assert ModelConfig.from_json(config) == TINY
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {
        "bos_token_id": 199998,
        "do_sample": True,
        "eos_token_id": [200002, 199999, 200012],
        "pad_token_id": 199999,
    }


def test_bf16_config_promises_no_quantization(converted: Path, tmp_path: Path) -> None:
    export(converted, tmp_path / "out", dtype="bf16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "bfloat16"


def test_original_files(pristine: Path, converted: Path, tmp_path: Path) -> None:
    export(converted, tmp_path / "out", layout="original")
    for name in ("config.json", "dtypes.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads(
            (pristine / "original" / name).read_text()
        )
    assert not (tmp_path / "out" / "generation_config.json").exists()


@pytest.mark.parametrize(("layout", "name"), [("hf", "model-{:05}-of-{:05}"), ("original", "model--{:05}-of-{:05}")])
def test_shards_hold_no_more_than_asked_for(converted: Path, tmp_path: Path, layout, name: str) -> None:
    exported = export(converted, tmp_path / "out", layout=layout, max_shard_bytes=100_000)
    assert [file.name for file in exported.files] == [
        name.format(k, len(exported.files)) + ".safetensors" for k in range(1, len(exported.files) + 1)
    ]
    assert len(exported.files) >= 6
    for file in (tmp_path / "out").glob("*.safetensors"):
        sizes = [values.nbytes for values in load_file(file).values()]
        assert sum(sizes) <= 100_000
    assert open_source(tmp_path / "out").num_bytes == exported.num_bytes == 568_768


def test_tensor_larger_than_a_shard_has_one_to_itself(converted: Path, tmp_path: Path) -> None:
    exported = export(converted, tmp_path / "out", max_shard_bytes=1)
    assert len(exported.files) == exported.num_tensors == 79


def test_export_converts_back_to_the_same_checkpoint(converted: Path, tmp_path: Path) -> None:
    export(converted, tmp_path / "out", max_shard_bytes=200_000)
    assert convert(tmp_path / "out", tmp_path / "again").sha256 == read_manifest(converted).sha256


def test_report_is_kept_beside_the_weights(converted: Path, tmp_path: Path) -> None:
    exported = export(converted, tmp_path / "out")
    assert json.loads((tmp_path / "out" / REPORT).read_text()) == json.loads(json.dumps(exported.to_json()))
    assert not exported.differences
    assert "79 tensors, 568,768 bytes in 1 file, hf layout, mxfp4" in str(exported)
    assert "tokenizer: copy tokenizer.json" in str(exported)


@pytest.mark.parametrize("dtype", ["mxfp4", "bf16"])
def test_damaged_parameter_is_named_and_nothing_is_left(converted: Path, tmp_path: Path, dtype) -> None:
    damaged = Path(shutil.copytree(converted, tmp_path / "damaged"))
    chunk = next((damaged / PARAMETERS / "layers.2.experts.down.blocks").glob("[0-9]*"))
    content = bytearray(chunk.read_bytes())
    content[3] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"layers\.2\.experts\.down\.blocks differs from its checksum"):
        export(damaged, tmp_path / "out", dtype=dtype)
    chunk.unlink()
    with pytest.raises(CheckpointError, match=r"layers\.2\.experts\.down\.blocks is missing"):
        export(damaged, tmp_path / "out", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_full_disk_is_named_and_nothing_is_left(converted: Path, tmp_path: Path) -> None:
    # A limit on file size fails the writing as a full disk does, with another number.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ConversionError, match=r"disk full \(File too large\): .*out\.partial: free the"):
            export(converted, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_named_before_anything_is_written(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConversionError, match=r"568\.77 kB to write, 1\.00 kB free"):
        export(converted, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_interrupted_export_leaves_nothing(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Weights.slices

    def stop(weights: Weights, tensor):
        if tensor.name == "model.layers.2.self_attn.sinks":
            assert (tmp_path / "out.partial").is_dir()
            raise KeyboardInterrupt
        return read(weights, tensor)

    monkeypatch.setattr(Weights, "slices", stop)
    with pytest.raises(KeyboardInterrupt):
        export(converted, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_destination_that_exists_is_refused(converted: Path, tmp_path: Path) -> None:
    export(converted, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ConversionError, match=r"the destination exists.*--overwrite"):
        export(converted, tmp_path / "out", layout="original")
    assert contents(tmp_path / "out") == before


def test_overwrite_replaces_an_export_and_nothing_else(pristine: Path, converted: Path, tmp_path: Path) -> None:
    export(converted, tmp_path / "out")
    export(converted, tmp_path / "out", layout="original", overwrite=True)
    assert contents(tmp_path / "out") == contents(pristine / "original")
    shutil.copytree(pristine / "hf", tmp_path / "downloaded")
    with pytest.raises(ConversionError, match="no export of ours, so it is not overwritten"):
        export(converted, tmp_path / "downloaded", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["downloaded", "out"]


@pytest.mark.parametrize("name", ["out.partial", "out.replaced"])
def test_what_is_in_the_way_is_not_removed(converted: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ConversionError, match=rf"in the way.*{name}"):
        export(converted, tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "original", "dtype": "bf16"}, r"original/ layout keeps its experts in MXFP4"),
        ({"peft": True, "dtype": "bf16"}, r"a PEFT adapter is no checkpoint"),
        ({"peft": True}, r"no LoRA to export as an adapter"),
        ({"step": 3}, r"a converted checkpoint, no fine-tuning run.*--step"),
        ({"base": Path("elsewhere")}, r"a converted checkpoint, no fine-tuning run.*--base"),
    ],
)
def test_options_that_mean_nothing_are_refused(converted: Path, tmp_path: Path, options, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        export(converted, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_architecture_without_words_in_the_original_config_is_refused(converted: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(converted, tmp_path / "other"))
    config = TINY.to_json() | {"layer_types": ["full_attention"] * 4}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"cannot express this architecture"):
        export(other, tmp_path / "out", layout="original")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
