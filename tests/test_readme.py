"""The README's Python example runs as it stands, on the demo model."""

import re
from pathlib import Path

import pytest

import gptoss_jax.demo


@pytest.mark.slow
def test_python_example_runs(trained_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(gptoss_jax.demo, "make_checkpoint", lambda: trained_checkpoint)
    readme = Path(__file__).parent.parent / "README.md"
    [example] = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["logits"].shape == (1, len(names["ids"]), 201088)
    printed = capsys.readouterr().out
    assert "content='2 + 2 = 4.'" in printed
    assert "Done(finish_reason='stop'" in printed
