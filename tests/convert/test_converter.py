import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from convert.converter import convert
from convert.zarr import open_array, read_rows
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import CheckpointError, ConversionError
from gptoss_jax.manifest import PARAMETERS, read_manifest
from gptoss_jax.parameters import parameters
from pallas_kernels import mxfp4
from tests.convert.damage import Tensors, edit
from tests.tiny import TINY

PACKED = ("blocks", "scales")


def run(source: Path, destination: Path, **options: bool):
    return convert(source, destination, **options)


def stored(directory: Path, path: str) -> np.ndarray:
    shape = parameters(TINY)[path].shape
    return read_rows(open_array(directory / PARAMETERS / path), 0, shape[0])


def contents(directory: Path) -> dict[str, bytes]:
    arrays = directory / PARAMETERS
    return {str(file.relative_to(arrays)): file.read_bytes() for file in arrays.glob("*/*")}


def test_both_published_layouts_give_the_same_checkpoint(pristine: Path, converted: Path, tmp_path: Path) -> None:
    run(pristine / "original", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(converted)
    assert read_manifest(tmp_path / "out").sha256 == read_manifest(converted).sha256


def test_values_are_the_published_ones(pristine: Path, converted: Path) -> None:
    source: Tensors = {}
    for file in sorted((pristine / "hf").glob("*.safetensors")):
        source |= load_file(file)
    layer = "model.layers.1"
    assert np.array_equal(
        stored(converted, "layers.1.attention.key.weight"),
        source[f"{layer}.self_attn.k_proj.weight"].reshape(2, 8, 96),
    )
    assert np.array_equal(
        stored(converted, "layers.1.attention.output.weight"),
        source[f"{layer}.self_attn.o_proj.weight"].reshape(96, 6, 8),
    )
    assert np.array_equal(
        stored(converted, "layers.1.experts.down.blocks"), source[f"{layer}.mlp.experts.down_proj_blocks"]
    )
    assert np.array_equal(stored(converted, "unembedding.weight"), source["lm_head.weight"])


def test_manifest_says_where_the_bytes_came_from(converted: Path) -> None:
    manifest = read_manifest(converted)
    assert manifest.layout == "hugging_face"
    assert not manifest.quantized
    assert [file.name for file in manifest.source_files] == [
        "model-00000-of-00001.safetensors",
        "model-00001-of-00001.safetensors",
    ]
    assert list(manifest.sha256) == list(parameters(TINY))
    assert ModelConfig.read(converted / "config.json") == TINY


def test_nothing_but_the_checkpoint_is_left(converted: Path) -> None:
    assert sorted(file.name for file in converted.iterdir()) == ["config.json", "manifest.json", "parameters"]
    assert [file.name for file in converted.parent.iterdir()] == [converted.name]


def test_plain_orbax_restores_it_sharded(converted: Path) -> None:
    mesh = jax.make_mesh((2,), ("expert",), devices=jax.devices()[:2])
    by_expert = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("expert"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    abstract: dict = {}
    for path, parameter in parameters(TINY).items():
        *parents, leaf = path.split(".")
        node = abstract
        for parent in parents:
            node = node.setdefault(parent, {})
        sharding = by_expert if parameter.dims[0] == "E" else whole
        node[leaf] = jax.ShapeDtypeStruct(parameter.shape, parameter.dtype, sharding=sharding)
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((converted / PARAMETERS).resolve(), abstract)
    blocks = tree["layers"]["2"]["experts"]["gate_up"]["blocks"]
    assert blocks.sharding == by_expert
    assert np.array_equal(blocks, stored(converted, "layers.2.experts.gate_up.blocks"))


def test_plain_orbax_restores_it_without_being_told_anything(converted: Path) -> None:
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore((converted / PARAMETERS).resolve())
    assert np.array_equal(tree["layers"]["0"]["attention"]["sinks"], stored(converted, "layers.0.attention.sinks"))


def test_dequantized_experts_are_quantized_when_asked(pristine: Path, converted: Path, tmp_path: Path) -> None:
    manifest = run(pristine / "bf16", tmp_path / "out", quantize=True)
    assert manifest.quantized
    for matrix in ("gate_up", "down"):
        path = f"layers.3.experts.{matrix}"
        # The values of the source are exact in MXFP4, though now and then a smaller scale expresses them too.
        found, expected = (
            mxfp4.dequantize(mxfp4.MXFP4(*(jnp.asarray(stored(folder, f"{path}.{leaf}")) for leaf in PACKED)))
            for folder in (tmp_path / "out", converted)
        )
        assert np.array_equal(found, expected)
    assert manifest.sha256["layers.3.router.weight"] == read_manifest(converted).sha256["layers.3.router.weight"]


def test_dequantized_experts_are_refused_with_advice(pristine: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"dequantized to bfloat16.*--quantize"):
        run(pristine / "bf16", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_quantizing_packed_experts_is_refused(pristine: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"MXFP4 already.*leave out --quantize"):
        run(pristine / "hf", tmp_path / "out", quantize=True)


@pytest.mark.parametrize("matrix", ["gate_up_proj", "down_proj"])
def test_scale_byte_255_is_refused_by_name_and_index(published: Path, tmp_path: Path, matrix: str) -> None:
    name = f"model.layers.2.mlp.experts.{matrix}_scales"

    def spoil(tensors: Tensors) -> None:
        tensors[name][7, 93, 1] = 255

    edit(published, spoil)
    with pytest.raises(
        CheckpointError, match=rf"{name}\[0:10\]: scale byte 255 \(NaN\) at index \(7, 93, 1\): .*safetensors: download"
    ):
        run(published, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_infinite_weight_is_not_quantized(pristine: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pristine / "bf16", tmp_path / "source"))
    name = "model.layers.0.mlp.experts.down_proj"

    def spoil(tensors: Tensors) -> None:
        tensors[name][4, 63, 95] = np.inf

    edit(folder, spoil)
    with pytest.raises(
        CheckpointError, match=rf"{name}\[4\]: value inf at index \(63, 95\) cannot be quantized: .*safetensors: export"
    ):
        run(folder, tmp_path / "out", quantize=True)


def test_destination_that_exists_is_refused(pristine: Path, tmp_path: Path) -> None:
    run(pristine / "hf", tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ConversionError, match=r"the destination exists.*--overwrite"):
        run(pristine / "hf", tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_overwrite_replaces_a_converted_checkpoint(pristine: Path, tmp_path: Path) -> None:
    run(pristine / "original", tmp_path / "out")
    assert run(pristine / "hf", tmp_path / "out", overwrite=True).layout == "hugging_face"
    assert read_manifest(tmp_path / "out").layout == "hugging_face"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_overwrite_spares_a_directory_that_is_no_checkpoint(pristine: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("dear reader")
    with pytest.raises(ConversionError, match="no converted checkpoint, so it is not overwritten"):
        run(pristine / "hf", tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "dear reader"


def test_orbax_metadata_names_every_parameter(converted: Path) -> None:
    metadata = json.loads((converted / PARAMETERS / "_METADATA").read_text())
    names = {".".join(entry["key"] for entry in leaf["key_metadata"]) for leaf in metadata["tree_metadata"].values()}
    assert names == set(parameters(TINY))
