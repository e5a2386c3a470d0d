"""Packed batches of random conversations, and the same conversations one by one."""

import jax
import numpy as np

from gptoss_jax.finetune.batches import Batch


def random_batch(lengths, *, sequence_length: int, vocab_size: int, seed: int = 0) -> Batch:
    """A row for each list of conversation lengths; about two thirds of the targets are trained."""
    random = np.random.default_rng(seed)
    shape = len(lengths), sequence_length
    fields = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segments", "positions")}
    weights = np.zeros(shape, np.float32)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for segment, length in enumerate(row_lengths, 1):
            ids = random.integers(0, vocab_size, length + 1)
            place = row, slice(start, start + length)
            fields["tokens"][place], fields["targets"][place] = ids[:-1], ids[1:]
            fields["segments"][place], fields["positions"][place] = segment, np.arange(length)
            weights[place] = random.random(length) < 2 / 3
            start += length
    return Batch(weights=weights, **fields)


def conversations(batch: Batch):
    """(tokens, targets, weights) of every conversation of a batch."""
    for row in range(len(batch.tokens)):
        for segment in range(1, batch.segments[row].max() + 1):
            here = batch.segments[row] == segment
            yield batch.tokens[row][here], batch.targets[row][here], batch.weights[row][here]


def mean_loss(model, batch: Batch) -> float:
    """The mean loss of a batch of whole rows by the model of inference."""
    logits = jax.nn.log_softmax(model(batch.tokens), axis=-1)
    found = np.take_along_axis(np.asarray(logits), batch.targets[..., None], axis=-1)[..., 0]
    return float(-(found * batch.weights).sum() / batch.weights.sum())
