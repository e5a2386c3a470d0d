"""Ids in, ids out: a batch to its end, or one prompt token by token. Knows no text."""

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptoss_jax import distributed
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import PromptError, SamplingError
from gptoss_jax.generation.sampling import Sampling, SamplingRows
from gptoss_jax.generation.steps import DECODE_BUFFER, Chosen, decode, prefill, start
from gptoss_jax.harmony.tokens import STOP_IDS
from gptoss_jax.model.cache import Cache
from gptoss_jax.model.transformer import Transformer, ambient_mesh, check_ids, flattened
from gptoss_jax.parameters import parameters
from gptoss_jax.sharding import place
from pallas_kernels.dispatch import platform

FinishReason = Literal["stop", "length"]

PREFILL_TOKENS = {"hopper": 8192, "tpu": 2048}
"""Tokens, over all rows of the batch, that one dispatch of `prefill` reads on a platform; elsewhere fewer."""
_FEWER_TOKENS = 512
_SMALLEST_CHUNK = 16
_MAX_STREAM_STEPS = 32
_STREAM_SECONDS = 0.05  # a dispatch this short leaves a stream smooth
_MAX_TOP_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class Token:
    """One generated token."""

    id: int
    logprob: float
    """Under the model itself: temperature 1, nothing cut off."""
    top_logprobs: tuple[tuple[int, float], ...]
    """The most probable tokens with their log-probabilities, best first; as many as asked for."""
    finish_reason: FinishReason | None
    """Set on the last token: "stop" if it is a stop id, "length" if no more were allowed or fit the context."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """What followed one prompt."""

    tokens: tuple[Token, ...]

    @property
    def ids(self) -> list[int]:
        """The token ids, a stop id included."""
        return [token.id for token in self.tokens]

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended."""
        reason = self.tokens[-1].finish_reason
        assert reason is not None
        return reason


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int] | np.ndarray],
    sampling: Sampling | Sequence[Sampling] | None = None,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = STOP_IDS,
    top_logprobs: int = 0,
) -> list[Completion]:
    """Continue each prompt until a stop id, `max_new_tokens`, or the end of the context.

    Prompts may differ in length, and each may have a sampling of its own. A row's tokens depend on its prompt and
    its sampling, not on its neighbours (in float32 exactly; in bfloat16 up to rounding that differs with the batch).

    Raises PromptError for prompts that are empty, too long, or have ids outside the vocabulary; SamplingError for
    settings out of range.

    Example:
        >>> import dataclasses, jax.numpy as jnp
        >>> from gptoss_jax.config import gpt_oss_20b
        >>> from gptoss_jax.model.transformer import build
        >>> small = dataclasses.replace(gpt_oss_20b(), num_layers=1, layer_kinds=("full_attention",), hidden_size=64)
        >>> completions = generate(build(small), [[1, 2, 3], [4]], Sampling(temperature=0.0), max_new_tokens=5)
        >>> [len(completion.ids) for completion in completions]
        [5, 5]
    """
    if sampling is None or isinstance(sampling, Sampling):
        sampling = [sampling or Sampling()] * len(prompts)
    if len(sampling) != len(prompts):
        raise SamplingError(
            f"{len(sampling)} samplings for {len(prompts)} prompts", where="sampling", fix="give one, or one a prompt"
        )
    if not prompts:
        return []
    run = _Run(model, prompts, sampling, max_new_tokens, stop_ids, top_logprobs)
    rows = run.first
    while run.running:
        for row, new in zip(rows, run.more(DECODE_BUFFER), strict=True):
            row.extend(new)
    return [Completion(tuple(row)) for row in rows]


