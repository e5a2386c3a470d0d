import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.errors import SamplingError
from gptoss_jax.generation.sampling import Sampling, SamplingRows, _kept, sample
from gptoss_jax.sharding import MODEL_AXES, make_mesh

VOCAB = 12
PROBABILITIES = np.array([0.4, 0.2, 0.12, 0.1, 0.08, 0.05, 0.02, 0.01, 0.01, 0.005, 0.003, 0.002])
SHUFFLE = np.random.default_rng(0).permutation(VOCAB)


def draws(sampling: Sampling, count: int = 4000) -> np.ndarray:
    """How often each token (most probable first) was drawn from PROBABILITIES by rows with seeds of their own."""
    logits = jnp.log(jnp.array(PROBABILITIES[np.argsort(SHUFFLE)], jnp.float32))
    rows = SamplingRows.of([sampling] * count)
    rows = jax.tree.map(jnp.asarray, rows)
    tokens, *_ = sample(jnp.tile(logits, (count, 1)), rows, jnp.arange(count, dtype=jnp.int32))
    return np.bincount(np.argsort(SHUFFLE)[np.asarray(tokens)], minlength=VOCAB) / count


def kept(sampling: Sampling) -> int:
    """How many of the most probable tokens were drawn, after checking that they are the first ones."""
    drawn = draws(sampling) > 0
    assert drawn[: drawn.sum()].all()
    return int(drawn.sum())


def test_plain_sampling_follows_the_probabilities():
    found = draws(Sampling(seed=1))
    assert np.abs(found - PROBABILITIES).max() < 4 * np.sqrt(0.25 / 4000)


def test_temperature_sharpens():
    sharpened = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    assert np.abs(draws(Sampling(temperature=0.5, seed=2)) - sharpened).max() < 4 * np.sqrt(0.25 / 4000)


@pytest.mark.parametrize(
    ("sampling", "count"),
    [
        (Sampling(top_k=1, seed=3), 1),
        (Sampling(top_k=4, seed=3), 4),
        (Sampling(top_p=0.39, seed=3), 1),
        (Sampling(top_p=0.61, seed=3), 3),
        (Sampling(top_p=1e-6, seed=3), 1),
        (Sampling(min_p=0.19, seed=3), 5),
        (Sampling(min_p=1.0, seed=3), 1),
        # Top-p counts shares of what top-k left: 0.4 / 0.72 = 0.556 and (0.4 + 0.2) / 0.72 = 0.833.
        (Sampling(top_k=3, top_p=0.8, seed=3), 2),
        (Sampling(top_k=3, top_p=0.9, min_p=0.9, seed=3), 1),
        (Sampling(temperature=0.0, seed=3), 1),
    ],
    ids=str,
)
def test_cut_offs_keep_as_many_tokens_as_they_say(sampling, count):
    assert kept(sampling) == count


def test_rows_of_one_batch_keep_to_their_own_settings():
    logits = jnp.log(jnp.array(PROBABILITIES, jnp.float32))
    settings = [Sampling(seed=9), Sampling(temperature=0.0), Sampling(top_k=2, seed=7), Sampling(seed=9)]
    rows = jax.tree.map(jnp.asarray, SamplingRows.of(settings))
    together, *_ = sample(jnp.tile(logits, (4, 1)), rows, jnp.full(4, 5, jnp.int32))
    for row, setting in enumerate(settings):
        alone = jax.tree.map(jnp.asarray, SamplingRows.of([setting]))
        assert alone.method == ("draw", "greedy", "cut", "draw")[row]
        assert sample(logits[None], alone, jnp.array([5]))[0] == together[row]
    assert together[0] == together[3]
    assert together[1] == 0


def test_large_vocabulary_is_read_as_by_plain_functions():
    logits = np.random.default_rng(0).normal(size=(3, 200_000)).astype(np.float32)
    logits[1, [7, 150_000, 199_999]] = 9  # equal ones, in different pieces
    logits[2, 150_000] = np.nan
    rows = jax.tree.map(jnp.asarray, SamplingRows.of([Sampling(temperature=0.0)] * 3))
    tokens, _, log_totals = sample(jnp.array(logits), rows, jnp.zeros(3, jnp.int32))
    np.testing.assert_array_equal(tokens, jnp.argmax(logits, axis=1))
    np.testing.assert_allclose(log_totals, np.log(np.exp(logits.astype(np.float64)).sum(axis=1)), rtol=2e-7)


def test_a_row_without_cut_offs_keeps_every_token_beside_one_with_them():
    logits = jnp.array(np.random.default_rng(0).normal(size=(2, 200_000)) * 6, jnp.float32)
    rows = jax.tree.map(jnp.asarray, SamplingRows.of([Sampling(seed=1), Sampling(top_k=5, seed=1)]))
    assert _kept(logits, rows).sum(axis=-1).tolist() == [200_000, 5]


def test_a_missing_seed_is_drawn_anew():
    first, second = (SamplingRows.of([Sampling()] * 4).seed for _ in range(2))
    assert set(first) != set(second)


@pytest.mark.parametrize(
    ("setting", "legal"),
    [
        ({"temperature": -1.0}, "0 or more"),
        ({"temperature": float("nan")}, "0 or more"),
        ({"top_k": -1}, "0 to 2147483647"),
        ({"top_k": 2**40}, "0 to 2147483647"),
        ({"top_p": 0.0}, "above 0, at most 1"),
        ({"min_p": 1.5}, "0 to 1"),
        ({"seed": -1}, "0 to 4294967295, or None"),
        ({"seed": 2**32}, "0 to 4294967295, or None"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(setting, legal):
    [(name, value)] = setting.items()
    with pytest.raises(SamplingError) as refused:
        Sampling(**setting)
    assert str(refused.value) == f"{name} is {value}: sampling: choose {legal}"


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e38])
def test_padding_is_never_chosen(temperature):
    """The vocabulary is no multiple of the pieces it is reduced in, and its logits are lower than any padding."""
    logits = jnp.stack([jnp.full(130, -jnp.inf), jnp.zeros(130)])
    rows = SamplingRows.of([Sampling(temperature=temperature, seed=seed) for seed in range(2)])
    for drawn in range(20):
        token, *_ = sample(logits, rows, jnp.full(2, drawn))
        assert token[0] == 0
        assert token[1] < 130


@pytest.mark.parametrize("axes", [{"expert": 4}, {"expert": 2, "tensor": 2}, {"data": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_vocabulary_in_parts_gives_the_tokens_of_the_whole(axes, temperature):
    logits = np.random.default_rng(3).standard_normal((4, 1200)).astype(np.float32)
    logits[0, [5, 700, 1199]] = 9.0  # equal: the lowest token wins, wherever it lies
    logits[1, 1100] = np.nan
    logits[2, :600] = -np.inf
    rows = SamplingRows.of([Sampling(temperature=temperature, seed=row) for row in range(4)])
    drawn = np.arange(4, dtype=np.int32)
    mesh = make_mesh(**axes)

    def split(logits, rows, drawn):
        return sample(logits, rows, drawn, axes=MODEL_AXES)

    by_row = P("data")
    placed = jax.device_put(
        (logits, rows, drawn),
        (NamedSharding(mesh, P("data", MODEL_AXES)), NamedSharding(mesh, by_row), NamedSharding(mesh, by_row)),
    )
    found = jax.jit(
        jax.shard_map(
            split, mesh=mesh, in_specs=(P("data", MODEL_AXES), by_row, by_row), out_specs=by_row, check_vma=False
        )
    )(*placed)
    expected = sample(jnp.asarray(logits), rows, jnp.asarray(drawn))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-6)
