"""What a run writes down: JSON lines, TensorBoard's events, and lines for a terminal."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from gptoss_jax.errors import TrainingError

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
Metrics = dict[str, Any]


class MetricsWriter:
    """Appends to a run's files, in which what lies after `step`, from where the run goes on, is dropped before."""

    def __init__(self, directory: Path, *, step: int, tensorboard: bool) -> None:
        path = directory / METRICS
        kept = _lines_up_to(path, step) if path.is_file() else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.rename(path)
        self._file = path.open("a")
        self._events = _events(directory / TENSORBOARD, step) if tensorboard else None

    def write(self, metrics: Metrics) -> None:
        """Write one line; its numbers go to TensorBoard by name under the line's `kind`."""
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in metrics.items():
                if isinstance(value, float):
                    self._events.add_scalar(f"{metrics['kind']}/{name}", value, metrics["step"])

    def close(self) -> None:
        """Finish the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def check_tensorboard() -> None:
    """Raise TrainingError unless TensorBoard's events can be written."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise TrainingError(
            "tensorboardX is not installed", where="--tensorboard", fix="pip install 'gptoss-jax[tensorboard]'"
        )


def line(metrics: Metrics, steps: int) -> str:
    """One update or evaluation for a terminal.

    Example:
        >>> line({"kind": "evaluation", "step": 5, "loss": 1.5, "tokens": 20.0}, 10)
        'step 5/10  evaluation loss 1.5000 over 20 tokens'
    """
    place = f"step {metrics['step']}/{steps}"
    if metrics["kind"] == "evaluation":
        return f"{place}  evaluation loss {metrics['loss']:.4f} over {metrics['tokens']:.0f} tokens"
    return (
        f"{place}  loss {metrics['loss']:.4f}  gradient {metrics['gradient_norm']:.3f}  "
        f"rate {metrics['learning_rate']:.2e}  {metrics['tokens_per_s']:.0f} tokens/s"
    )


def _lines_up_to(path: Path, step: int) -> list[str]:
    kept = []
    for text in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(text)["step"] > step:
                continue
        except (ValueError, KeyError, TypeError):  # the last line of a killed run may be cut
            continue
        kept.append(text)
    return kept


def _events(directory: Path, step: int) -> Any:
    check_tensorboard()
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(directory), purge_step=step + 1)
