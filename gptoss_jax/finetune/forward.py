"""The forward pass of training: whole packed rows without a cache, on each device's part of the weights.

The same model as `model.transformer`'s, tested to give the same logits. What differs is what training asks for: its
arrays come by path, adapters join in, weights may be float32 masters, and every operation has a gradient. It runs
inside `shard_map`; the devices along `data` have different rows, those along the other axes different heads, experts
and vocabulary rows of the same ones.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.config import LayerKind, ModelConfig
from gptoss_jax.finetune.adapters import A, B, LoRA
from gptoss_jax.finetune.batches import Batch
from gptoss_jax.finetune.placement import DATA, EMBEDDING, UNEMBEDDING, varying
from gptoss_jax.model.rope import rotate, rotations
from gptoss_jax.sharding import MODEL_AXES, AxisNames
from pallas_kernels.attention import segment_attention
from pallas_kernels.experts import DenseExperts, ExpertAdapters, ExpertWeights, HopperExperts, trainable_experts
from pallas_kernels.mxfp4 import MXFP4, straight_through
from pallas_kernels.projections.reference import norm

Arrays = Mapping[str, Array]
Held = ExpertWeights | HopperExperts | DenseExperts
_DENSE = ("gate_up.weight", "gate_up.bias", "down.weight", "down.bias")
_QUANTIZED = ("experts.gate_up.weight", "experts.down.weight")
Rotation = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """What the forward pass must know beside the arrays; hashable, so that layers of one kind are traced once."""

    config: ModelConfig
    dtype: Any
    """Of activations and products; float32 for exact comparisons."""
    lora: LoRA | None
    quantize: bool
    """Whether the trained expert matrices are rounded to MXFP4, straight through."""
    heads: AxisNames
    """The mesh axes that split attention heads."""
    gathered: tuple[tuple[str, int], ...]
    """By path, the dim of a trained array that `data` splits."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """How the routers of all layers spread the tokens of this device's rows, padding left out."""

    counts: Any
    """float32 `L E`: tokens that chose each expert."""
    probabilities: Any
    """float32 `L E`: sums over the tokens of each expert's probability, of all experts."""


def hidden(trained: Arrays, frozen: Arrays, batch: Batch, form: Form) -> tuple[Float[Array, "B T D"], Routing]:
    """The last layer's output for a batch's rows, and what the routers did."""
    weights = _Weights("", trained, frozen, form)
    embedded = batch.embedded
    x = _embed(batch.tokens, weights.whole(EMBEDDING, jnp.float32)).astype(form.dtype) if embedded is None else embedded
    rotation = rotations(batch.positions, form.config)
    routing = []
    for index, kind in enumerate(form.config.layer_kinds):
        prefix = f"layers.{index}."
        arrays, x = _together(_under(prefix, trained), x)
        x, found = _layer(arrays, _under(prefix, frozen), x, rotation, batch.segments, form, kind)
        routing.append(found)
    return x, jax.tree.map(lambda *layers: jnp.stack(layers), *routing)


def final_weights(trained: Arrays, frozen: Arrays, form: Form) -> tuple[Float[Array, " D"], Float[Array, "V D"]]:
    """The last norm's scale and the unembedding; a master in float32, so that its gradient is summed in float32."""
    weights = _Weights("", trained, frozen, form)
    return weights["norm.scale"], weights.whole(UNEMBEDDING, jnp.float32)


def product(equation: str, x: Float[Array, "..."], weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """An einsum of two factors, accumulated and returned in float32, whose cotangents are rounded to the factors' dtype
    first, so that the backward pass multiplies in it too."""
    return _product(equation, *varying(x, weight))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation: str, x: Array, weight: Array) -> Array:
    return _einsum(equation, x, weight)


