"""The command `plan`: the whole of it on CPU devices, the page, the object, and bad input in one line."""

import dataclasses
import importlib.util
import json

import jax
import pytest

from convert import synthetic
from gptoss_jax.cli import main
from gptoss_jax.plan import largest
from tests.plan.devices import SMALL

PLAN = ["plan", "--model", "tiny", "--topology", "cpu:4"]
MESH = ["--mesh", "data=2,tensor=2", "--batch", "4", "--context", "100"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that compiles in a second, and nothing larger to try, on the eight devices that tests have."""
    assert len(jax.devices()) == 8, "started now, JAX keeps its devices"
    monkeypatch.setitem(synthetic.MODELS, "tiny", lambda: dataclasses.replace(SMALL, max_context=128))
    monkeypatch.setattr(largest, "MOST_ROWS", 4)


@pytest.mark.slow
def test_object_has_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, *MESH, "--json"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    plan = json.loads(line)
    assert (plan["model"], plan["layers"], plan["topology"], plan["devices"]) == ("tiny", 2, "cpu:4", 4)
    assert plan["mesh"] == {"data": 2, "expert": 1, "tensor": 2}
    assert (plan["batch"], plan["context"], plan["chunk"]) == (4, 100, 128)
    memory = plan["memory"]
    parts = ("weights", "cache", "temporary", "other", "code")
    assert memory["needed_bytes"] == sum(memory[f"{part}_bytes"] for part in parts)
    assert memory["headroom_bytes"] == memory["limit_bytes"] - memory["needed_bytes"] > 0
    assert plan["fits"]
    assert plan["refusal"] is None
    for step in (plan["decode"], plan["prefill"]):
        assert step["argument_bytes"] >= memory["weights_bytes"] + memory["cache_bytes"]
        assert step["floor_ms"] > 0
        assert step["estimated_ms"] is None
        [layers] = [found for found in step["collectives"] if found["per_layer"]]
        assert (layers["kind"], layers["per_layer"], layers["count"]) == ("all-reduce", 2, 5)
    assert plan["largest_batch"] == {"value": 4, "needed": memory["needed_bytes"], "is_bound": True}
    assert plan["largest_context"] == {"value": 128, "needed": memory["needed_bytes"], "is_bound": True}


def test_page_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, *MESH]) == 0
    page = capsys.readouterr().out
    for part in (
        "gpt-oss tiny, 2 layers, cpu:4 (CPU): data=2 expert=1 tensor=2",
        "4 rows of 100 tokens; prompts are read 128 of each at a time",
        "largest batch for 100 tokens    4, the most that is considered",
        "all-reduce",
        "2 a layer",
        "\n  fits\n",
    ):
        assert part in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v6e:3x3"], "no topology 'v6e:3x3'"),
        (["--topology", "cpu:99"], "cpu:99 needs 99 CPU devices"),
        (["--mesh", "expert=8"], "data=1 x expert=8 x tensor=1 needs 8 devices: 4 cpu device"),
        (["--mesh", "tensor=4"], "2 kv heads do not divide over tensor = 4"),
        (["--mesh", "data=2", "--batch", "3"], "3 rows do not divide over data = 2"),
        (["--mesh", "expert"], "cannot read 'expert': --mesh"),
        (["--context", "131073"], "131073 is out of range: --context: choose 1 to 128"),
        (["--batch", "0"], "0 is out of range: --batch: choose 1 or more"),
        (["--layers", "3"], "3 is out of range: --layers: choose 1 to 2"),
        (["--search", "--mesh", "data=2"], "--mesh and --search"),
        (["--search", "--batch", "3", "--topology", "cpu:8"], "no mesh of 8 devices divides the model and 3 rows"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--context", "100", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("gptoss-jax: ")
    assert message in line


def test_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    assert main(["plan", "--topology", "h200:8"]) == 2
    assert "no compiler for NVIDIA GPUs: h200:8: install the extra `cuda`" in capsys.readouterr().err
