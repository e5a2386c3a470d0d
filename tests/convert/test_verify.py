import shutil
from pathlib import Path

import pytest

from convert.converter import convert
from convert.verify import verify
from gptoss_jax.errors import CheckpointError
from tests.convert.damage import Tensors, edit


@pytest.fixture
def checkpoint(converted: Path, tmp_path: Path) -> Path:
    """A converted checkpoint of one's own, to damage."""
    return Path(shutil.copytree(converted, tmp_path / "checkpoint"))


def check(directory: Path, source: Path | None = None):
    return verify(directory, source)


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_equal_to_either_published_layout(pristine: Path, converted: Path, layout: str) -> None:
    verified = check(converted, pristine / layout)
    assert (verified.num_arrays, verified.num_bytes) == (79, 568_768)


def test_equal_to_its_checksums(converted: Path) -> None:
    assert check(converted).num_arrays == 79


def test_quantized_checkpoint_is_compared_with_the_source_quantized_again(pristine: Path, tmp_path: Path) -> None:
    convert(pristine / "bf16", tmp_path / "out", quantize=True)
    assert check(tmp_path / "out", pristine / "bf16").num_arrays == 79


@pytest.mark.parametrize("with_source", [True, False])
def test_one_flipped_bit_is_found_and_named(pristine: Path, checkpoint: Path, with_source: bool) -> None:
    chunk = checkpoint / "parameters" / "layers.2.experts.down.blocks" / "0.0.0.0"
    content = bytearray(chunk.read_bytes())
    content[2 * 96 * 32 + 37] ^= 1
    chunk.write_bytes(bytes(content))
    message = (
        r"layers\.2\.experts\.down\.blocks differs from model\.layers\.2\.mlp\.experts\.down_proj_blocks "
        r"at index \[2, 1, 0, 5\]"
        if with_source
        else r"layers\.2\.experts\.down\.blocks differs from its checksum"
    )
    with pytest.raises(CheckpointError, match=message):
        check(checkpoint, pristine / "hf" if with_source else None)


@pytest.mark.parametrize("with_source", [True, False])
@pytest.mark.parametrize("kept", [None, 10])
def test_chunk_missing_or_cut_short_is_named(
    pristine: Path, checkpoint: Path, with_source: bool, kept: int | None
) -> None:
    chunk = checkpoint / "parameters" / "layers.0.router.weight" / "0.0"
    if kept is None:
        chunk.unlink()
    else:
        chunk.write_bytes(chunk.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"layers\.0\.router\.weight .*missing or cut short"):
        check(checkpoint, pristine / "hf" if with_source else None)


def test_missing_array_is_named(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "parameters" / "norm.scale")
    with pytest.raises(CheckpointError, match=r"norm\.scale is missing"):
        check(checkpoint)


def test_array_of_another_shape_is_named(checkpoint: Path) -> None:
    parameters = checkpoint / "parameters"
    shutil.rmtree(parameters / "norm.scale")
    shutil.copytree(parameters / "layers.0.attention.sinks", parameters / "norm.scale")
    with pytest.raises(CheckpointError, match=r"norm\.scale is bfloat16 \[6\], not bfloat16 \[96\]"):
        check(checkpoint)


def test_source_that_changed_is_told_from_the_checkpoint(published: Path, converted: Path) -> None:
    def negate(tensors: Tensors) -> None:
        tensors["model.norm.weight"][17] = -0.0

    edit(published, negate)
    with pytest.raises(CheckpointError, match=r"norm\.scale differs from model\.norm\.weight at index \[17\]"):
        check(converted, published)


def test_manifest_that_is_damaged_is_named(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text('{"format_version": 1}')
    with pytest.raises(CheckpointError, match="damaged manifest"):
        check(checkpoint)
