"""The oracles themselves: that they still say what is committed, and that these prompts notice every part."""

import numpy as np
import pytest

from tests.parity.recipes import BROKEN
from tests.parity.test_parity import AGREEMENT, LARGEST_DIFFERENCE, MARGIN
from tests.parity.workshop import Workshop

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("_oracles")]

SAME = 1e-4
"""Of float32 logits over their deviation: the same torch on another processor."""
NOTICED = 20 * LARGEST_DIFFERENCE


def test_live_oracles_say_what_is_committed(workshop: Workshop) -> None:
    committed, live = workshop.golden("committed"), workshop.golden("live")
    assert committed.checksums == live.checksums
    for name, expected in committed.prompts.items():
        now = live.prompts[name]
        assert np.abs(now.logits[expected.kept] - expected.logits).max() <= SAME * expected.deviation
        np.testing.assert_array_equal(now.greedy, expected.greedy)
        decided = expected.margin > MARGIN
        assert (now.reference_top == expected.reference_top)[decided].mean() >= AGREEMENT


def test_oracles_agree_with_each_other(workshop: Workshop) -> None:
    for expected in workshop.golden("live").prompts.values():
        decided = expected.margin > MARGIN
        assert (expected.top == expected.reference_top)[decided].mean() >= AGREEMENT


def test_padding_on_either_side_changes_nothing(workshop: Workshop) -> None:
    said = workshop.oracles()["transformers"]
    alone = said["ragged.logits"]
    for side in ("left", "right"):
        assert np.abs(said[f"ragged.padded_{side}"] - alone).max() <= SAME * alone.std()


@pytest.mark.parametrize(("part", "prompt"), BROKEN.items())
def test_broken_part_is_noticed(workshop: Workshop, part: str, prompt: str) -> None:
    said = workshop.oracles()["transformers"]
    whole = said[f"{prompt}.logits"]
    assert np.abs(said[f"{prompt}.without.{part}"] - whole).max() >= NOTICED * whole.std()
