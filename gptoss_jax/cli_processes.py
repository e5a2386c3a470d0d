"""A command that several processes run together: they join, process 0 writes the output, and all end when one fails."""

import argparse
import functools
import os
import sys
from collections.abc import Callable

from convert.cli import run_guarded
from gptoss_jax.errors import GptOssError

_MAY_DIFFER = ("run", "coordinator", "process_id", "wait", "checkpoint")
"""The checkpoint's path too: what is in it is compared when it is loaded."""
_LOSS_SECONDS = 5.0


def run_together(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Join the other processes, if there are others, and run.

    Among others an error is printed here, and ends the process at once: JAX would wait for the others first.
    """
    from gptoss_jax import distributed

    arguments = {name: value for name, value in vars(options).items() if name not in _MAY_DIFFER}
    distributed.initialize(
        options.coordinator, options.num_processes, options.process_id, arguments=arguments, timeout_s=options.wait
    )
    if distributed.num_processes() == 1:
        return run(options)
    _own_standard_output(write=distributed.is_first())
    code = run_guarded(functools.partial(_run_and_tell, run), options)
    if code:
        sys.stdout.flush()
        os._exit(code)
    return code


def _run_and_tell(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run; tell the others of an error. One that comes of another process' end is raised as DistributedError."""
    import jax

    from gptoss_jax import distributed

    try:
        return run(options)
    except BaseException as error:
        loss = distributed.loss(_LOSS_SECONDS if isinstance(error, jax.errors.JaxRuntimeError) else 0.0)
        distributed.fail(" ".join(str(error).split()) or type(error).__name__)
        if loss is not None and not isinstance(error, GptOssError):
            raise loss from error
        raise


def _own_standard_output(*, write: bool) -> None:
    """Keep the standard output for what this program writes in process 0: Gloo reports its connections there."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    kept = os.dup(sys.stdout.fileno()) if write else nowhere
    os.dup2(nowhere, sys.stdout.fileno())
    sys.stdout = os.fdopen(kept, "w", encoding=sys.stdout.encoding, errors="replace")
