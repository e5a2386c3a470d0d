"""What transformers writes with the demo model that is shipped, and how sure it is of each token.

python -m tests.parity.demo        writes tests/parity/golden/demo.npz afresh (make parity-golden)
"""

import dataclasses
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from gptoss_jax.demo.compact import Compact
from gptoss_jax.demo.corpus import evaluation_prompts
from gptoss_jax.demo.evaluate import GROUPS
from gptoss_jax.demo.expand import SHIPPED, expand
from tests.demo.conftest import first_prompt
from tests.parity.oracles import GOLDEN, run_oracle

NUM_TOKENS = 64
_FILE = GOLDEN / "demo.npz"


@dataclasses.dataclass(frozen=True)
class Written:
    """Greedy continuations of `prompts`, in float32."""

    weights: np.ndarray
    """Their SHA-256, a string."""
    ids: np.ndarray
    """int32 [B, NUM_TOKENS], those after the end of the text included."""
    margins: np.ndarray
    """float32 [B, NUM_TOKENS]: how far the token's logit is above the second."""


def prompts() -> list[list[int]]:
    """One problem of each kind; what follows is the answer, or the call of a tool."""
    num_kinds = sum(len(kinds) for kinds in GROUPS.values())
    return [first_prompt(prompt) for prompt in evaluation_prompts(seed=11, count=num_kinds)]


def committed() -> Written:
    return Written(**np.load(_FILE))


def live() -> Written:
    lengths = np.array([len(prompt) for prompt in prompts()])
    tokens = np.zeros((len(lengths), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts(), strict=True):
        row[: len(prompt)] = prompt
    case = SimpleNamespace(prompts=lambda: {"demo.tokens": tokens, "demo.lengths": lengths})
    with tempfile.TemporaryDirectory() as folder:
        published = expand(Path(folder) / "published")
        said = run_oracle("transformers", published, case, "--greedy", str(NUM_TOKENS), "--only-greedy")
    return Written(np.array(Compact.open(SHIPPED).sha256), said["demo.greedy"], said["demo.margins"])


if __name__ == "__main__":
    np.savez_compressed(_FILE, **dataclasses.asdict(live()))
