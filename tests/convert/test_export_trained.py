"""Exports of fine-tuning runs: adapters merged, masters rounded, and what the report says about both."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert.converter import convert
from convert.export import export
from convert.export_report import Exported
from gptoss_jax.errors import CheckpointError, ConversionError
from gptoss_jax.manifest import read_manifest
from pallas_kernels import mxfp4
from tests.convert.stand_in_run import Run, base_weights, lora_run, master_run, trained_weights
from tests.convert.test_export import contents


@pytest.fixture
def export_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Export a run to tmp_path / "out"."""

    def run_export(run: Run, **options) -> Exported:
        monkeypatch.setattr("convert.export._open_run", lambda directory, **where: run)
        return export(tmp_path / "run", tmp_path / "out", **options)

    return run_export


def requantized(matrix: np.ndarray) -> np.ndarray:
    return np.asarray(mxfp4.dequantize(mxfp4.quantize(jnp.asarray(matrix))))


def is_expert_matrix(path: str) -> bool:
    return path.endswith((".gate_up.weight", ".down.weight"))


def test_merged_lora_is_the_exact_sum_rounded_once(converted: Path, tmp_path: Path, export_run) -> None:
    run = lora_run(converted)
    export_run(run)
    convert(tmp_path / "out", tmp_path / "merged")
    merged, exact = base_weights(tmp_path / "merged"), trained_weights(run)
    for path, values in exact.items():
        expected = requantized(values) if is_expert_matrix(path) else values.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(merged[path], expected.astype(np.float32), err_msg=path)


def test_merged_lora_leaves_every_other_byte(converted: Path, tmp_path: Path, export_run) -> None:
    run = lora_run(converted, targets=("router", "experts"))
    export_run(run)
    before, after = read_manifest(converted).sha256, convert(tmp_path / "out", tmp_path / "merged").sha256
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {
        f"layers.{layer}.{name}"
        for layer in range(4)
        for name in (
            "router.weight",
            *(f"experts.{matrix}.{part}" for matrix in ("gate_up", "down") for part in ("blocks", "scales")),
        )
    }


def test_merged_lora_in_bf16_is_rounded_but_not_quantized(converted: Path, tmp_path: Path, export_run) -> None:
    run = lora_run(converted)
    export_run(run, dtype="bf16")
    exact = trained_weights(run)
    written = contents(tmp_path / "out")
    for name, path in (
        ("model.layers.1.mlp.experts.down_proj", "layers.1.experts.down.weight"),
        ("model.layers.3.mlp.experts.gate_up_proj", "layers.3.experts.gate_up.weight"),
    ):
        assert written[name][2] == exact[path].swapaxes(1, 2).astype(ml_dtypes.bfloat16).tobytes()


def test_adapter_that_learned_nothing_changes_no_value(converted: Path, tmp_path: Path, export_run) -> None:
    run = lora_run(converted)
    still = {path: values * (not path.endswith("lora_b")) for path, values in run.arrays.items()}
    exported = export_run(dataclasses.replace(run, arrays=still))
    convert(tmp_path / "out", tmp_path / "merged")
    merged = base_weights(tmp_path / "merged")
    for path, values in base_weights(converted).items():
        np.testing.assert_array_equal(merged[path], values, err_msg=path)
    assert {(d.relative_error, d.error_of_change) for d in exported.differences} == {(0.0, None)}


@pytest.mark.parametrize("method", ["full", "qat"])
def test_masters_are_rounded_to_what_the_checkpoint_holds(converted: Path, tmp_path: Path, export_run, method) -> None:
    run = master_run(converted, method)
    export_run(run, layout="original")
    convert(tmp_path / "out", tmp_path / "trained")
    for path, values in base_weights(tmp_path / "trained").items():
        master = run.arrays[path]
        expected = requantized(master) if is_expert_matrix(path) else master.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(values, expected.astype(np.float32), err_msg=path)


@pytest.mark.parametrize(("method", "trained"), [("full", lambda master: master), ("qat", requantized)])
def test_bf16_export_has_the_experts_that_were_trained(
    converted: Path, tmp_path: Path, export_run, method, trained
) -> None:
    run = master_run(converted, method)
    export_run(run, dtype="bf16")
    expected = trained(run.arrays["layers.2.experts.gate_up.weight"]).swapaxes(1, 2).astype(ml_dtypes.bfloat16)
    assert contents(tmp_path / "out")["model.layers.2.mlp.experts.gate_up_proj"][2] == expected.tobytes()