def stream(
    model: Transformer,
    prompt: Sequence[int] | np.ndarray,
    sampling: Sampling | None = None,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = STOP_IDS,
    top_logprobs: int = 0,
) -> Iterator[Token]:
    """Continue one prompt as `generate` does, yielding each token as it comes.

    Several tokens are decoded per dispatch, as many as keep the stream smooth: one on a machine that takes long for
    each, up to 32 on a fast one. Bad input raises at the first `next`. Where several processes read the same stream,
    process 0 sets the pace, and decides whether it stops before its end: by closing the iterator.
    """
    run = _Run(model, [prompt], [sampling or Sampling()], max_new_tokens, stop_ids, top_logprobs)
    steps = 1
    try:
        yield from run.first[0]
        while run.running:
            began = time.perf_counter()
            if (steps := distributed.tell(steps)) == 0:
                return
            tokens = run.more(steps)[0]
            elapsed = time.perf_counter() - began  # before yielding: what the caller does meanwhile is no measure
            yield from tokens
            steps = min(2 * steps, _MAX_STREAM_STEPS) if elapsed < _STREAM_SECONDS else max(1, steps // 2)
    finally:
        if run.running and distributed.is_first():
            distributed.tell(0)  # the caller reads on no more: nor do the others


class _Run:
    """A batch on its way: prompts read, first tokens chosen, and more on demand."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int] | np.ndarray],
        sampling: Sequence[Sampling],
        max_new_tokens: int,
        stop_ids: Sequence[int],
        top_logprobs: int,
    ) -> None:
        _check(model, prompts, max_new_tokens, top_logprobs)
        self._model, self._num_prompts, self._num_top = flattened(model), len(prompts), top_logprobs
        self._stop_ids = frozenset(stop_ids)
        lengths = np.array([len(prompt) for prompt in prompts])
        # The last token chosen never enters the cache, so the context has room for one more than it holds.
        allowed = min(max_new_tokens, model.config.max_context)
        remaining = np.minimum(allowed, model.config.max_context - lengths + 1).astype(np.int32)
        room = cache_room(int(np.max(lengths + remaining - 1)), model.config.max_context)

        padding = -len(prompts) % model.mesh.shape["data"]
        prompts = [*prompts, *[[]] * padding]
        settings = SamplingRows.of([*sampling, *[Sampling(temperature=0.0)] * padding])
        cache = Cache.create(
            model.config,
            batch=len(prompts),
            max_length=room,
            max_chunk=prefill_chunk(model, len(prompts)),
            dtype=model.dtype,
            mesh=model.mesh,
        )
        logits, self._cache = _read(self._model, cache, prompts, model.mesh)
        # An id outside the vocabulary stops nothing; -1 stands for none, since an empty array is another shape.
        stops = [stop for stop in sorted(self._stop_ids) if 0 <= stop < model.config.vocab_size]
        self._stops = np.array(stops or [-1], np.int32)
        remaining = np.pad(remaining, (0, padding))
        self._rows, chosen = start(self._model, logits, remaining, settings, self._stops, num_top=top_logprobs)
        self.first = self._tokens(chosen)

    def more(self, limit: int) -> list[list[Token]]:
        """Up to `limit` further tokens of each row, after one dispatch."""
        self._rows, chosen, self._cache = decode(
            self._model, self._cache, self._rows, self._stops, limit, num_top=self._num_top
        )
        return self._tokens(chosen)

    def _tokens(self, chosen: Chosen) -> list[list[Token]]:
        chosen, remaining = jax.device_get((chosen, self._rows.remaining))
        self.running = bool(remaining.any())
        return [self._row_tokens(chosen, row, stopped=not remaining[row]) for row in range(self._num_prompts)]

    def _row_tokens(self, chosen: Chosen, row: int, *, stopped: bool) -> list[Token]:
        count = int(chosen.counts[row])
        tokens = []
        for column in range(count):
            token_id = int(chosen.ids[row, column])
            top = zip(chosen.top_ids[row, column].tolist(), chosen.top_logprobs[row, column].tolist(), strict=True)
            reason: FinishReason | None = None
            if stopped and column == count - 1:
                reason = "stop" if token_id in self._stop_ids else "length"
            tokens.append(Token(token_id, float(chosen.logprobs[row, column]), tuple(top), reason))
        return tokens


def prefill_chunk(model: Transformer, batch: int, *, limit: int | None = None) -> int:
    """Tokens of each of `batch` rows that `generate` reads at a time on the model's platform.

    Fewer where a device has little memory beside its part of the weights: what a chunk takes then stays within a
    sixteenth of the rest, which holds the cache too and what XLA tries products out with when it compiles. `limit` is
    what JAX may take of a device's memory; without it, the device is asked.
    """
    with ambient_mesh(model.mesh):
        tokens = PREFILL_TOKENS.get(platform(), _FEWER_TOKENS)
    limit = _memory_limit(model.mesh) if limit is None else limit
    if limit is not None:
        devices = model.mesh.shape["expert"] * model.mesh.shape["tensor"]
        spare = (limit - _weight_bytes(model.config) // devices) // 16
        while tokens > _FEWER_TOKENS and tokens * _chunk_bytes(model.config) > spare:
            tokens //= 2
    return max(_SMALLEST_CHUNK, tokens // batch)


def _memory_limit(mesh: Mesh) -> int | None:
    """What JAX may take of a device's memory, the least of all devices; None where the platform does not say."""
    own = _least((device.memory_stats() or {}).get("bytes_limit") for device in mesh.local_devices)
    return _least(distributed.exchange("memory limit", own))


def _least(limits: Iterable[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


@functools.cache
def _weight_bytes(config: ModelConfig) -> int:
    return sum(parameter.num_bytes for parameter in parameters(config).values())


def _chunk_bytes(config: ModelConfig) -> int:
    """Temporary bytes for each token of a chunk: its rows for its experts, in and between their products, and the
    float32 product of queries, keys and values."""
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    rows = config.experts_per_token * (config.hidden_size + config.intermediate_size)
    return 2 * rows + 4 * heads + 2 * config.hidden_size


def _read(
    model: Any, cache: Cache, prompts: Sequence[Sequence[int] | np.ndarray], mesh: Mesh
) -> tuple[jax.Array, Cache]:
    """Read ragged prompts chunk by chunk with a `flattened` model; returns the logits after each row's last token.

    Chunks are as long as the cache takes, the last one a power of two: few shapes, so few compilations.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), int(lengths.max())), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    logits = None
    for begin in range(0, tokens.shape[1], cache.max_chunk):
        chunk = tokens[:, begin : begin + cache.max_chunk]
        size = chunk_size(chunk.shape[1], cache.max_chunk)
        chunk = np.pad(chunk, ((0, 0), (0, size - chunk.shape[1])))
        counts = np.clip(lengths - begin, 0, size).astype(np.int32)
        chunk, counts = place((chunk, counts), mesh)
        new_logits, cache = prefill(model, cache, chunk, counts)
        logits = new_logits if logits is None else jnp.where(counts[:, None] > 0, new_logits, logits)
    assert logits is not None
    return logits, cache


def chunk_size(num_tokens: int, most: int) -> int:
    """How long the chunk is that reads so many tokens: a power of two, or the most that the cache takes."""
    return min(max(_SMALLEST_CHUNK, 1 << (num_tokens - 1).bit_length()), most)


def cache_room(length: int, most: int) -> int:
    """Round a cache length up to one of four steps per power of two: few shapes, at most a quarter unused."""
    step = max(64, 1 << max(0, length.bit_length() - 3))
    return min(-(-length // step) * step, most)


def _check(
    model: Transformer, prompts: Sequence[Sequence[int] | np.ndarray], max_new_tokens: int, top_logprobs: int
) -> None:
    context = model.config.max_context
    if max_new_tokens < 1:
        raise SamplingError(f"max_new_tokens is {max_new_tokens}", where="generate", fix="ask for 1 or more")
    most = min(_MAX_TOP_LOGPROBS, model.config.vocab_size)
    if not 0 <= top_logprobs <= most:
        raise SamplingError(f"top_logprobs is {top_logprobs}", where="generate", fix=f"choose 0 to {most}")
    for index, prompt in enumerate(prompts):
        where = f"prompt {index}"
        num_tokens = check_ids(prompt, ndim=1, vocab_size=model.config.vocab_size, where=where).size
        if num_tokens > context:
            raise PromptError(f"{num_tokens} tokens", where=where, fix=f"the context is {context} tokens; shorten it")
