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

_CHUNK_LOGITS = 512 * 201_088
"""That exist at a time: 0.4 GB in float32."""


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
        targets, weights = batch.targets.reshape(-1), batch.weights.reshape(-1)
        loss = jax.lax.psum(_cross_entropy(rows, targets, weights, unembedding, absent_rows), DATA)
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
) -> Float[Array, ""]:
    """The weighted sum of the negative log-probabilities, a chunk of tokens at a time; logits are computed again in the
    backward pass."""
    num_rows, width = rows.shape
    size = min(max(1, _CHUNK_LOGITS // unembedding.shape[0]), num_rows)
    padding = -num_rows % size
    chunks = (
        jnp.pad(rows, ((0, padding), (0, 0))).reshape(-1, size, width),
        jnp.pad(targets, (0, padding)).reshape(-1, size),
        jnp.pad(weights, (0, padding)).reshape(-1, size),
    )

    @jax.checkpoint
    def add(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        rows, targets, weights = chunk
        logits = product("MD,VD->MV", rows, unembedding.astype(rows.dtype))
        largest = jax.lax.pmax(jax.lax.stop_gradient(logits.max(axis=-1)), MODEL_AXES)
        if absent_rows:
            largest = jnp.maximum(largest, 0.0)
        parts = jnp.exp(logits - largest[:, None]).sum(axis=-1)
        whole = jax.lax.psum(parts, MODEL_AXES) + absent_rows * jnp.exp(-largest)
        local = targets - jax.lax.axis_index(MODEL_AXES) * unembedding.shape[0]
        here = (local >= 0) & (local < unembedding.shape[0])
        found = jnp.take_along_axis(logits, jnp.where(here, local, 0)[:, None], axis=1)[:, 0]
        target = jax.lax.psum(jnp.where(here, found, 0.0), MODEL_AXES)
        return total + ((jnp.log(whole) + largest - target) * weights).sum(), None

    (start,) = varying(jnp.zeros(()), weights)[:1]
    total, _ = jax.lax.scan(add, start, chunks)
    return total
