"""How to fine-tune: what is trained, on which tokens, how far, and what is written down on the way."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

from gptoss_jax.errors import TrainingError
from gptoss_jax.finetune.adapters import TARGETS, LoRA, Target
from gptoss_jax.harmony.conversation import CHANNELS, REASONING_LEVELS

Method = Literal["lora", "full", "qat"]
OptimizerName = Literal["adamw", "adafactor", "lion", "sgd"]
Schedule = Literal["constant", "linear", "cosine"]
METHODS: tuple[Method, ...] = get_args(Method)
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

MAY_CHANGE = ("evaluate_every", "save_every", "keep", "vocabulary_on_host")
"""What a run that is taken up again may have otherwise than before."""
_LARGEST = {"seed": 2**63, "epochs": 1000, int: 2**31, float: 2**127}
"""What a number may not reach: a setting of this name, or else of this type. All epochs are packed to count updates."""
_OF_LORA: tuple[str, ...] = ("rank", "alpha", "targets")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuning:
    """The settings of a run; all of them are written into its directory.

    Example:
        >>> FineTuning(rank=8, alpha=16.0, epochs=3.0).lora
        LoRA(rank=8, alpha=16.0, targets=('attention', 'experts'))
    """

    method: Method = "lora"
    """`lora`: adapters on a frozen model, its experts packed. `full`: all weights, float32 masters, multiplied in
    `dtype`. `qat`: that, and the experts rounded to MXFP4 in each forward pass, so that exporting changes nothing."""
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("attention", "experts")
    """What has adapters, among `adapters.TARGETS`. This, rank and alpha are given with `lora` alone."""

    vocabulary_on_host: bool = False
    """With `lora`: embedding and unembedding stay in the host's memory, 2.3 GB of the published models. A batch's rows
    are looked up there, and the unembedding is read twice for each part of a batch, a piece at a time."""

    steps: int | None = None
    """Updates; None: as many as `epochs` takes."""
    epochs: float = 1.0
    """Times through the data; not given beside `steps`."""
    batch_size: int = 8
    """Rows of packed conversations an update."""
    accumulate: int = 1
    """Parts of a batch that are computed one after the other, for less memory. The same update, but for `balance`."""
    sequence_length: int = 2048
    """Tokens a row."""
    truncate: bool = False
    """Cut conversations that are longer than a row; otherwise they are an error."""
    channels: tuple[str, ...] = CHANNELS
    """Of the assistant, whose tokens are trained."""
    reasoning: str = "medium"
    """The level of conversations that name none."""
    seed: int = 0

    optimizer: OptimizerName = "adamw"
    """`adamw`: two moments in float32. `adafactor`: a factored second one. `lion`: one in bfloat16. `sgd`: none."""
    learning_rate: float = 2e-4
    schedule: Schedule = "cosine"
    """From the learning rate down to a tenth of it."""
    warmup_steps: int = 0
    """Updates on the way from zero to the learning rate."""
    weight_decay: float = 0.0
    """Of matrices, with adamw and lion; norms, biases and sinks have none."""
    clip_norm: float = 1.0
    """The most that the norm of all gradients together may be; larger ones are scaled down."""
    balance: float = 0.0
    """Weight of the routers' auxiliary loss (Fedus et al. 2021, arXiv 2101.03961), which is 1 when balanced; of each of
    the `accumulate` parts by itself."""

    evaluation: float = 0.0
    """Share of the conversations that is held out, if no file of others is given."""
    evaluate_every: int = 0
    """Updates between evaluations; 0: at the end alone."""
    save_every: int = 100
    """Updates between checkpoints; there is one at the end in any case."""
    keep: int = 3
    """Checkpoints kept: the newest, at least two."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def lora(self) -> LoRA | None:
        """The adapters that are trained; None when all weights are."""
        if self.method != "lora":
            return None
        return LoRA(rank=self.rank, alpha=self.alpha, targets=cast(tuple[Target, ...], self.targets))

    @classmethod
    def from_json(cls, content: Mapping[str, Any], *, where: str) -> "FineTuning":
        """Settings from a parsed JSON object; raises TrainingError for what is unknown or impossible."""
        types = {field.name: field.type for field in dataclasses.fields(cls)}
        if unknown := sorted(set(content) - set(types)):
            raise TrainingError(f"unknown setting {unknown[0]!r}", where=where, fix=f"use some of {', '.join(types)}")
        values: dict[str, Any] = {}
        for name, value in content.items():  # JSON has no tuples, and may write 2 for 2.0
            if isinstance(value, list):
                values[name] = tuple(value)
            else:
                whole = types[name] is float and type(value) is int and abs(value) < _LARGEST[float]
                values[name] = float(value) if whole else value
        return cls(**values)

    @classmethod
    def read(cls, path: Path) -> "FineTuning":
        """Settings from a JSON file; what it leaves out has its default."""
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as broken:
            raise TrainingError(f"cannot read settings ({broken})", where=str(path), fix="name a JSON file") from broken
        if not isinstance(content, dict):
            raise TrainingError("settings are no JSON object", where=str(path), fix='write {"name": value, ...}')
        return cls.from_json(content, where=str(path))


