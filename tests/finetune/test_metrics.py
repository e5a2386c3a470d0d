"""What a run that goes on finds in its files of metrics, and leaves there."""

import json
import struct
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from gptoss_jax.errors import TrainingError
from gptoss_jax.finetune.metrics import METRICS, TENSORBOARD, MetricsWriter, check_tensorboard


def written(directory, steps, *, after, tensorboard=False):
    writer = MetricsWriter(directory, step=after, tensorboard=tensorboard)
    for step in steps:
        writer.write({"kind": "train", "step": step, "loss": 1.0 + after})
    writer.close()


@pytest.mark.parametrize("after", [0, 2])
def test_lines_after_the_step_are_written_anew(tmp_path, after):
    written(tmp_path, range(1, 5), after=0)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"kind": "train", "st')
    written(tmp_path, range(after + 1, 5), after=after)
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [
        (step, 1.0 if step <= after else 1.0 + after) for step in range(1, 5)
    ]


@pytest.mark.parametrize("after", [0, 2])
def test_tensorboard_is_told_to_drop_what_lies_after_the_step(tmp_path, after):
    written(tmp_path, [after + 1], after=after, tensorboard=True)
    [file] = (tmp_path / TENSORBOARD).iterdir()
    starts = [event.step for event in events(file) if event.session_log.status == SessionLog.START]
    assert starts == [after + 1]


def events(file):
    """TFRecords: the length, its checksum, the content and its own."""
    content = file.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_missing_tensorboard_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(TrainingError, match=r"tensorboardX is not installed: --tensorboard: pip install"):
        check_tensorboard()