def test_run_of_masters_needs_no_base(converted: Path, tmp_path: Path, export_run) -> None:
    run = dataclasses.replace(master_run(converted, "full"), base=tmp_path / "gone")
    assert export_run(run).num_tensors == 79
    with pytest.raises(ConversionError, match="only merging a LoRA reads the base: --base"):
        export_run(run, base=converted, overwrite=True)


def test_report_gives_the_error_of_each_weight(converted: Path, export_run) -> None:
    run = lora_run(converted)
    exported = export_run(run)
    exact, base = trained_weights(run), base_weights(converted)
    found = {difference.path: difference for difference in exported.differences}
    assert len(found) == 7 * 4
    for path, expert in (("layers.1.attention.output.weight", False), ("layers.2.experts.down", True)):
        weight = f"{path}.weight" if expert else path
        rounded = requantized(exact[weight]) if expert else exact[weight].astype(ml_dtypes.bfloat16).astype(np.float32)
        error = np.linalg.norm(rounded - exact[weight])
        assert found[path].relative_error == pytest.approx(error / np.linalg.norm(exact[weight]), rel=1e-5)
        change = np.linalg.norm(exact[weight] - base[weight])
        assert found[path].error_of_change == pytest.approx(error / change, rel=1e-4)
    assert found["layers.1.attention.output.weight"].relative_error < 2**-8
    assert 0.01 < found["layers.2.experts.down"].relative_error < 0.2


def test_printed_report_says_where_rounding_undoes_the_training(converted: Path, export_run) -> None:
    run = lora_run(converted, alpha=0.01, targets=("experts",))
    assert "rounding moves 8 of 8 weights at least 0.5 times as far as training did" in str(export_run(run))
    in_bf16 = export_run(lora_run(converted, targets=("experts",)), dtype="bf16", overwrite=True)
    assert "rounding moves" not in str(in_bf16)


def test_printed_report_has_a_row_for_each_layer(converted: Path, export_run) -> None:
    exported = export_run(lora_run(converted, targets=("experts",)))
    lines = str(exported).splitlines()
    assert "lora step 7" in lines[0]
    header = next(position for position, line in enumerate(lines) if line.split()[:1] == ["layer"])
    assert lines[header].split() == ["layer", "experts.gate_up", "experts.down"]
    assert [line.split()[0] for line in lines[header + 1 : header + 5]] == ["0", "1", "2", "3"]
    gate_up = next(d for d in exported.differences if d.path == "layers.0.experts.gate_up")
    assert f"{gate_up.relative_error:.1e} ({gate_up.error_of_change:.2g})" in lines[header + 1]
    content = json.loads(json.dumps(exported.to_json()))["differences"][0]
    assert content == {
        "path": "layers.0.experts.gate_up",
        "relative_error": gate_up.relative_error,
        "error_of_change": gate_up.error_of_change,
    }


@pytest.mark.parametrize(
    ("array", "place", "named"),
    [
        (
            "layers.2.experts.down.lora_b",
            (7, 11, 0),
            r"layers\.2\.experts\.down\[7:8\]: value nan at index \(0, 11",
        ),
        ("layers.1.router.weight.lora_b", (4, 0), r"layers\.1\.router\.weight\[0:10\]: value nan at index \(4, 0\)"),
    ],
)
def test_weight_that_is_not_finite_is_named(
    converted: Path, tmp_path: Path, export_run, array: str, place: tuple[int, ...], named: str
) -> None:
    run = lora_run(converted)
    run.arrays[array][place] = np.nan
    with pytest.raises(CheckpointError, match=named + r".*export an earlier step"):
        export_run(run)
    assert not list(tmp_path.iterdir())


def test_base_of_another_architecture_is_refused(converted: Path, export_run) -> None:
    run = lora_run(converted)
    other = dataclasses.replace(run, config=dataclasses.replace(run.config, sliding_window=9))
    with pytest.raises(CheckpointError, match=r"different architectures.*--base"):
        export_run(other)


@pytest.mark.parametrize("method", ["full", "qat"])
def test_run_without_adapter_is_no_peft_adapter(converted: Path, export_run, method) -> None:
    with pytest.raises(ConversionError, match="no LoRA to export"):
        export_run(master_run(converted, method), peft=True)
