"""Examples to batches of packed rows, any step of which can be made by itself."""

import bisect
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptoss_jax.errors import DataError
from gptoss_jax.finetune.data import NUM_NAMED, Example, shuffled
from gptoss_jax.finetune.packing import pack
from gptoss_jax.harmony.tokens import END_OF_TEXT


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """B rows of T tokens, each with conversations one after the other and padding at its end; fields are `B T`."""

    tokens: Any
    """int32: what the model reads."""
    targets: Any
    """int32: what it is to write next."""
    weights: Any
    """float32: 1 where the target is trained, else 0."""
    segments: Any
    """int32: the conversation's number in its row, from 1; 0 for padding."""
    positions: Any
    """int32: the token's place in its conversation, from 0."""
    embedded: Any = None
    """`B T D`: the tokens' rows of the embedding, if that is not on the devices."""


class Batches:
    """The batches of a run: `at(step)` needs no earlier step, so a run resumes anywhere, in mid-epoch too.

    `seed` and the epoch's number shuffle the examples, which then fill rows. An epoch has every example once: its last
    batch is filled up with rows of padding. An example takes one token less than it has ids, since its last is only
    written. One that does not fit a row is refused, or with `truncate` loses its end; DataError says which lines of
    `source`, their file, are too long, or have nothing trained left.

    >>> examples = [Example(np.arange(n, dtype=np.int32), np.ones(n, bool), line=n) for n in (3, 4, 6)]
    >>> batches = Batches(examples, batch_size=2, sequence_length=5, seed=0, shuffle=False)
    >>> batches.at(0).segments.tolist()
    [[1, 1, 2, 2, 2], [1, 1, 1, 1, 1]]
    >>> batches.epoch_of(1)
    (1, 0)
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        shuffle: bool = True,
        truncate: bool = False,
        source: str | Path = "batches",
    ) -> None:
        if not examples:
            raise DataError("no examples", where=str(source), fix="read some")
        self._examples = _fitted(examples, sequence_length, truncate, str(source))
        self._batch_size = batch_size
        self._sequence_length = sequence_length
        self._seed = seed
        self._shuffle = shuffle
        self._begins = [0]  # the first step of each epoch so far, and of the one after
        self._packed: tuple[int, list[list[int]]] = (-1, [])

    def at(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs, on the host."""
        epoch, step = self.epoch_of(step)
        shape = self._batch_size, self._sequence_length
        batch = Batch(
            tokens=np.full(shape, END_OF_TEXT, np.int32),
            targets=np.full(shape, END_OF_TEXT, np.int32),
            weights=np.zeros(shape, np.float32),
            segments=np.zeros(shape, np.int32),
            positions=np.zeros(shape, np.int32),
        )
        for row, members in enumerate(self._rows(epoch)[step * self._batch_size :][: self._batch_size]):
            start = 0
            for segment, member in enumerate(members, 1):
                example = self._examples[member]
                length = len(example.ids) - 1
                place = row, slice(start, start + length)
                batch.tokens[place] = example.inputs
                batch.targets[place] = example.ids[1:]
                batch.weights[place] = example.trained[1:]
                batch.segments[place] = segment
                batch.positions[place] = np.arange(length)
                start += length
        return batch

    def steps_per_epoch(self, epoch: int) -> int:
        """How many batches an epoch has: epochs differ by a few, as their rows do."""
        return -(-len(self._rows(epoch)) // self._batch_size)

    def epoch_of(self, step: int) -> tuple[int, int]:
        """The epoch that a step lies in, and which of its steps it is."""
        while step >= self._begins[-1]:
            self._begins.append(self._begins[-1] + self.steps_per_epoch(len(self._begins) - 1))
        epoch = bisect.bisect_right(self._begins, step) - 1
        return epoch, step - self._begins[epoch]

    def _rows(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch, as indices of examples; those of the latest that was asked for are kept."""
        if self._packed[0] != epoch:
            num = len(self._examples)
            order = shuffled(num, self._seed, epoch).tolist() if self._shuffle else range(num)
            packed = pack([len(self._examples[index].ids) - 1 for index in order], self._sequence_length)
            self._packed = epoch, [[order[place] for place in row] for row in packed]
        return self._packed[1]


def _fitted(examples: Sequence[Example], sequence_length: int, truncate: bool, source: str) -> list[Example]:
    """The examples, if each fits a row; with `truncate` the beginnings of those that do not."""
    longest = sequence_length + 1
    long = [example for example in examples if len(example.ids) > longest]
    if long and not truncate:
        fix = f"choose a sequence length of {max(len(example.ids) for example in long) - 1}, or truncate them"
        what = f"{len(long)} conversations of over {sequence_length} tokens"
        raise DataError(what, where=f"{source}, {_lines(long)}", fix=fix)
    untrained = [example for example in long if not example.trained[:longest].any()]
    if untrained:
        raise DataError(
            f"{len(untrained)} conversations have nothing to train on in their first {sequence_length} tokens",
            where=f"{source}, {_lines(untrained)}",
            fix="choose a greater sequence length, or leave them out",
        )
    return [
        dataclasses.replace(example, ids=example.ids[:longest], trained=example.trained[:longest])
        for example in examples
    ]


def _lines(examples: Sequence[Example]) -> str:
    lines = sorted({example.line for example in examples})
    more = f" and {len(lines) - NUM_NAMED} more" if len(lines) > NUM_NAMED else ""
    return f"line{'s' * (len(lines) > 1)} {', '.join(map(str, lines[:NUM_NAMED]))}{more}"
