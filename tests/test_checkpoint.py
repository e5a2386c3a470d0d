import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from convert.converter import convert
from convert.synthetic import parameter_chunks, write_checkpoint
from gptoss_jax.checkpoint import load, restore
from gptoss_jax.errors import CheckpointError
from gptoss_jax.manifest import is_converted
from gptoss_jax.parameters import Parameter, parameters
from tests.medium import MEDIUM, MEDIUM_MB
from tests.tiny import TINY

SEED = 5
AXES = {"E": "expert", "N": "tensor", "K": "tensor", "V": "tensor"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(root / "published", TINY, seed=SEED)
    convert(root / "published", root / "tiny")
    return root / "tiny"


def on_one_device(parameter: Parameter, dtype: object = None) -> jax.ShapeDtypeStruct:
    sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(parameter.shape, dtype or parameter.dtype, sharding=sharding)


def drawn(parameter: Parameter) -> np.ndarray:
    """The values the synthetic checkpoint was written from."""
    return np.concatenate(list(parameter_chunks(parameter, SEED)))


def test_every_parameter_comes_back(checkpoint: Path) -> None:
    tree = parameters(TINY)
    restored = restore(checkpoint, {path: on_one_device(parameter) for path, parameter in tree.items()})
    assert list(restored) == list(tree)
    for path, parameter in tree.items():
        assert restored[path].dtype == parameter.dtype
        assert np.array_equal(restored[path], drawn(parameter)), path


def test_bfloat16_can_be_widened(checkpoint: Path) -> None:
    parameter = parameters(TINY)["layers.0.attention.output.weight"]
    (restored,) = restore(checkpoint, {parameter.path: on_one_device(parameter, jnp.float32)}).values()
    assert restored.dtype == jnp.float32
    assert np.array_equal(restored.astype(ml_dtypes.bfloat16), drawn(parameter))


@pytest.mark.parametrize(("expert", "tensor"), [(1, 1), (2, 1), (1, 2), (5, 1), (2, 2)])
def test_any_mesh_restores_its_shards(checkpoint: Path, expert: int, tensor: int) -> None:
    mesh = jax.make_mesh((expert, tensor), ("expert", "tensor"), devices=jax.devices()[: expert * tensor])
    tree = parameters(TINY)
    abstract = {}
    for path, parameter in tree.items():
        spec = PartitionSpec(*(AXES.get(dim) for dim in parameter.dims))
        abstract[path] = jax.ShapeDtypeStruct(parameter.shape, parameter.dtype, sharding=NamedSharding(mesh, spec))
    restored = restore(checkpoint, abstract)
    for path, array in restored.items():
        assert array.sharding == abstract[path].sharding
        for shard in array.addressable_shards:
            assert np.array_equal(shard.data, drawn(tree[path])[shard.index]), path


def refused(checkpoint: Path, abstract: Mapping[str, jax.ShapeDtypeStruct], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        restore(checkpoint, abstract)


def test_parameter_the_checkpoint_lacks_is_named(checkpoint: Path) -> None:
    ghost = Parameter("layers.4.attention.sinks", ("N",), (6,), "bfloat16")
    refused(checkpoint, {ghost.path: on_one_device(ghost)}, r"layers\.4\.attention\.sinks is not in the checkpoint")


def test_another_shape_is_named(checkpoint: Path) -> None:
    other = Parameter("layers.0.attention.sinks", ("N",), (8,), "bfloat16")
    refused(checkpoint, {other.path: on_one_device(other)}, r"layers\.0\.attention\.sinks is \[6\], not \[8\]")


@pytest.mark.parametrize(("path", "dtype"), [("norm.scale", jnp.int8), ("layers.1.experts.down.scales", jnp.float32)])
def test_dtype_that_would_lose_or_invent_values_is_named(checkpoint: Path, path: str, dtype: object) -> None:
    parameter = parameters(TINY)[path]
    refused(checkpoint, {path: on_one_device(parameter, dtype)}, f"{path} is .*, which cannot become")


def test_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", {}, "no such directory")


def test_published_folder_is_sent_to_convert(checkpoint: Path) -> None:
    refused(checkpoint.parent / "published", {}, "not converted yet.*gptoss-jax convert")


def test_interrupted_conversion_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    refused(tmp_path / "out", {}, "interrupted.*--resume")
    refused(tmp_path / "out.partial", {}, "interrupted.*--resume")


def test_directory_of_something_else_is_named(tmp_path: Path) -> None:
    refused(tmp_path, {}, r"no manifest\.json")


def test_manifest_of_another_version_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    content = json.loads((checkpoint / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(content | {"format_version": 99}))
    refused(tmp_path, {}, "format version 99")


def test_manifest_that_disagrees_with_the_config_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    content = json.loads((checkpoint / "manifest.json").read_text())
    del content["sha256"]["norm.scale"]
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    refused(tmp_path, {}, r"disagree about 1 parameters, first norm\.scale")


@pytest.mark.parametrize(
    "damage", ["no chunk", "cut chunk", "no array", "{", '{"dtype":"|u1"}', "[]", "[" * 100_000], ids=lambda d: d[:15]
)
def test_damaged_parameter_is_named(checkpoint: Path, tmp_path: Path, damage: str) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    path = "layers.1.router.weight"
    array = copy / "parameters" / path
    if damage == "no array":
        shutil.rmtree(array)
    elif damage == "no chunk":
        (array / "0.0").unlink()
    elif damage == "cut chunk":
        (array / "0.0").write_bytes(b"short")
    else:
        (array / ".zarray").write_text(damage)
    parameter = parameters(TINY)[path]
    refused(copy, {path: on_one_device(parameter)}, rf"{path} is missing or damaged.*--overwrite")
    other = parameters(TINY)["norm.scale"]
    assert np.array_equal(restore(copy, {other.path: on_one_device(other)})[other.path], drawn(other))


def test_missing_orbax_metadata_is_named(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    (copy / "parameters" / "_METADATA").unlink()
    parameter = parameters(TINY)["norm.scale"]
    refused(copy, {"norm.scale": on_one_device(parameter)}, "Orbax metadata is missing")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged Orbax metadata .*line 1"),
        ("[]", "damaged Orbax metadata .*list indices"),
        ('{"tree_metadata":{}}', r"damaged Orbax metadata \(norm\.scale is not in it\)"),
        ('{"tree_metadata":{"a":{}}}', "damaged Orbax metadata .*key_metadata"),
        (
            '{"tree_metadata":{"a":{"key_metadata":[{"key":"norm"},{"key":"scale"}]}}}',
            r"Orbax cannot restore it \('key_type'\)",
        ),
    ],
)
def test_damaged_orbax_metadata_is_named(checkpoint: Path, tmp_path: Path, content: str, message: str) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    (copy / "parameters" / "_METADATA").write_text(content)
    parameter = parameters(TINY)["norm.scale"]
    refused(copy, {"norm.scale": on_one_device(parameter)}, message + ".*--overwrite")


def test_checkpoint_of_another_process_that_differs_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss_jax.distributed.exchange", lambda name, digest: [digest, digest, "another"])
    with pytest.raises(CheckpointError, match="process 2 has another checkpoint than process 0"):
        load(checkpoint)


def test_complete_conversion_that_was_not_renamed_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "out.partial"))
    refused(copy, {}, "interrupted.*--resume")
    assert not is_converted(copy)


def test_directory_can_be_named_by_a_dot(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = parameters(TINY)["norm.scale"]
    monkeypatch.chdir(checkpoint)
    assert restore(Path(), {"norm.scale": on_one_device(parameter)})["norm.scale"].shape == (96,)
    monkeypatch.chdir(tmp_path)
    refused(Path(), {}, r"no manifest\.json")


# Peak resident memory in MB before and after restoring all of a checkpoint, and the bytes restored.
_MEASURE = """
import json, resource, sys
from pathlib import Path
import jax
from gptoss_jax.checkpoint import load, restore
from gptoss_jax.manifest import read_parameters

def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000

peaks = []
for name in sys.argv[1:]:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        path: jax.ShapeDtypeStruct(parameter.shape, parameter.dtype, sharding=sharding)
        for path, parameter in read_parameters(Path(name)).items()
    }
    kept = jax.block_until_ready(restore(Path(name), abstract))
    peaks.append(peak())
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_restoring_does_not_hold_everything_twice(checkpoint: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "published", MEDIUM)
    convert(tmp_path / "published", tmp_path / "medium")
    command = [sys.executable, "-c", _MEASURE, str(checkpoint), str(tmp_path / "medium")]
    small, large = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert large - small < 1.5 * MEDIUM_MB
