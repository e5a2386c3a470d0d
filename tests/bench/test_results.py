"""The published measurements of docs/results: each is whole, and its figures belong together."""

import datetime
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.bench import keys

RESULTS = sorted((Path(__file__).parents[2] / "docs" / "results").glob("h200*.json"))


@pytest.fixture(params=RESULTS, ids=lambda path: path.stem)
def result(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text())


def test_there_are_results() -> None:
    assert RESULTS


def test_result_says_where_it_is_from(result: dict[str, Any]) -> None:
    assert set(result) >= keys.REPORT
    assert "H200" in result["device"]
    assert all(result[key] for key in keys.REPORT)
    assert {"jax", "jaxlib", "jax-cuda13-plugin"} <= set(result["versions"])
    assert datetime.datetime.fromisoformat(result["date"]).tzinfo is not None
    assert set(result["ceilings"]) == keys.CEILINGS
    assert min(result["ceilings"].values()) > 0


def test_rows_of_a_result_are_whole(result: dict[str, Any]) -> None:
    devices = math.prod(result.get("mesh", {}).values())
    read, dense = (devices * result["ceilings"][key] for key in ("read_bytes_per_s", "dense_flops_per_s"))
    for row in (row for row in result["rows"] if "method" not in row):
        name = f"{row['model']} {row['phase']} {row['batch']} {row['context']}"
        assert set(row) >= keys.ROW, name
        assert row["phase"] in ("decode", "prefill", "kernel"), name
        assert min(row["ms"], row["batch"], row["tokens_per_s"], row["peak_bytes"]) > 0, name
        assert row["spread"] >= 0, name
        assert row["floor_ms"] == pytest.approx(1e3 * max(row["bytes"] / read, row["flops"] / dense)), name
        assert row["roofline_fraction"] == pytest.approx(row["floor_ms"] / row["ms"]), name
        if row["phase"] == "decode":
            assert row["launches"] > 0, name
            assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms"]), name


def test_rows_of_training_are_whole(result: dict[str, Any]) -> None:
    dense = math.prod(result["mesh"].values()) * result["ceilings"]["dense_flops_per_s"] if "mesh" in result else 0
    for row in (row for row in result["rows"] if "method" in row):
        name = f"{row['model']} {row['method']} {row['rows']} x {row['sequence_length']}"
        seconds = row["ms"] / 1e3
        assert min(seconds, row["spread"], row["compile_s"], row["peak_bytes"]) > 0, name
        assert row["tokens_per_s"] == pytest.approx(row["rows"] * row["sequence_length"] / seconds), name
        assert row["flops_utilisation"] == pytest.approx(row["flops"] / seconds / dense), name
        assert (row["rank"] is None) == (row["method"] != "lora"), name
        if "memory" in result:
            assert row["peak_bytes"] <= result["memory"]["jax_limit_bytes"], name
