"""Runs the torch oracles in their own environment, and keeps what they say: whole, or little enough to commit.

python -m tests.parity.oracles        writes tests/parity/golden afresh (make parity-golden)
"""

import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tests.parity.recipes import CASES, Case, checksum

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
PYTHON = HERE.parents[1] / ".venv-parity" / "bin" / "python"
NUM_GREEDY = 24
_KEPT = 24


@dataclasses.dataclass(frozen=True)
class Expected:
    """What both oracles say of one prompt. n counts all its positions, row after row, without padding."""

    rows: np.ndarray
    """int32 [n]: each position's row."""
    positions: np.ndarray
    """int32 [n]: its place in the row."""
    deviation: float
    """Standard deviation of transformers' logits, all positions together."""
    kept: np.ndarray
    """int32 [k]: which of the n positions have logits and residuals here."""
    logits: np.ndarray
    """float32 [k, V], transformers'."""
    residuals: np.ndarray
    """float32 [L + 1, k, D], transformers': the embedding, then after each layer. Empty for several rows."""
    greedy: np.ndarray
    """int32 [B, NUM_GREEDY]: transformers' greedy continuation of each row."""
    top: np.ndarray
    """int16 [n]: transformers' most probable token."""
    margin: np.ndarray
    """float16 [n]: how far its logit is above the second, in transformers' float32."""
    reference_top: np.ndarray
    """int16 [n]: the reference's most probable token."""


@dataclasses.dataclass(frozen=True)
class Golden:
    """What both oracles say of one case."""

    prompts: dict[str, Expected]
    checksums: dict[str, str]
    """Per layout, of the checkpoint it was made from."""
    versions: dict[str, str]

    def write(self, path: Path) -> None:
        arrays: dict[str, np.ndarray] = {
            "checksums": np.array(json.dumps(self.checksums)),
            "versions": np.array(json.dumps(self.versions)),
        }
        for name, expected in self.prompts.items():
            for field in dataclasses.fields(expected):
                arrays[f"{name}.{field.name}"] = np.asarray(getattr(expected, field.name))
        np.savez_compressed(path, **arrays)

    @classmethod
    def read(cls, path: Path) -> "Golden":
        arrays = dict(np.load(path))
        names = [key.removesuffix(".logits") for key in arrays if key.endswith(".logits")]
        fields = [field.name for field in dataclasses.fields(Expected)]
        return cls(
            prompts={name: Expected(**{field: arrays[f"{name}.{field}"] for field in fields}) for name in names},
            checksums=json.loads(str(arrays["checksums"])),
            versions=json.loads(str(arrays["versions"])),
        )

    @classmethod
    def of(cls, case: Case, checkpoints: Path, outputs: Mapping[str, Mapping[str, np.ndarray]]) -> "Golden":
        """Everything the oracles said, all positions kept; `outputs` is by the oracle's name."""
        said, reference = outputs["transformers"], outputs["reference"]
        prompts = {}
        for name, lengths in case.lengths.items():
            rows, positions = np.nonzero(np.arange(max(lengths)) < np.array(lengths)[:, None])
            logits = said[f"{name}.logits"][rows, positions]
            second, best = np.sort(logits, axis=-1)[:, -2:].T
            prompts[name] = Expected(
                rows=rows.astype(np.int32),
                positions=positions.astype(np.int32),
                deviation=float(logits.std()),
                kept=np.arange(len(rows), dtype=np.int32),
                logits=logits,
                residuals=said.get(f"{name}.residuals", np.zeros((0, len(rows), 0), np.float32)),
                greedy=said[f"{name}.greedy"],
                top=logits.argmax(-1).astype(np.int16),
                margin=(best - second).astype(np.float16),
                reference_top=reference[f"{name}.logits"][rows, positions].argmax(-1).astype(np.int16),
            )
        versions = json.loads(str(said["versions"])) | json.loads(str(reference["versions"]))
        return cls(prompts, {layout: checksum(checkpoints / layout) for layout in ("hf", "original")}, versions)

    def small(self, case: Case) -> "Golden":
        """The same with logits at some positions only, and residuals at a few of the short prompt."""
        prompts = {}
        for name, whole in self.prompts.items():
            num_positions = len(whole.rows)
            edges = [case.config.sliding_window, case.config.original_context]
            near_edges = [edge + step for edge in edges for step in (-2, -1, 0, 1) if edge + step < num_positions]
            spread = np.linspace(0, num_positions - 1, _KEPT).round().astype(np.int32)
            kept = np.unique([*spread, *near_edges]).astype(np.int32)
            residuals = whole.residuals[:, kept] if name == "short" else whole.residuals[:0, kept]
            prompts[name] = dataclasses.replace(whole, kept=kept, logits=whole.logits[kept], residuals=residuals)
        return dataclasses.replace(self, prompts=prompts)


def run_oracles(case: Case, checkpoints: Path, *, broken: Mapping[str, str]) -> dict[str, dict[str, np.ndarray]]:
    """What both oracles say of the case's prompts, by the oracle's name; transformers also with parts broken."""
    without = ["--without", *(f"{part}={prompt}" for part, prompt in broken.items())]
    return {
        "transformers": run_oracle("transformers", checkpoints / "hf", case, "--greedy", str(NUM_GREEDY), *without),
        "reference": run_oracle("reference", checkpoints / "original", case),
    }


def run_oracle(oracle: str, checkpoint: Path, case: Case, *options: str | Path) -> dict[str, np.ndarray]:
    """What one oracle, `transformers` or `reference`, says of the case's prompts: the arrays of OUT.npz."""
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "prompts.npz", **case.prompts())
        arguments = [checkpoint, Path(folder) / "prompts.npz", Path(folder) / "out.npz", *options]
        subprocess.run([PYTHON, HERE / f"oracle_{oracle}.py", *arguments], check=True)
        return dict(np.load(Path(folder) / "out.npz"))


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = Path(folder)
            case.write_checkpoints(checkpoints)
            golden = Golden.of(case, checkpoints, run_oracles(case, checkpoints, broken={}))
        golden.small(case).write(GOLDEN / f"{case.name}.npz")


if __name__ == "__main__":
    main()
