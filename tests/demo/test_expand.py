"""Shipped weights to a whole checkpoint: every byte accounted for, made once, and damage named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from convert.source import open_source
from convert.verify import verify
from gptoss_jax.demo import checkpoint
from gptoss_jax.demo.compact import Compact
from gptoss_jax.demo.expand import FILE, expand
from gptoss_jax.errors import CheckpointError, ConversionError
from tests.demo.conftest import SMALL


@pytest.fixture
def copied(small_run, tmp_path):
    """The shipped files in a folder of their own."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    for name in ("weights.safetensors", "weights.json"):
        shutil.copy(small_run / name, folder / name)
    return folder / "weights.safetensors"


def change(description: Path, **changes) -> None:
    description.write_text(json.dumps(json.loads(description.read_text()) | changes))


def test_whole_checkpoint_has_zero_rows_for_absent_ids(small_weights, small_converted):
    published = small_converted.parent / "published"
    compact, source = Compact.open(small_weights), open_source(published)
    assert source.config == SMALL
    for name, tensor in source.folder.tensors.items():
        values = source.folder.read(name, 0, tensor.num_bytes)
        shipped = compact.folder.read(name, 0, compact.folder.tensors[name].num_bytes)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = values.reshape(201_088, -1)
            assert rows[compact.used_ids].any(axis=1).all()
            assert np.array_equal(rows[compact.used_ids], shipped.reshape(len(compact.used_ids), -1)), name
            assert not np.delete(rows, compact.used_ids, axis=0).any(), name
        else:
            assert np.array_equal(values, shipped), name


def test_whole_checkpoint_is_an_ordinary_one(small_converted):
    assert verify(small_converted, small_converted.parent / "published").num_bytes > 50e6


def test_checkpoint_is_in_the_cache_and_made_once(copied, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    published = checkpoint(copied)
    assert published.is_relative_to(tmp_path / "gptoss-jax")
    made = (published / FILE).stat().st_mtime_ns
    assert checkpoint(copied) == published
    assert (published / FILE).stat().st_mtime_ns == made
    assert [path.name for path in published.parent.iterdir()] == ["published"], "nothing unfinished is left"


def test_incomplete_checkpoint_and_that_of_other_weights_are_made_anew(copied, tmp_path):
    directory = expand(tmp_path / "published", copied)
    whole = (directory / FILE).read_bytes()
    (directory / FILE).write_bytes(whole[:-1])
    assert (expand(directory, copied) / FILE).read_bytes() == whole
    change(directory / "demo.json", sha256="that of others")
    (directory / FILE).write_bytes(bytes(len(whole)))
    assert (expand(directory, copied) / FILE).read_bytes() == whole


def test_damaged_weights_are_named(copied, tmp_path):
    content = bytearray(copied.read_bytes())
    content[-1] ^= 1
    copied.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"sha256 .*, expected .*weights\.safetensors: install gptoss-jax again"):
        expand(tmp_path / "published", copied)
    assert not (tmp_path / "published").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.json"])
def test_missing_file_is_named(copied, tmp_path, name):
    copied.with_name(name).unlink()
    with pytest.raises(CheckpointError, match=rf"not there: .*{name}"):
        expand(tmp_path / "published", copied)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"used_ids": [1, 2, 3]}, "damaged list of used ids"),
        ({"used_ids": "many"}, "damaged"),
        ({"vocab_size": 100}, "damaged list of used ids"),
        ({"vocab_size": None}, "damaged"),
    ],
)
def test_damaged_description_is_named(copied, tmp_path, changes, named):
    change(copied.with_name("weights.json"), **changes)
    with pytest.raises(CheckpointError, match=rf"{named}.*weights\.json"):
        expand(tmp_path / "published", copied)


def test_description_that_is_no_json_is_named(copied, tmp_path):
    copied.with_name("weights.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"damaged .*weights\.json"):
        expand(tmp_path / "published", copied)


def test_description_of_another_architecture_is_refused(copied, tmp_path):
    config = json.loads(copied.with_name("weights.json").read_text())["config"]
    change(copied.with_name("weights.json"), config=config | {"head_dim": 32})
    with pytest.raises(CheckpointError, match=r"q_proj\.weight has shape"):
        expand(tmp_path / "published", copied)


def test_folder_that_cannot_be_written_is_named(copied, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="cannot go on"):
        expand(tmp_path / "file" / "published", copied)
