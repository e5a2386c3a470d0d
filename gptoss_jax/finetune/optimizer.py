"""The update rule of a run, put together from optax's parts."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from gptoss_jax.finetune.settings import FineTuning

_LAST_SHARE = 0.1
"""Of the learning rate, at the end of a falling schedule."""


def learning_rates(settings: FineTuning, steps: int) -> optax.Schedule:
    """The learning rate of each update: a linear rise, then the schedule.

    Example:
        >>> rates = learning_rates(FineTuning(learning_rate=1.0, schedule="linear", warmup_steps=2), 12)
        >>> [round(float(rates(step)), 2) for step in (0, 1, 2, 7, 12)]
        [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    peak, falling = settings.learning_rate, max(1, steps - settings.warmup_steps)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, _LAST_SHARE * peak, falling),
        "cosine": optax.cosine_decay_schedule(peak, falling, alpha=_LAST_SHARE),
    }[settings.schedule]
    if settings.warmup_steps == 0:
        return _mixing(after)
    warmup = settings.warmup_steps
    # The first update has a share of the rate, not none of it.
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return _mixing(optax.join_schedules([rise, after], [warmup]))


def optimizer(settings: FineTuning, steps: int) -> optax.GradientTransformation:
    """Clip by the global norm, then update by the rule that the settings name."""
    rates, decay = learning_rates(settings, steps), settings.weight_decay
    rule = {
        "adamw": lambda: optax.adamw(rates, weight_decay=decay, mask=_decays),
        "adafactor": lambda: optax.adafactor(
            rates,
            multiply_by_parameter_scale=False,
            clipping_threshold=1.0,
            weight_decay_rate=None,
        ),
        "lion": lambda: optax.lion(rates, weight_decay=decay, mask=_decays, mu_dtype=jnp.bfloat16),
        "sgd": lambda: optax.sgd(rates),
    }[settings.optimizer]()
    whole = optax.chain(optax.clip_by_global_norm(settings.clip_norm), rule)
    return optax.GradientTransformation(whole.init, _mixing(whole.update))


def _mixing[**P, T](function: Callable[P, T]) -> Callable[P, T]:
    """A function of optax's, which mixes dtypes, also where JAX has been told to refuse that."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return run


def _decays(trained: Mapping[str, Array]) -> dict[str, bool]:
    """Matrices decay; norms, biases and sinks do not."""
    return {path: path.endswith(("weight", "lora_a", "lora_b")) for path in trained}
