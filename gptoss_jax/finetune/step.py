"""One update: the gradients of a batch, its parts one after the other, and what the optimizer makes of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from gptoss_jax.config import ModelConfig
from gptoss_jax.finetune.adapters import LoRA
from gptoss_jax.finetune.batches import Batch
from gptoss_jax.finetune.forward import Arrays, Form
from gptoss_jax.finetune.loss import Sums, batch_sums
from gptoss_jax.finetune.placement import (
    DATA,
    EMBEDDING,
    frozen_specs,
    gathered_dim,
    specs,
    trained_dims,
    trained_shapes,
)
from gptoss_jax.sharding import head_axes, put


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that changes during a run."""

    step: Any
    """int32: updates made."""
    trained: Any
    """A dict of float32 arrays by path: adapters, or masters of all parameters."""
    optimizer: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """What one update saw, before it changed anything; float32."""

    loss: Any
    """Mean over the batch's trained tokens, in nats."""
    tokens: Any
    """Trained tokens."""
    balance: Any
    """The routers' auxiliary loss (`loss.Sums.balance`), by token."""
    gradient_norm: Any
    """Of all gradients together, before clipping."""
    expert_counts: Any
    """`L E`: tokens that chose each expert."""


@dataclasses.dataclass(frozen=True)
class Frozen:
    """What a run does not train: nothing, or for LoRA the checkpoint's parameters."""

    arrays: dict[str, Array] = dataclasses.field(default_factory=dict)
    """By path, placed as the program's compiled functions take them."""
    embedding: np.ndarray | None = None
    """`V D`, if the program has the vocabulary on the host."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What is trained, where it lives, and the compiled functions of a run.

    `absent_rows` is `loss.batch_sums`'.
    """

    form: Form
    mesh: Mesh
    shapes: dict[str, tuple[int, ...]]
    trained_specs: dict[str, P]
    frozen_specs: dict[str, P]
    update: optax.GradientTransformation
    balance: float
    absent_rows: int = 0
    vocabulary_on_host: bool = False

    @property
    def trained_leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape, dtype and sharding of every trained array, by path."""
        return {
            path: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(self.mesh, self.trained_specs[path]))
            for path, shape in self.shapes.items()
        }

    @property
    def state_leaves(self) -> State:
        """Shape, dtype and sharding of every array of a state: a moment lies with its master, the rest everywhere."""

        def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            name = next((key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), "")
            spec = self.trained_specs[name] if self.shapes.get(name) == shape.shape else P()
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(self.mesh, spec))

        moments = jax.eval_shape(self.update.init, self.trained_leaves)
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(self.mesh, P()))
        return State(step, self.trained_leaves, jax.tree_util.tree_map_with_path(leaf, moments))

    def start(self, trained: dict[str, Array]) -> State:
        """The state before the first update."""
        leaves = self.state_leaves
        places = jax.tree.map(lambda leaf: leaf.sharding, leaves.optimizer)
        moments = jax.jit(self.update.init, out_shardings=places)(trained)
        return State(jnp.zeros((), jnp.int32, device=leaves.step.sharding), trained, moments)

    def place(self, batch: Batch, *, parts: int, embedding: np.ndarray | None = None) -> Batch:
        """A batch of host arrays on the devices, cut into parts: each array gets a first dim for them.

        `embedding` is `Frozen.embedding`.
        """
        if embedding is not None:
            batch = dataclasses.replace(batch, embedded=embedding[batch.tokens])
        sharding = NamedSharding(self.mesh, P(None, DATA))
        return jax.tree.map(lambda leaf: put(leaf.reshape(parts, -1, *leaf.shape[1:]), sharding), batch)

    def compile_step(self) -> Callable[[State, Arrays, Batch], tuple[State, Report]]:
        """The jitted update of a state, whose buffers it takes over; batches come from `place`."""
        sums = self._sums()

        def objective(trained: Arrays, frozen: Arrays, part: Batch) -> tuple[Array, Sums]:
            found = sums(trained, frozen, part)
            return found.loss + (self.balance * found.balance if self.balance else 0.0), found

        def step(state: State, frozen: Arrays, batch: Batch) -> tuple[State, Report]:
            gradients_of = jax.grad(objective, has_aux=True)
            if batch.tokens.shape[0] == 1:  # no second copy of the gradients
                total = gradients_of(state.trained, frozen, jax.tree.map(lambda leaf: leaf[0], batch))
            else:

                def add(total: tuple[Arrays, Sums], part: Batch) -> tuple[tuple[Arrays, Sums], None]:
                    return jax.tree.map(jnp.add, total, gradients_of(state.trained, frozen, part)), None

                first = jax.tree.map(lambda leaf: leaf[0], batch)
                shapes = jax.eval_shape(gradients_of, state.trained, frozen, first)
                zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
                total, _ = jax.lax.scan(add, zeros, batch)
            gradients, found = total
            count = jnp.maximum(found.tokens, 1.0)
            gradients = jax.tree.map(lambda leaf: leaf / count, gradients)
            updates, optimizer = self.update.update(gradients, state.optimizer, state.trained)
            trained = optax.apply_updates(state.trained, updates)
            report = Report(
                loss=found.loss / count,
                tokens=found.tokens,
                balance=found.balance / count,
                gradient_norm=optax.tree.norm(gradients),
                expert_counts=found.expert_counts,
            )
            return State(state.step + 1, trained, optimizer), report

        places = jax.tree.map(lambda leaf: leaf.sharding, self.state_leaves)
        return jax.jit(step, donate_argnums=0, out_shardings=(places, NamedSharding(self.mesh, P())))

    def compile_evaluation(self) -> Callable[[Arrays, Arrays, Batch], Sums]:
        """The jitted sums of a batch; the batch in one part."""
        sums = self._sums()
        return jax.jit(lambda trained, frozen, batch: sums(trained, frozen, jax.tree.map(lambda leaf: leaf[0], batch)))

    def _sums(self) -> Callable[[Arrays, Arrays, Batch], Sums]:
        return batch_sums(self.form, self.mesh, self.trained_specs, self.frozen_specs, absent_rows=self.absent_rows)


def make_program(
    config: ModelConfig,
    mesh: Mesh,
    *,
    lora: LoRA | None,
    quantize: bool,
    dtype: Any,
    update: optax.GradientTransformation,
    balance: float = 0.0,
    absent_rows: int = 0,
    vocabulary_on_host: bool = False,
) -> Program:
    """The program of a run on a `training_mesh`."""
    frozen = {} if lora is None else frozen_specs(config, mesh)
    if vocabulary_on_host:
        del frozen[EMBEDDING]
    dims, shapes = trained_dims(config, lora), trained_shapes(config, lora)
    gathered = {path: gathered_dim(path, dims[path], shapes[path], config, mesh) for path in dims}
    return Program(
        form=Form(
            config=config,
            dtype=jnp.dtype(dtype),
            lora=lora,
            quantize=quantize,
            heads=head_axes(config.num_kv_heads, mesh),
            gathered=tuple((path, dim) for path, dim in gathered.items() if dim is not None),
        ),
        mesh=mesh,
        shapes=shapes,
        trained_specs=specs(dims, shapes, config, mesh),
        frozen_specs=frozen,
        update=update,
        balance=balance,
        absent_rows=absent_rows,
        vocabulary_on_host=vocabulary_on_host,
    )
