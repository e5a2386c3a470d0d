"""Measures what docs/parity.md states, as its two tables, with the oracles run live.

python -m tests.parity.figures
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

import gptoss_jax
from tests.parity.oracles import NUM_GREEDY, Expected
from tests.parity.recipes import BROKEN, CASES
from tests.parity.test_parity import MARGIN, all_logits
from tests.parity.workshop import Workshop


def main() -> None:
    lines = [
        "| case | prompt | positions | float32: difference / deviation | greedy | reference: counted "
        "| float32 | bfloat16 | transformers |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    broken = ["| broken | case | prompt | change / deviation | agreement with the reference |", "|---|---|---|---|---|"]
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            workshop = Workshop(case, Path(folder))
            for prompt, expected in workshop.golden("live").prompts.items():
                lines.append(f"| {case.name} | {prompt} | {_parity(workshop, prompt, expected)} |")
            for part, prompt in BROKEN.items():
                broken.append(f"| {part} | {case.name} | {prompt} | {_change(workshop, part, prompt)} |")
    sys.stdout.write("\n".join([*lines, "", *broken, ""]))


def _parity(workshop: Workshop, prompt: str, expected: Expected) -> str:
    narrow, wide = (all_logits(workshop, "original", dtype, prompt) for dtype in ("bfloat16", "float32"))
    difference = np.abs(wide - expected.logits).max() / expected.deviation
    tokens, lengths = (workshop.case.prompts()[f"{prompt}.{name}"] for name in ("tokens", "lengths"))
    completions = gptoss_jax.generate(
        workshop.model("original", "float32"),
        [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)],
        gptoss_jax.Sampling(temperature=0.0),
        max_new_tokens=NUM_GREEDY,
        stop_ids=(),
    )
    same = np.array([completion.ids for completion in completions]) == expected.greedy
    decided = expected.margin > MARGIN
    agreements = (
        f"{(top == expected.reference_top)[decided].mean():.2%}"
        for top in (wide.argmax(-1), narrow.argmax(-1), expected.top)
    )
    return " | ".join(
        [str(len(decided)), f"{difference:.1e}", f"{same.sum()} of {same.size}", str(decided.sum()), *agreements]
    )


def _change(workshop: Workshop, part: str, prompt: str) -> str:
    expected = workshop.golden("live").prompts[prompt]
    logits = workshop.oracles()["transformers"][f"{prompt}.without.{part}"][expected.rows, expected.positions]
    change = np.abs(logits - expected.logits).max() / expected.deviation
    same = (logits.argmax(-1) == expected.reference_top)[expected.margin > MARGIN]
    return f"{change:.2f} | {same.mean():.1%}"


if __name__ == "__main__":
    main()
