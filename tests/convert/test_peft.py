"""A LoRA as PEFT reads it; tests/parity/test_export.py loads one with PEFT itself."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.export import export
from convert.peft import adapter_tensors
from gptoss_jax.errors import ConversionError
from tests.convert.stand_in_run import Run, base_weights, lora_run, trained_weights

LAYER = "base_model.model.model.layers.2"


@pytest.fixture
def run(converted: Path) -> Run:
    return lora_run(converted)


@pytest.fixture
def adapter(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("convert.export._open_run", lambda directory, **where: run)
    exported = export(tmp_path / "run", tmp_path / "out", peft=True)
    assert "56 tensors" in str(exported)
    return tmp_path / "out"


def change(run: Run, path: str) -> np.ndarray:
    return trained_weights(run)[path] - base_weights(run.base)[path]


def test_adapter_has_the_tensors_that_peft_makes(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {
        name.removeprefix(f"{LAYER}."): values.shape for name, values in tensors.items() if "layers.2." in name
    } == {
        "self_attn.q_proj.lora_A.weight": (3, 96),
        "self_attn.q_proj.lora_B.weight": (48, 3),
        "self_attn.k_proj.lora_A.weight": (3, 96),
        "self_attn.k_proj.lora_B.weight": (16, 3),
        "self_attn.v_proj.lora_A.weight": (3, 96),
        "self_attn.v_proj.lora_B.weight": (16, 3),
        "self_attn.o_proj.lora_A.weight": (3, 48),
        "self_attn.o_proj.lora_B.weight": (96, 3),
        "mlp.router.lora_A.weight": (3, 96),
        "mlp.router.lora_B.weight": (10, 3),
        "mlp.experts.base_layer.lora_A.weight": (30, 96),
        "mlp.experts.base_layer.lora_B.weight": (128, 30),
        "mlp.experts.lora_A.weight": (30, 64),
        "mlp.experts.lora_B.weight": (96, 30),
    }
    assert {str(values.dtype) for values in tensors.values()} == {"float32"}


@pytest.mark.parametrize(
    ("module", "weight"),
    [
        ("self_attn.v_proj", "attention.value.weight"),
        ("self_attn.o_proj", "attention.output.weight"),
        ("mlp.router", "router.weight"),
    ],
)
def test_linear_adapter_is_the_change(adapter: Path, run: Run, module: str, weight: str) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"{LAYER}.{module}.lora_{side}.weight"] for side in "AB")
    expected = change(run, f"layers.2.{weight}")
    np.testing.assert_allclose((0.5 * b @ a).reshape(expected.shape), expected, atol=1e-6)


@pytest.mark.parametrize(("module", "matrix"), [("mlp.experts.base_layer", "gate_up"), ("mlp.experts", "down")])
def test_expert_adapter_is_the_change_of_in_out_matrices(adapter: Path, run: Run, module: str, matrix: str) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"{LAYER}.{module}.lora_{side}.weight"] for side in "AB")
    # As PEFT's ParamWrapper.get_delta_weight.
    found = 0.5 * np.einsum("ore,eri->eio", b.reshape(b.shape[0], -1, 10), a.reshape(10, -1, a.shape[1]))
    np.testing.assert_allclose(found, change(run, f"layers.2.experts.{matrix}.weight").swapaxes(1, 2), atol=1e-6)


def test_config_names_what_is_adapted(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["use_rslora"]) == ("LORA", 3, 1.5, False)
    assert config["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert config["target_parameters"] == [
        "mlp.router.weight",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    ]


def test_config_of_attention_alone_names_no_parameters(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = lora_run(converted, targets=("attention",))
    monkeypatch.setattr("convert.export._open_run", lambda directory, **where: run)
    export(tmp_path / "run", tmp_path / "out", peft=True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_parameters"] is None


def test_adapter_of_a_single_expert_is_refused(run: Run) -> None:
    single = dataclasses.replace(run, config=dataclasses.replace(run.config, num_experts=1, experts_per_token=1))
    with pytest.raises(ConversionError, match=r"single expert.*mlp\.experts\.gate_up_proj"):
        adapter_tensors(single)
