"""The named errors a user can meet; each message says what was found, where, and what to do.

The command line prints any of them in one line and exits with code 2 (see gptoss_jax/cli.py).
"""

import re

_OF_KERNELS = re.compile(r"shared memory|vmem|smem", re.IGNORECASE)


class GptOssError(Exception):
    """Base of every error caused by input rather than by a bug."""

    def __init__(self, what: str, *, where: str, fix: str) -> None:
        super().__init__(f"{what}: {where}: {fix}")
        self.what = what
        self.where = where
        self.fix = fix


def out_of_memory(error: RuntimeError) -> str | None:
    """The first line of XLA's complaint that a device's memory is not enough; None if `error` is another.

    A kernel that asks for more of a processor's own memory than there is has the same status, and is a bug.
    """
    first = str(error).partition("\n")[0]
    return first if "RESOURCE_EXHAUSTED" in str(error) and not _OF_KERNELS.search(first) else None


class ConfigError(GptOssError):
    """A config.json with an unknown, missing or impossible entry."""


class CheckpointError(GptOssError):
    """A checkpoint that is incomplete, damaged, or not what its config says."""


class ConversionError(GptOssError):
    """A conversion that cannot start or go on."""


class ShardingError(GptOssError):
    """A mesh that does not exist or does not divide the model."""


class DistributedError(GptOssError):
    """Processes that do not find each other, do not agree, or end before the others."""


class PromptError(GptOssError):
    """A prompt the model cannot take: empty, too long, or with ids outside the vocabulary."""


class CacheError(GptOssError):
    """A key/value cache that has no room for what was asked."""


class SamplingError(GptOssError):
    """A sampling setting outside its range."""


class VocabularyError(GptOssError):
    """The o200k vocabulary cannot be found or is not the published one."""


class ConversationError(GptOssError):
    """A conversation that cannot be written in the harmony format."""


class DataError(GptOssError):
    """Conversations to train on that cannot be read, or that leave nothing to train on."""


class BenchError(GptOssError):
    """A measurement that cannot be made, or whose result means nothing."""


class PlanError(GptOssError):
    """A plan for a topology that does not exist, or that nothing installed compiles for."""


class DoesNotFit(BenchError):
    """A measurement that needs more memory than the device has left."""


class TrainingError(GptOssError):
    """A fine-tuning that cannot start, go on, or be taken up again."""
