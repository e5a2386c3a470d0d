from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert.zarr import ArrayWriter, open_array, read_chunk_rows, read_rows
from gptoss_jax.config import gpt_oss_20b, gpt_oss_120b
from gptoss_jax.manifest import chunk_shape
from gptoss_jax.parameters import Parameter, parameters


@pytest.mark.parametrize(
    ("path", "chunks"),
    [
        ("embedding.weight", (1571, 2880)),
        ("layers.0.attention.query.weight", (8, 64, 2880)),
        ("layers.0.attention.output.weight", (2880, 8, 64)),
        ("layers.0.experts.gate_up.blocks", (1, 5760, 90, 16)),
        ("layers.0.experts.down.scales", (1, 2880, 90)),
        ("layers.0.attention.sinks", (64,)),
    ],
)
def test_chunks_of_20b_follow_the_meshes(path: str, chunks: tuple[int, ...]) -> None:
    assert chunk_shape(parameters(gpt_oss_20b())[path]) == chunks


def test_every_chunk_grid_of_120b_is_whole() -> None:
    for parameter in parameters(gpt_oss_120b()).values():
        assert all(size % chunk == 0 for size, chunk in zip(parameter.shape, chunk_shape(parameter), strict=True))


@pytest.mark.parametrize("chunks", [(6, 4, 10), (2, 4, 10), (3, 2, 5), (1, 1, 1)])
def test_written_rows_are_read_back(tmp_path: Path, chunks: tuple[int, ...]) -> None:
    parameter = Parameter("anything", ("E", "N", "D"), (6, 4, 10), "bfloat16")
    values = np.arange(240).reshape(6, 4, 10).astype(ml_dtypes.bfloat16)
    writer = ArrayWriter(tmp_path / "array", parameter, chunks)
    writer.write(values[: chunks[0]])
    writer.write(values[chunks[0] :])
    assert np.array_equal(read_rows(open_array(tmp_path / "array"), 0, 6), values)
    assert np.array_equal(read_rows(open_array(tmp_path / "array"), 2, 5), values[2:5])
    assert len(list((tmp_path / "array").iterdir())) == 1 + 240 // np.prod(chunks)


def test_missing_chunk_is_an_error_not_zeros(tmp_path: Path) -> None:
    parameter = Parameter("anything", ("D",), (8,), "uint8")
    ArrayWriter(tmp_path / "array", parameter, (8,)).write(np.arange(8, dtype=np.uint8))
    (tmp_path / "array" / "0").unlink()
    with pytest.raises(ValueError, match="missing"):
        list(read_chunk_rows(tmp_path / "array", parameter))