def _check(settings: FineTuning) -> None:
    def check(holds: bool, name: str, fix: str) -> None:
        if not holds:
            raise TrainingError(f"{name} = {getattr(settings, name)!r}", where="settings", fix=fix)

    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.type in (int, float, int | None):
            kind = int | float if field.type is float else field.type
            check(isinstance(value, kind) and not isinstance(value, bool), field.name, "give a number")
            largest = _LARGEST.get(field.name, _LARGEST[float if field.type is float else int])
            check(value is None or 0 <= value < largest, field.name, "give a number from 0 on, and not so large")
        elif field.type == tuple[str, ...]:
            names = isinstance(value, tuple) and all(isinstance(name, str) for name in value)
            check(names, field.name, "give a list of names")
    for name in ("truncate", "vocabulary_on_host"):
        check(isinstance(getattr(settings, name), bool), name, "give true or false")
    on_devices = f"leave it out: method {settings.method} trains the vocabulary, so it is on the devices"
    check(settings.method == "lora" or not settings.vocabulary_on_host, "vocabulary_on_host", on_devices)
    for name in ("batch_size", "accumulate", "sequence_length", "save_every"):
        check(getattr(settings, name) >= 1, name, "give 1 or more")
    check(settings.keep >= 2, "keep", "give 2 or more: the newest is proven sound by the update after it")
    decays = settings.optimizer in ("adamw", "lion") or settings.weight_decay == 0
    check(decays, "weight_decay", f"use adamw or lion: {settings.optimizer} has none here")
    for name in ("learning_rate", "clip_norm", "epochs"):
        check(getattr(settings, name) > 0, name, "give a number above 0")
    check(settings.steps is None or settings.steps >= 1, "steps", "give 1 or more")
    check(settings.evaluation < 1, "evaluation", "give a share below 1")
    check(settings.batch_size % settings.accumulate == 0, "accumulate", f"divide batch_size {settings.batch_size}")
    for name, known in (
        ("method", METHODS),
        ("optimizer", OPTIMIZERS),
        ("schedule", SCHEDULES),
        ("reasoning", REASONING_LEVELS),
    ):
        check(getattr(settings, name) in known, name, f"use one of {', '.join(known)}")
    for name, every in (("channels", CHANNELS), ("targets", TARGETS)):
        some = getattr(settings, name)
        check(bool(some) and set(some) <= set(every), name, f"use some of {', '.join(every)}")
    _ = settings.lora  # refuses what no adapter can be
    unused = {} if settings.method == "lora" else dict.fromkeys(_OF_LORA, f"method {settings.method} has no adapters")
    if settings.steps is not None:
        unused["epochs"] = "steps says how many updates to take"
    for name, why in unused.items():
        check(getattr(settings, name) == getattr(FineTuning, name), name, f"leave it out: {why}")
