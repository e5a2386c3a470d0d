"""Two real processes on CPUs, joined by Gloo: a sharded restore, and the tokens of one process."""

import dataclasses
import json
from pathlib import Path

import pytest

from convert.converter import convert
from convert.synthetic import write_checkpoint
from gptoss_jax.manifest import chunk_shape
from gptoss_jax.parameters import Parameter, parameters
from tests.distributed.processes import finish, free_port, start
from tests.distributed.worker import results
from tests.model.test_transformer import SHARDABLE
from tests.tiny import assert_same_logits

WIDE = dataclasses.replace(
    SHARDABLE, hidden_size=512, intermediate_size=512, num_layers=1, layer_kinds=("sliding_attention",)
)
"""Its experts are large enough to be cut into files, and it is compiled soon."""
MESHES = {
    "expert over the processes": {"expert": 2, "tensor": 2},
    "tensor over the processes": {"expert": 2, "tensor": 2, "order": [0, 2, 1, 3]},
    "data over the processes": {"data": 2, "tensor": 2},
}
"""Of four devices, two to a process."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    write_checkpoint(root / "published", WIDE, seed=5)
    convert(root / "published", root / "wide")
    return root / "wide"


@pytest.mark.slow
def test_two_processes_give_the_tokens_of_one_and_read_their_own_bytes(checkpoint: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / "0.json", tmp_path / "1.json"]
    coordinator, meshes = f"localhost:{free_port()}", json.dumps(list(MESHES.values()))
    processes = [
        start("-m", "tests.distributed.worker", checkpoint, output, meshes, coordinator, index, num_devices=2)
        for index, output in enumerate(outputs)
    ]
    alone = results(checkpoint)
    for code, _, errors in finish(processes):
        assert (code, errors) == (0, "")

    *both, seedless = alone["ids"]
    for name, *found in zip(MESHES, *(json.loads(output.read_text()) for output in outputs), strict=True):
        for each in found:
            assert each["ids"][:2] == both, name
            if "logits" in each:
                assert_same_logits(each["logits"], alone["logits"])
            fewest, most = own_bytes(1 if "data" in name else 2)
            assert fewest < each["bytes read"] < most, name
        assert found[0]["ids"] == found[1]["ids"], f"{name}: the drawn seed is one for both"
        assert len(found[0]["ids"][2]) == len(seedless)


def own_bytes(parts: int) -> tuple[int, int]:
    """Fewer and more than a process with two devices reads: of arrays cut into files one of `parts`, and others whole.

    What is one file is read once, or once for each device, as the reads meet; besides, a little metadata.
    """
    whole = sum(parameter.num_bytes for parameter in parameters(WIDE).values() if is_one_file(parameter))
    cut = sum(parameter.num_bytes for parameter in parameters(WIDE).values() if not is_one_file(parameter))
    fewest, most = whole + cut // parts, 2 * whole + cut // parts + 10_000
    assert parts == 1 or most < whole + cut, "reading all would be noticed"
    return fewest, most


def is_one_file(parameter: Parameter) -> bool:
    return chunk_shape(parameter) == parameter.shape
