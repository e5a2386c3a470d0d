"""The loss of a batch: the cross-entropy of the trained tokens, and the routers' balance."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from gptoss_jax.finetune.batches import Batch
from gptoss_jax.finetune.forward import Arrays, Form, Routing, final_weights, hidden, product
from gptoss_jax.finetune.placement import DATA, varying
from gptoss_jax.sharding import MODEL_AXES
from pallas_kernels.projections.reference import norm

_MOST_LOGITS = 1 << 25
"""That exist at a time: 134 MB in float32, and as much again for what they become."""
_ALIGNED = 8
"""Columns of logits: products of bfloat16 rows that are no multiple of 16 bytes take twice as long."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """What a batch adds up to, over all its rows; float32."""

    loss: Any
    """Of the trained tokens, in nats."""
    tokens: Any
    """Trained tokens."""
    balance: Any
    """Mean over layers of E * sum_e f_e * p_e, f_e being an expert's share of the choices and p_e its mean probability:
    1 if all experts are used alike (Fedus et al. 2021, arXiv 2101.03961, equation 4), times `tokens`."""
    expert_counts: Any
    """`L E`: tokens that chose each expert."""


def batch_sums(
    form: Form, mesh: Mesh, trained: dict[str, P], frozen: dict[str, P], *, absent_rows: int = 0
) -> Callable[[Arrays, Arrays, Batch], Sums]:
    """The function of trained arrays, frozen arrays and a batch that gives its sums; differentiable in the first.

    `absent_rows` is how many rows of zeros the vocabulary has beyond those that the model holds: their logits, zero,
    are in the softmax.
    """

    def local(trained: Arrays, frozen: Arrays, batch: Batch) -> Sums:
        x, routing = hidden(trained, frozen, batch, form)
        scale, unembedding = final_weights(trained, frozen, form)
        rows = norm(x, scale, eps=form.config.rms_norm_eps).reshape(-1, x.shape[-1])
        rows = rows.astype(jnp.float32)  # in which their gradient is summed over the vocabulary
        targets, weights = batch.targets.reshape(-1), batch.weights.reshape(-1)
        loss = jax.lax.psum(_cross_entropy(rows, targets, weights, unembedding, absent_rows, form.dtype), DATA)
        tokens = jax.lax.psum(weights.sum(), DATA)
        routing = jax.tree.map(lambda part: jax.lax.psum(part, DATA), routing)
        return Sums(loss, tokens, _balance(routing) * tokens, routing.counts)

    return jax.shard_map(local, mesh=mesh, in_specs=(trained, frozen, P(DATA)), out_specs=P())


def _balance(routing: Routing) -> Float[Array, ""]:
    num_experts = routing.counts.shape[1]
    chosen = routing.counts.sum(axis=1, keepdims=True)
    real = routing.probabilities.sum(axis=1, keepdims=True)  # probabilities of one token sum to 1
    per_layer = (routing.counts / jnp.maximum(chosen, 1) * routing.probabilities / jnp.maximum(real, 1)).sum(axis=1)
    return num_experts * per_layer.mean()


def _cross_entropy(
    rows: Float[Array, "M D"],
    targets: Int[Array, " M"],
    weights: Float[Array, " M"],
    unembedding: Float[Array, "V D"],
    absent_rows: int,
    dtype: Any,
) -> Float[Array, ""]:
    """The weighted sum of the negative log-probabilities, a piece of the vocabulary at a time.

    A piece's logits are computed again in the backward pass; one that is in the host's memory is brought from there.
    """
    vocab_size = unembedding.shape[0]
    size = _piece(vocab_size, len(targets))
    if remainder := -vocab_size % size:
        unembedding = jnp.pad(unembedding, ((0, remainder), (0, 0)))
    pieces = unembedding.reshape(-1, size, unembedding.shape[1])
    unaligned = -size % _ALIGNED
    local = targets - jax.lax.axis_index(MODEL_AXES) * vocab_size

    @jax.checkpoint
    def add(sums: tuple[Array, Array, Array], piece: tuple[Array, Array]) -> tuple[tuple[Array, Array, Array], None]:
        largest, total, target = sums
        first, matrix = piece[0], jax.device_put(piece[1], jax.memory.Space.Device)
        matrix = jnp.pad(matrix.astype(dtype), ((0, unaligned), (0, 0)))
        logits = product("MD,VD->MV", rows.astype(dtype), matrix)
        if unaligned or remainder:
            column = jnp.arange(size + unaligned)
            logits = jnp.where((column < size) & (first + column < vocab_size), logits, -jnp.inf)
        new = jnp.maximum(largest, jax.lax.stop_gradient(logits.max(axis=-1)))
        total = total * jnp.exp(largest - new) + jnp.exp(logits - new[:, None]).sum(axis=-1)
        place = local - first
        here = (place >= 0) & (place < size) & (local < vocab_size)
        found = jnp.take_along_axis(logits, jnp.where(here, place, 0)[:, None], axis=1)[:, 0]
        return (new, total, target + jnp.where(here, found, 0.0)), None

    zeros = jnp.zeros(targets.shape)
    start = varying(*(jnp.full_like(zeros, jnp.finfo(zeros.dtype).min), zeros, zeros), rows, unembedding)[:3]
    firsts = jnp.arange(pieces.shape[0]) * size
    (largest, total, target), _ = jax.lax.scan(add, start, (firsts, pieces))
    most = jax.lax.pmax(jax.lax.stop_gradient(largest), MODEL_AXES)
    if absent_rows:
        most = jnp.maximum(most, 0.0)
    whole = jax.lax.psum(total * jnp.exp(largest - most), MODEL_AXES) + absent_rows * jnp.exp(-most)
    return ((jnp.log(whole) + most - jax.lax.psum(target, MODEL_AXES)) * weights).sum()


def _piece(vocab_size: int, num_rows: int) -> int:
    """Rows of the vocabulary whose logits exist at a time: a divisor of it, if one is not far below the limit."""
    fewest = -(-vocab_size * num_rows // _MOST_LOGITS)
    counts = (count for count in range(fewest, 4 * fewest + 1) if vocab_size % count == 0)
    return -(-vocab_size // next(counts, fewest))
