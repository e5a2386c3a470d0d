"""One process reads the input and writes the output; the others, which hold parts of the model, run the same steps."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from gptoss_jax import distributed
from gptoss_jax.errors import GptOssError
from gptoss_jax.generation import generate
from gptoss_jax.generation.sampling import Sampling
from gptoss_jax.model.transformer import Transformer


def lead(
    model: Any, prompt: Sequence[int], sampling: Sampling | None = None, *, max_new_tokens: int
) -> Iterator[generate.Token]:
    """`stream` with what process 0 passes: for the other processes too, which `follow` from the first `next` on."""
    own = [*map(int, prompt)], dataclasses.asdict(sampling or Sampling()), max_new_tokens
    prompt, settings, max_new_tokens = distributed.tell(own)
    yield from generate.stream(model, prompt, Sampling(**settings), max_new_tokens=max_new_tokens)


def follow(model: Transformer) -> None:
    """Run what process 0 leads, until it says that there is no more; alone, nothing.

    Example:
        >>> import gptoss_jax as gj
        >>> gj.distributed.initialize()  # doctest: +SKIP
        >>> model = gj.load("gpt-oss-120b", mesh=gj.make_mesh(expert=16))  # doctest: +SKIP
        >>> if gj.distributed.is_first():  # doctest: +SKIP
        ...     events = list(gj.Chat(model).send("What is 2 + 2?"))
        ...     gj.dismiss()
        ... else:
        ...     gj.follow(model)
    """
    while not distributed.is_first() and (request := distributed.tell(None)) is not None:
        prompt, settings, max_new_tokens = request
        with contextlib.suppress(GptOssError):  # process 0 raises it too, and says it
            for _ in generate.stream(model, prompt, Sampling(**settings), max_new_tokens=max_new_tokens):
                pass


def dismiss() -> None:
    """Tell the processes that `follow` that there is no more."""
    if distributed.is_first():
        distributed.tell(None)
