"""The addends of a sum that is still to be made."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """What adds up to rows: S addends for each, those of experts elsewhere left out.

    Example:
        >>> answers = jnp.array([[[1.0], [jnp.nan]], [[2.0], [3.0]]])
        >>> Parts(answers, jnp.array([[5, 2], [4, 5]]), first=jnp.array([4]), count=2).total().tolist()
        [[1.0], [5.0]]
    """

    values: Any
    """`T S D`, float32 or the dtype of the rows."""
    ids: Any = None
    """int32 `T S`, the expert of each: outside `first` to `first + count - 1` its values may be anything and do not
    count. None if all count."""
    first: Any = None
    """int32 `1`; None is 0."""
    count: int = dataclasses.field(default=0, metadata={"static": True})

    def total(self) -> Float[Array, "T D"]:
        """The sums, in the dtype of the values."""
        values = self.values
        if self.ids is not None:
            local = self.ids if self.first is None else self.ids - self.first
            values = jnp.where(((local >= 0) & (local < self.count))[..., None], values, 0)
        return values.sum(axis=1)
