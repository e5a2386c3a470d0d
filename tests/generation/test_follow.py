import dataclasses

from gptoss_jax import distributed
from gptoss_jax.generation import generate
from gptoss_jax.generation.follow import lead
from gptoss_jax.generation.sampling import Sampling


def test_others_are_told_once_the_first_token_is_asked_for(monkeypatch) -> None:
    told = []
    monkeypatch.setattr(distributed, "tell", lambda value: told.append(value) or value)
    monkeypatch.setattr(generate, "stream", lambda model, prompt, sampling, max_new_tokens: iter(prompt))
    tokens = lead(None, [5, 6], Sampling(seed=1), max_new_tokens=3)
    assert told == []
    assert list(tokens) == [5, 6]
    assert told == [([5, 6], dataclasses.asdict(Sampling(seed=1)), 3)]
