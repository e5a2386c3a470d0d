"""The largest batch, or context, that fits: cache from shapes, the rest foreseen, and the answer compiled."""

import bisect
import dataclasses
from collections.abc import Callable, Sequence

from gptoss_jax.bench.roofline import Number
from gptoss_jax.config import ModelConfig
from gptoss_jax.generation.generate import cache_room
from gptoss_jax.plan.points import Planner, Point

MOST_ROWS = 4096
"""No larger batch is tried."""
_MOST_COMPILATIONS = 4
_CLOSE = 1.03  # another compilation that could only gain this is not worth its time
_UNKNOWN_SHARE = 0.05  # of the memory: what programs take, as long as none has been compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Largest:
    """An answer that was compiled and fits; larger ones may, by a few per cent."""

    value: int
    """0 if nothing fits."""
    needed: int
    """Bytes of one device."""
    is_bound: bool
    """No larger one was considered: of a batch MOST_ROWS, of a context the model's."""


def largest_batch(planner: Planner, *, context: int, known: Sequence[Point] = ()) -> Largest:
    """The largest batch whose rows may each hold `context` tokens. `known` are points of that context."""
    data = planner.mesh.shape["data"]
    return _largest(
        range(data, MOST_ROWS + 1, data),
        lambda batch: planner.held(batch=batch, context=context),
        lambda batch: planner.point(batch=batch, context=context),
        planner.topology.memory_bytes,
        {point.batch: point for point in known},
    )


def largest_context(planner: Planner, *, batch: int, known: Sequence[Point] = ()) -> Largest:
    """The largest context of `batch` rows, of those that caches are made for. `known` are points of that batch."""
    return _largest(
        rooms(planner.config),
        lambda context: planner.held(batch=batch, context=context),
        lambda context: planner.point(batch=batch, context=context),
        planner.topology.memory_bytes,
        {point.context: point for point in known},
    )


def rooms(config: ModelConfig) -> list[int]:
    """Every length that `generate` makes a cache for.

    Example:
        >>> from gptoss_jax.config import gpt_oss_20b
        >>> rooms(gpt_oss_20b())[-4:]
        [81920, 98304, 114688, 131072]
    """
    found = [cache_room(1, config.max_context)]
    while found[-1] < config.max_context:
        found.append(cache_room(found[-1] + 1, config.max_context))
    return found


def _largest(
    candidates: Sequence[int],
    held: Callable[[int], int],
    point: Callable[[int], Point],
    memory_bytes: int,
    known: dict[int, Point],
) -> Largest:
    known = dict(known)
    for _ in range(_MOST_COMPILATIONS):
        fitting = {size: found for size, found in known.items() if found.fits(memory_bytes)}
        least, most = max(fitting, default=0), min((size for size in known if size not in fitting), default=None)
        open_ones = [size for size in candidates if size > least and (most is None or size < most)]
        taken = {size: found.needed - held(size) for size, found in known.items() if found.steps}
        count = bisect.bisect_right(
            open_ones, memory_bytes, key=lambda size: held(size) + _foreseen(taken, size, memory_bytes)
        )
        if not fitting and count == 0 and open_ones:
            count = 1  # what is known takes more than a smaller one would
        if count == 0 or open_ones[count - 1] <= least * _CLOSE:
            break
        chosen = open_ones[count - 1]
        known[chosen] = point(chosen)
    if candidates[0] not in known and not any(found.fits(memory_bytes) for found in known.values()):
        known[candidates[0]] = point(candidates[0])  # "nothing fits" is to be true
    fitting = {size: found.needed for size, found in known.items() if found.fits(memory_bytes)}
    value = max(fitting, default=0)
    return Largest(value=value, needed=fitting.get(value, 0), is_bound=value >= candidates[-1])


def _foreseen(taken: dict[int, int], size: int, memory_bytes: int) -> Number:
    """What programs take besides what is held, from what those of other sizes take.

    Of one known size: in proportion above it, as much below it. Of several: on the line through the two around it, or
    the two largest, which is not taken to fall.
    """
    if not taken:
        return _UNKNOWN_SHARE * memory_bytes
    sizes = sorted(taken)
    if size <= sizes[0]:
        return taken[sizes[0]]
    if len(sizes) == 1:
        return taken[sizes[0]] * size / sizes[0]
    right = min(bisect.bisect_left(sizes, size), len(sizes) - 1)
    low, high = sizes[right - 1], sizes[right]
    slope = (taken[high] - taken[low]) / (high - low)
    return taken[high] + (max(0, slope) if size > high else slope) * (size - high)
