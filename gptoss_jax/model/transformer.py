"""The whole model: embedding, layers, final norm, unembedding; a pure function of weights, tokens and cache."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from gptoss_jax.config import LayerKind, ModelConfig
from gptoss_jax.errors import PromptError
from gptoss_jax.model.attention import Attention
from gptoss_jax.model.cache import Cache, Step
from gptoss_jax.model.experts import Experts
from gptoss_jax.model.layers import Embedding, RMSNorm, Router, Unembedding
from gptoss_jax.model.rope import rotations
from gptoss_jax.sharding import activation, ambient_mesh, check_batch, check_mesh, make_mesh, split_rows
from pallas_kernels.dispatch import Impl, platform
from pallas_kernels.exchange import Mailboxes


class Layer(nnx.Module):
    """Attention and experts, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, kind: LayerKind, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.kind = kind
        self.experts_per_token = config.experts_per_token
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.experts_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.router = Router(config.num_experts, config.hidden_size, dtype=dtype, rngs=rngs)
        self.experts = Experts(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
        *,
        keys: Float[Array, "P K slots W"],
        values: Float[Array, "P K slots W"],
        step: Step,
        mailboxes: Mailboxes,
        impl: Impl,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "P K slots W"], Float[Array, "P K slots W"], Mailboxes]:
        x, keys, values, mailboxes = self.attention(
            x, self.attention_norm, rotation, keys=keys, values=values, step=step, mailboxes=mailboxes, impl=impl
        )
        normed, expert_ids, routing = self.router(
            x, self.experts_norm, experts_per_token=self.experts_per_token, impl=impl
        )
        x, mailboxes = self.experts(normed, expert_ids, routing, residual=x, mailboxes=mailboxes, impl=impl)
        return x, keys, values, mailboxes


