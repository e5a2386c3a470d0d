"""The largest size that fits: found with few compilations, compiled itself, and never too large."""

from collections.abc import Callable

import pytest

from gptoss_jax.bench.roofline import Work
from gptoss_jax.plan import largest
from gptoss_jax.plan.largest import largest_batch, largest_context, rooms
from gptoss_jax.plan.points import Planner, Point, Step, Usage
from tests.plan.devices import SMALL, cpus

SIZES = range(1, 1001)


class Programs:
    """Ten bytes are held for each size, and programs take what a function says."""

    def __init__(self, taken: Callable[[int], int], refused: Callable[[int], bool] = lambda size: False) -> None:
        self.taken, self.refused = taken, refused
        self.compiled: list[int] = []

    def held(self, size: int) -> int:
        return 10 * size

    def point(self, size: int) -> Point:
        self.compiled.append(size)
        refusal = "refused" if self.refused(size) else None
        usage = Usage(weights=0, cache=10 * size, other_arguments=0, temporaries=self.taken(size), results=0, code=0)
        step = Step(usage=usage, floor=Work(0, 0), estimated_seconds=None, collectives=[], compile_seconds=0.0)
        return Point(
            batch=size,
            context=1,
            chunk=1,
            weights=0,
            cache=10 * size,
            steps={} if refusal else {"decode": step},
            refusal=refusal,
        )

    def largest(self, memory_bytes: int, known: tuple[int, ...] = ()) -> largest.Largest:
        points = {size: self.point(size) for size in known}
        self.compiled.clear()
        return largest._largest(SIZES, self.held, self.point, memory_bytes, points)


@pytest.mark.parametrize(
    "taken", [lambda n: 7, lambda n: n, lambda n: 5 * n + 300, lambda n: n * n // 100, lambda n: 2000]
)
@pytest.mark.parametrize("known", [(), (1,), (100,)])
def test_answer_fits_was_compiled_and_is_close_to_the_best(taken: Callable[[int], int], known: tuple[int, ...]) -> None:
    programs, memory = Programs(taken), 6000
    found = programs.largest(memory, known)
    best = max(size for size in SIZES if 10 * size + taken(size) <= memory)
    assert found.value in [*programs.compiled, *known]
    assert best / 1.04 <= found.value <= best
    assert found.needed == 10 * found.value + taken(found.value) <= memory
    assert len(programs.compiled) <= largest._MOST_COMPILATIONS
    assert not found.is_bound


def test_nothing_fits() -> None:
    assert Programs(lambda size: 100).largest(9).value == 0
    assert Programs(lambda size: 100).largest(109).value == 0
    assert Programs(lambda size: 0, refused=lambda size: True).largest(5000).value == 0


def test_only_the_smallest_fits() -> None:
    assert Programs(lambda size: 10**6 * (size - 1)).largest(10**6).value == 1


def test_size_that_the_compiler_refuses_is_no_answer() -> None:
    found = Programs(lambda size: 0, refused=lambda size: size > 300).largest(5000, known=(200,))
    assert found.value == 200, "what is known to fit, if compilations run out"


def test_all_fit() -> None:
    found = Programs(lambda size: 1).largest(10**6)
    assert (found.value, found.is_bound) == (1000, True)


def test_rooms_are_all_lengths_that_caches_are_made_for() -> None:
    assert rooms(SMALL)[:6] == [64, 128, 192, 256, 320, 384]
    assert rooms(SMALL)[-1] == SMALL.max_context


@pytest.mark.slow
def test_batch_and_context_of_a_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(largest, "_MOST_COMPILATIONS", 1)
    topology = cpus(4, memory_bytes=5_000_000)
    planner = Planner(SMALL, topology, topology.mesh(data=2, tensor=2))
    point = planner.point(batch=2, context=64)
    batch = largest_batch(planner, context=64, known=[point])
    assert 2 < batch.value < largest.MOST_ROWS
    assert batch.value % 2 == 0
    assert planner.point(batch=batch.value, context=64).needed == batch.needed <= topology.memory_bytes
    context = largest_context(planner, batch=2, known=[point])
    assert context.value in rooms(SMALL)[1:]
    assert planner.point(batch=2, context=context.value).needed == context.needed <= topology.memory_bytes