def _product_forward(equation: str, x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _einsum(equation, x, weight), (x, weight)


def _product_backward(equation: str, factors: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, weight = factors
    inputs, out = equation.split("->")
    x_dims, weight_dims = inputs.split(",")
    # Written to memory before it is multiplied: XLA would make it again for every tile of the product.
    cotangent = jax.lax.optimization_barrier(cotangent.astype(x.dtype))
    d_x = _einsum(f"{out},{weight_dims}->{x_dims}", cotangent, weight)
    d_weight = _einsum(f"{out},{x_dims}->{weight_dims}", cotangent, x)
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


_product.defvjp(_product_forward, _product_backward)


def _einsum(equation: str, *factors: Array) -> Array:
    return jnp.einsum(equation, *factors, precision="highest", preferred_element_type=jnp.float32)


class _Weights:
    """Arrays by name, trained or frozen, each gathered whole and rounded to the dtype that is multiplied in."""

    def __init__(self, prefix: str, trained: Arrays, frozen: Arrays, form: Form) -> None:
        self._trained, self.frozen, self._form = trained, frozen, form
        # Layers are alike, so those of layer 0 tell for all; a layer's function is traced once.
        place = "layers.0." if prefix else ""
        self._gathered = {path.removeprefix(place): dim for path, dim in form.gathered if path.startswith(place)}

    def __getitem__(self, name: str) -> Array:
        return self.whole(name, self._form.dtype)

    def whole(self, name: str, dtype: Any) -> Array:
        """One that is trained in this dtype; a frozen one in that of the products."""
        if name not in self._trained:
            return self.frozen[name].astype(self._form.dtype)
        found = self._trained[name]
        if self._form.lora is not None and name.endswith(B):
            found = found * self._form.lora.scale
        if self._form.quantize and name in _QUANTIZED:
            found = cast(Array, straight_through(found))
        found = found.astype(dtype)
        dim = self._gathered.get(name)
        return found if dim is None else jax.lax.all_gather(found, DATA, axis=dim, tiled=True)

    def adapter(self, name: str) -> tuple[Array, Array] | None:
        """The two factors of a weight's adapter, the scale in the second; None if it has none."""
        return (self[f"{name}.{A}"], self[f"{name}.{B}"]) if f"{name}.{A}" in self._trained else None


@jax.custom_vjp
def _together[T](arrays: T, x: Array) -> tuple[T, Array]:
    """The same; the backward pass does not go on to the layer before until the arrays have their gradients.

    Else the compiler puts those off, and what they are made of stays in memory: 45 MB a layer and 2,048 tokens of 20b.
    """
    return arrays, x


_together.defvjp(
    lambda *arguments: (arguments, None),
    lambda _, cotangents: jax.lax.optimization_barrier(cotangents),
)


def _under(prefix: str, arrays: Arrays) -> dict[str, Array]:
    return {path.removeprefix(prefix): array for path, array in arrays.items() if path.startswith(prefix)}


@functools.partial(jax.jit, static_argnames=("form", "kind"))
@functools.partial(jax.checkpoint, static_argnums=(5, 6))
def _layer(
    trained: Arrays,
    frozen: Arrays,
    x: Float[Array, "B T D"],
    rotation: Rotation,
    segments: Int[Array, "B T"],
    form: Form,
    kind: LayerKind,
) -> tuple[Float[Array, "B T D"], Routing]:
    """One layer; the backward pass keeps its input alone and computes the rest again."""
    weights = _Weights("layers.", trained, frozen, form)
    x = x + _attend(x, weights, rotation, segments, form, kind)
    normed = norm(x, weights["experts_norm.scale"], eps=form.config.rms_norm_eps)
    expert_ids, shares, found = _route(normed, weights, segments > 0, form)
    return x + _experts(normed, weights, expert_ids, shares, form), found


def _attend(
    x: Float[Array, "B T D"],
    weights: _Weights,
    rotation: Rotation,
    segments: Int[Array, "B T"],
    form: Form,
    kind: LayerKind,
) -> Float[Array, "B T D"]:
    config = form.config
    normed = norm(x, weights["attention_norm.scale"], eps=config.rms_norm_eps)

    def project(name: str) -> Float[Array, "B T heads H"]:
        y = product("BTD,NHD->BTNH", normed, weights[f"attention.{name}.weight"])
        y = y + weights[f"attention.{name}.bias"].astype(jnp.float32)
        if (adapter := weights.adapter(f"attention.{name}.weight")) is not None:
            inner = product("BTD,rD->BTr", normed, adapter[0]).astype(x.dtype)
            y = y + product("BTr,NHr->BTNH", inner, adapter[1])
        return y.astype(x.dtype)

    queries, keys = (rotate(project(name), *rotation) for name in ("query", "key"))
    window = config.sliding_window if kind == "sliding_attention" else None
    attended = segment_attention(
        *varying(queries, keys, project("value"), segments, weights["attention.sinks"]), window=window
    )
    y = product("BTNH,DNH->BTD", attended, weights["attention.output.weight"]).astype(x.dtype)
    y = jax.lax.psum(y, form.heads) + weights["attention.output.bias"]
    if (adapter := weights.adapter("attention.output.weight")) is not None:
        inner = jax.lax.psum(product("BTNH,rNH->BTr", attended, adapter[0]), form.heads).astype(x.dtype)
        y = y + product("BTr,Dr->BTD", inner, adapter[1]).astype(x.dtype)
    return y


def _route(
    normed: Float[Array, "B T D"], weights: _Weights, real: Bool[Array, "B T"], form: Form
) -> tuple[Int[Array, "B T A"], Float[Array, "B T A"], Routing]:
    """Each token's experts and their shares; padding gets expert -1, which is nobody's."""
    scores = product("BTD,ED->BTE", normed, weights["router.weight"]) + weights["router.bias"].astype(jnp.float32)
    if (adapter := weights.adapter("router.weight")) is not None:
        inner = product("BTD,rD->BTr", normed, adapter[0]).astype(normed.dtype)
        scores = scores + product("BTr,Er->BTE", inner, adapter[1])
    chosen, expert_ids = jax.lax.top_k(scores, form.config.experts_per_token)
    ids = jnp.where(real[..., None], expert_ids, -1)
    found = Routing(
        counts=jax.nn.one_hot(ids, form.config.num_experts).sum(axis=(0, 1, 2)),
        probabilities=jnp.where(real[..., None], jax.nn.softmax(scores, axis=-1), 0.0).sum(axis=(0, 1)),
    )
    return ids, jax.nn.softmax(chosen, axis=-1), found


def _experts(
    normed: Float[Array, "B T D"],
    weights: _Weights,
    expert_ids: Int[Array, "B T A"],
    shares: Float[Array, "B T A"],
    form: Form,
) -> Float[Array, "B T D"]:
    held, factors = _trained_experts(weights, form)
    num_experts = held.down_bias.shape[0]
    count = jax.lax.axis_size(MODEL_AXES)
    local_ids = expert_ids - jax.lax.axis_index(MODEL_AXES) * num_experts if count > 1 else expert_ids
    # Before an id can be taken for another device's, padding must have none at all.
    local_ids = jnp.where(expert_ids < 0, -1, local_ids)
    arguments = (
        normed.reshape(-1, normed.shape[-1]),
        held,
        local_ids.reshape(-1, local_ids.shape[-1]),
        shares.reshape(-1, shares.shape[-1]),
        factors,
    )
    leaves, structure = jax.tree.flatten(arguments)
    rows, held, local_ids, shares, factors = jax.tree.unflatten(structure, varying(*leaves))
    y = trainable_experts(
        rows,
        held,
        local_ids,
        shares,
        adapters=factors,
        alpha=form.config.swiglu_alpha,
        limit=form.config.swiglu_limit,
    )
    return jax.lax.psum(y, MODEL_AXES).reshape(normed.shape)


def _trained_experts(weights: _Weights, form: Form) -> tuple[Held, ExpertAdapters | None]:
    """A layer's experts, and their adapters if they have any."""
    if form.lora is None:
        return DenseExperts(*(weights[f"experts.{name}"] for name in _DENSE)), None
    factors = weights.adapter("experts.gate_up"), weights.adapter("experts.down")
    if factors[0] is None or factors[1] is None:
        return _held_experts(weights.frozen), None
    return _held_experts(weights.frozen), ExpertAdapters(*factors[0], *factors[1])


def expert_paths(prefix: str = "") -> tuple[str, ...]:
    """The paths of a layer's packed experts, in the order of their fields."""
    return tuple(
        f"{prefix}experts.{name}.{leaf}" for name in ("gate_up", "down") for leaf in ("blocks", "scales", "bias")
    )


def published_experts(frozen: Arrays, paths: Sequence[str]) -> ExpertWeights:
    """A layer's packed experts as a checkpoint has them."""
    gate_up, gate_up_scales, gate_up_bias, down, down_scales, down_bias = (frozen[path] for path in paths)
    return ExpertWeights(MXFP4(gate_up, gate_up_scales), gate_up_bias, MXFP4(down, down_scales), down_bias)


def _held_experts(frozen: Arrays) -> ExpertWeights | HopperExperts:
    """A layer's packed experts as published or, if their words are of 32 bits, as Hopper's kernels read them."""
    paths = expert_paths()
    if frozen[paths[0]].dtype == jnp.uint32:
        return HopperExperts(*(frozen[path] for path in paths))
    return published_experts(frozen, paths)


def _embed(tokens: Int[Array, "B T"], rows: Float[Array, "V D"]) -> Float[Array, "B T D"]:
    local = tokens - jax.lax.axis_index(MODEL_AXES) * rows.shape[0]
    here = (local >= 0) & (local < rows.shape[0])
    found = jnp.where(here[..., None], rows[jnp.where(here, local, 0)], 0)
    return jax.lax.psum(found, MODEL_AXES)
