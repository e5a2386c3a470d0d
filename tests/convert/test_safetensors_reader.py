import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.safetensors_reader import INDEX, open_folder
from gptoss_jax.errors import CheckpointError


def edit_index(folder: Path, name: str, file: str | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    if file is None:
        del index["weight_map"][name]
    else:
        index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def test_reads_what_the_safetensors_library_reads(pristine: Path) -> None:
    folder = open_folder(pristine / "hf")
    for file in folder.files:
        for name, expected in load_file(file).items():
            found = folder.read(name, 0, folder.tensors[name].num_bytes)
            assert np.array_equal(found, expected.reshape(-1).view(np.uint8))


def test_reads_a_run_of_bytes_at_any_offset(pristine: Path) -> None:
    folder = open_folder(pristine / "hf")
    name = "model.embed_tokens.weight"
    whole = folder.read(name, 0, folder.tensors[name].num_bytes)
    assert np.array_equal(folder.read(name, 4097, 9001), whole[4097:9001])


def test_missing_shard_is_named(published: Path) -> None:
    (published / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing shard model-00001-of-00001\.safetensors"):
        open_folder(published)


def test_truncated_file_names_the_tensor_that_is_cut(published: Path) -> None:
    path = published / "model-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"truncated: \d+ bytes of \d+, model\.layers\..* is cut.*00001-of-00001"):
        open_folder(published)


@pytest.mark.parametrize("kept", [0, 5, 100])
def test_file_cut_inside_its_header_is_truncated(published: Path, kept: int) -> None:
    path = published / "model-00000-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="truncated"):
        open_folder(published)


def test_header_that_is_no_json_is_named(published: Path) -> None:
    path = published / "model-00000-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[8] = ord("!")
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="damaged header"):
        open_folder(published)


def test_header_with_an_infinite_shape_is_named(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"U8","shape":[Infinity],"data_offsets":[0,1]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(CheckpointError, match="damaged header"):
        open_folder(tmp_path)


def test_header_nested_without_end_is_named(tmp_path: Path) -> None:
    header = b"[" * 100_000
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="damaged header"):
        open_folder(tmp_path)


def test_tensor_the_index_names_but_no_file_holds_is_named(published: Path) -> None:
    edit_index(published, "model.layers.9.ghost", "model-00000-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.9\.ghost is not in model-00000"):
        open_folder(published)


def test_tensor_in_another_file_than_the_index_says_is_named(published: Path) -> None:
    edit_index(published, "model.embed_tokens.weight", "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight is in model-00000.*not in model-00001"):
        open_folder(published)


def test_tensor_the_index_does_not_name_is_named(published: Path) -> None:
    edit_index(published, "model.norm.weight", None)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is in .*, but not in the index"):
        open_folder(published)


def test_damaged_index_is_named(published: Path) -> None:
    (published / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="damaged index"):
        open_folder(published)


def test_tensor_in_two_files_is_named(published: Path) -> None:
    (published / INDEX).unlink()
    (published / "copy.safetensors").write_bytes((published / "model-00000-of-00001.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight is in copy\.safetensors and again in"):
        open_folder(published)


def test_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors files"):
        open_folder(tmp_path)
