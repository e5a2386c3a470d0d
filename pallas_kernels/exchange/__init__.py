"""Sums over devices: what each has of a product split between them, added up and then to the residual stream."""

from collections.abc import Mapping

import jax
from jaxtyping import Array, Float

from pallas_kernels.exchange import hopper
from pallas_kernels.exchange.mailbox import MOST_SENT, MOST_TOKENS, Mailbox
from pallas_kernels.exchange.parts import Parts

__all__ = ["MOST_SENT", "MOST_TOKENS", "AxisNames", "Mailbox", "Mailboxes", "Parts", "add_parts"]

AxisNames = tuple[str, ...]
Mailboxes = Mapping[AxisNames, Mailbox]
"""A mailbox for each group of devices that makes sums, by the mesh axes that the group spans."""


def add_parts(
    parts: Parts,
    residual: Float[Array, "T D"],
    bias: Float[Array, " D"] | None = None,
    *,
    axes: AxisNames,
    mailboxes: Mailboxes,
) -> tuple[Float[Array, "T D"], Mailboxes]:
    """The residual stream with the sum of all parts added: S on each device of the group that `axes` spans.

    Where the group has a mailbox that holds them, every device writes its parts, in float32, into the others' memory,
    in one kernel (GPUs of one process that reach each other's memory). Else, and for more rows, the compiler's
    all-reduce brings them, in the residual's dtype. The bias is added to the sum in float32, the result rounded to the
    residual's dtype and added to it in that dtype; all devices of the group have the same bits. Local arrays: call
    inside shard_map, with a concrete mesh if there are mailboxes. Returns the mailboxes for the next sum.
    """
    return BACKENDS["add_parts"](parts, residual, bias, axes=axes, mailboxes=mailboxes)


def _add_parts(
    parts: Parts, residual: Array, bias: Array | None, *, axes: AxisNames, mailboxes: Mailboxes
) -> tuple[Array, Mailboxes]:
    num_devices = jax.lax.axis_size(axes) if axes else 1
    mailbox = mailboxes.get(axes)
    if num_devices > 1 and mailbox is not None and mailbox.holds(*residual.shape, senders=num_devices):
        sums, used = hopper.add_parts(parts, residual, bias, mailbox, num_devices=num_devices)
        return sums, {**mailboxes, axes: used}
    total = parts.total()
    if num_devices > 1:
        total = jax.lax.psum(total.astype(residual.dtype), axes).astype(total.dtype)
    if bias is not None:
        total += bias.astype(total.dtype)
    return residual + total.astype(residual.dtype), mailboxes


BACKENDS = {"add_parts": _add_parts}
