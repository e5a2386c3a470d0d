"""An update of a fine-tuning, lowered for GPUs that need not be there."""

from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.config import ModelConfig
from gptoss_jax.finetune.batches import Batch
from gptoss_jax.finetune.initial import read_frozen
from gptoss_jax.finetune.optimizer import optimizer
from gptoss_jax.finetune.placement import DATA, training_mesh
from gptoss_jax.finetune.settings import FineTuning, Method
from gptoss_jax.finetune.step import Frozen, make_program


def lowered_update(config: ModelConfig, mesh: Mesh, *, method: Method, sequence_length: int) -> Any:
    """One row, AdamW; with `lora`, adapters on attention and experts."""
    settings = FineTuning(method=method, batch_size=1, sequence_length=sequence_length)
    program = make_program(
        config,
        training_mesh(mesh),
        lora=settings.lora,
        quantize=False,
        dtype=jnp.bfloat16,
        update=optimizer(settings, steps=100),
    )
    ints, floats = (
        jax.ShapeDtypeStruct((1, 1, sequence_length), dtype, sharding=NamedSharding(program.mesh, P(None, DATA)))
        for dtype in (jnp.int32, jnp.float32)
    )
    held = Frozen() if settings.lora is None else read_frozen(program, lambda leaves: cast(Any, leaves))
    batch = Batch(tokens=ints, targets=ints, weights=floats, segments=ints, positions=ints)
    return program.compile_step().lower(program.state_leaves, held.arrays, batch)
