"""Makes what the parity tests compare: checkpoints, models, and what the oracles say of them, each once."""

import io
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import gptoss_jax
from convert.converter import convert
from tests.parity.oracles import GOLDEN, Golden, run_oracles
from tests.parity.recipes import BROKEN, Case


class Workshop:
    """Makes what belongs to one case when it is first asked for, and keeps it."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.checkpoints = folder / "published"
        self._converted = folder / "converted"
        self._models: dict[tuple[str, str], gptoss_jax.Transformer] = {}
        self._golden: dict[str, Golden] = {}
        self._oracles: dict[str, dict[str, np.ndarray]] = {}
        case.write_checkpoints(self.checkpoints)

    def converted(self, layout: str) -> Path:
        """The checkpoint converted from one layout."""
        destination = self._converted / layout
        if not destination.exists():
            convert(self.checkpoints / layout, destination, progress=io.StringIO())
        return destination

    def model(self, layout: str, dtype: str) -> gptoss_jax.Transformer:
        """The model converted from one layout and loaded."""
        if (layout, dtype) not in self._models:
            self._models[layout, dtype] = gptoss_jax.load(self.converted(layout), dtype=jnp.dtype(dtype))
        return self._models[layout, dtype]

    def golden(self, source: str) -> Golden:
        """What the oracles say: as committed, or live."""
        if source not in self._golden:
            if source == "committed":
                self._golden[source] = Golden.read(GOLDEN / f"{self.case.name}.npz")
            else:
                self._golden[source] = Golden.of(self.case, self.checkpoints, self.oracles())
        return self._golden[source]

    def oracles(self) -> dict[str, dict[str, np.ndarray]]:
        """All that the oracles say when run now, by the oracle's name."""
        if not self._oracles:
            self._oracles = run_oracles(self.case, self.checkpoints, broken=BROKEN)
        return self._oracles