class Transformer(nnx.Module):
    """A gpt-oss model. Parameters are named and shaped as in the checkpoint (docs/checkpoint.md).

    Build it under `jax.set_mesh`; `build` does so, and `gptoss_jax.load` fills it with a checkpoint's weights.
    """

    def __init__(self, config: ModelConfig, *, mesh: Mesh, dtype: Any, rngs: nnx.Rngs, impl: Impl = "auto") -> None:
        self.config = config
        self.mesh = mesh
        self.dtype = jnp.dtype(dtype)
        self.impl: Impl = impl
        self.embedding = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(Layer(config, kind, dtype=dtype, rngs=rngs) for kind in config.layer_kinds)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.unembedding = Unembedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: ArrayLike | Sequence[Sequence[int]]) -> Float[Array, "B T V"]:
        """The logits that follow each token, in float32, each row read from its beginning, without a cache.

        They are split by row alone: each device holds the whole vocabulary of its rows.

        Raises PromptError for ids outside the vocabulary and rows past the context, ShardingError for a batch that
        does not divide over the mesh's data axis. Under a jit of the caller's, ids cannot be checked.

        Example:
            >>> from gptoss_jax.config import gpt_oss_20b
            >>> small = dataclasses.replace(
            ...     gpt_oss_20b(), num_layers=1, layer_kinds=("full_attention",), hidden_size=64, num_experts=4
            ... )
            >>> build(small)(jnp.array([[1, 2, 3]])).shape
            (1, 3, 201088)
        """
        if not isinstance(tokens, Tracer):
            tokens = check_ids(tokens, ndim=2, vocab_size=self.config.vocab_size, where="tokens")
        batch, num_tokens = tokens.shape
        check_batch(batch, self.mesh)
        if num_tokens > self.config.max_context:
            raise PromptError(
                f"{num_tokens} tokens", where="prompt", fix=f"the context is {self.config.max_context} tokens"
            )
        return _logits(self, tokens)

    def advance(
        self, tokens: Int[Array, "B T"], counts: Int[Array, " B"], cache: Cache
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Read `counts[b]` of each row's tokens (the rest is padding) after what the cache holds.

        Returns the last layer's output, which `logits` takes, and the cache with these tokens in it. Pure and
        unchecked: the caller sees to it that a step has at most `cache.max_chunk` tokens and that rows fit the
        cache. Runs under `ambient_mesh`.
        """
        num_tokens = tokens.shape[1]
        steps = {kind: cache.step(kind, counts, num_tokens, self.config) for kind in cache.tables}
        positions = cache.lengths[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)
        rotation = rotations(positions, self.config)
        mailboxes: Mailboxes = {} if self.impl == "reference" else cache.mailboxes
        x, mailboxes = self.embedding(tokens, mailboxes=mailboxes)
        keys, values = list(cache.keys), list(cache.values)
        for index, layer in enumerate(self.layers):
            x, keys[index], values[index], mailboxes = layer(
                x,
                rotation,
                keys=keys[index],
                values=values[index],
                step=steps[layer.kind],
                mailboxes=mailboxes,
                impl=self.impl,
            )
        return x, dataclasses.replace(
            cache,
            keys=tuple(keys),
            values=tuple(values),
            lengths=cache.lengths + counts,
            mailboxes={**cache.mailboxes, **{axes: mailbox.settled() for axes, mailbox in mailboxes.items()}},
        )

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The logits that follow each token, in float32, split over the vocabulary. Runs under `ambient_mesh`."""
        return self.unembedding(hidden, self.norm, impl=self.impl)


@jax.jit
def _logits(model: Transformer, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    with ambient_mesh(model.mesh):
        tokens = split_rows(tokens)
        batch, num_tokens = tokens.shape
        cache = Cache.create(model.config, batch=batch, max_length=num_tokens, max_chunk=num_tokens, dtype=model.dtype)
        counts = jnp.full((batch,), num_tokens, jnp.int32)
        hidden, _ = model.advance(tokens, counts, cache)
        return jax.sharding.reshard(model.logits(hidden), activation("B T D"))


def check_ids(ids: ArrayLike | Sequence[Any], *, ndim: int, vocab_size: int, where: str) -> np.ndarray:
    """The ids as an int32 array; raises PromptError unless they are integers of the vocabulary in `ndim` dims."""
    try:
        array = np.asarray(ids)
    except ValueError as ragged:
        raise PromptError("rows of different lengths", where=where, fix="pad them, or use generate") from ragged
    if array.ndim == ndim and array.size == 0:
        raise PromptError("no tokens", where=where, fix="give at least one token")
    if array.ndim != ndim or not np.issubdtype(array.dtype, np.integer):
        raise PromptError(
            f"{array.dtype} values of shape {array.shape}", where=where, fix=f"give integer ids in {ndim} dim(s)"
        )
    outside = (array < 0) | (array >= vocab_size)
    if outside.any():
        index = tuple(int(part) for part in np.argwhere(outside)[0])
        raise PromptError(
            f"token id {array[index]} at {index}",
            where=where,
            fix=f"ids of this model's vocabulary are 0 to {vocab_size - 1}",
        )
    return array.astype(np.int32)


def build(
    config: ModelConfig, *, mesh: Mesh | None = None, dtype: Any = jnp.bfloat16, seed: int = 0, impl: Impl = "auto"
) -> Transformer:
    """A model with seeded random weights, each made on the devices that hold it.

    Raises ShardingError if the mesh does not divide the model.
    """
    make, mesh = _maker(config, mesh, dtype, impl)
    with jax.set_mesh(mesh):
        model = make(jax.random.key(seed))  # not jitted: layers share the compiled draws, one program for all is slow
    return prepare(model)


def abstract(
    config: ModelConfig, *, mesh: Mesh | None = None, dtype: Any = jnp.bfloat16, impl: Impl = "auto"
) -> Transformer:
    """The model with shapes, dtypes and shardings in place of weights: what a checkpoint is restored into."""
    make, mesh = _maker(config, mesh, dtype, impl)
    with jax.set_mesh(mesh):
        return nnx.eval_shape(lambda: make(jax.random.key(0)))  # no array is made: the devices need not be there


def leaves(model: Transformer) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of every parameter, by its dotted path in the checkpoint."""

    def described(value: Any) -> jax.ShapeDtypeStruct:
        place = NamedSharding(model.mesh, value.sharding.spec)
        chosen = value.format.layout if isinstance(value, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(
            value.shape, value.dtype, sharding=place if chosen is None else Format(chosen, place)
        )

    return {".".join(map(str, path)): described(leaf.get_value()) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def fill(model: Transformer, arrays: Mapping[str, Array | jax.ShapeDtypeStruct]) -> Transformer:
    """The same model with these arrays, one for each path of `leaves`, as its parameters."""
    structure, state = nnx.split(model)
    filled = [(path, leaf.replace(arrays[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(structure, nnx.from_flat_state(filled))


def flattened(model: Transformer) -> Any:
    """What to pass for the model to a jitted function that is called many times; inside, it is the model.

    To take a Flax module of hundreds of parameters apart costs a millisecond or two at every call; this has done so
    once. It holds the parameters of the moment it was made. Outside of jit it is good for nothing else: what maps over
    its arrays gets the model back.
    """
    return _Flattened(model)


@jax.tree_util.register_pytree_node_class
class _Flattened:
    def __init__(self, model: Transformer) -> None:
        leaves, self._structure = jax.tree.flatten(model)
        self._leaves = tuple(leaves)

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        return self._leaves, self._structure

    @classmethod
    def tree_unflatten(cls, structure: Any, leaves: Sequence[Any]) -> Transformer:
        return jax.tree.unflatten(structure, leaves)


def prepare(model: Transformer) -> Transformer:
    """Put the weights in the order that the platform's kernels read them; `build` and `gptoss_jax.load` have done so.

    In place, a layer at a time, so that device memory holds one layer's experts twice and no more (on a TPU the
    embedding too, which is laid out anew); the arrays that held the published order are deleted. Nothing changes on a
    platform whose kernels read the published order, and for float32 models, which the kernels do not multiply. Experts
    that the kernels cannot take stay as published, with a warning. Takes an abstract model too. Do not save a prepared
    model's parameters: a checkpoint holds the published order.

    Raises Unsupported if the model names an implementation that cannot take its weights; then none has changed.
    """
    if model.impl == "auto" and model.dtype != jnp.bfloat16:
        return model
    with jax.set_mesh(model.mesh):
        if all(layer.experts.preparable(model.config.experts_per_token, model.impl) for layer in model.layers):
            for layer in model.layers:  # before the heads: arrays of equal sizes fill the holes that they leave
                layer.experts.prepare(model.impl)
        if platform() == "tpu":
            model.embedding.prepare()
        for layer in model.layers:
            layer.attention.prepare(model.impl)
    return model


def _maker(
    config: ModelConfig, mesh: Mesh | None, dtype: Any, impl: Impl
) -> tuple[Callable[[Array], Transformer], Mesh]:
    mesh = make_mesh() if mesh is None else mesh
    check_mesh(config, mesh)

    def make(key: Array) -> Transformer:
        return Transformer(config, mesh=mesh, dtype=dtype, rngs=nnx.Rngs(key), impl=impl)

    return make, mesh
