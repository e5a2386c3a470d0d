"""The rest of a layer: projections with the norm before and the cache or the residual after them, and the router."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Impl, choose
from pallas_kernels.exchange import AxisNames, Mailboxes
from pallas_kernels.projections import hopper, reference
from pallas_kernels.projections.weights import HeadWeights, joined

__all__ = ["HeadWeights", "joined", "joins", "output", "project_to_cache", "route", "unembed"]


_NONE: Mailboxes = {}


def _backends(
    plain: Callable[..., Any], kernel: Callable[..., Any], most: int | None, *static: str
) -> dict[str, Callable[..., Any]]:
    """On Hopper the kernel serves up to `most` rows. More are XLA's: its matrix products then are as fast. On a TPU all
    are: the plain form is its implementation, not a stand-in."""
    few_rows = jax.jit(kernel, static_argnames=static)  # layers share one trace, one lowering and one compilation

    def hopper(x: Array, *args: Any, **kwargs: Any) -> Any:
        return (few_rows if most is None or x.shape[0] <= most else plain)(x, *args, **kwargs)

    return {"reference": plain, "cpu": plain, "hopper": hopper, "tpu": plain}


_hopper_output_kernel = jax.jit(hopper.output, static_argnames=("num_devices", "tiles"))


def _hopper_output(
    attended: Array, weight: Array, bias: Array, residual: Array, *, axes: AxisNames, mailboxes: Mailboxes
) -> tuple[Array, Mailboxes]:
    num_devices, mailbox = jax.lax.axis_size(axes) if axes else 1, mailboxes.get(axes)
    few = attended.shape[0] <= hopper.MAX_TOKENS
    if few and num_devices == 1:
        return _hopper_output_kernel(attended, weight, bias, residual)[0], mailboxes
    if few and mailbox is not None and mailbox.holds(*residual.shape, senders=num_devices):
        out, used = _hopper_output_kernel(attended, weight, bias, residual, mailbox, num_devices=num_devices)
        return out, {**mailboxes, axes: used}
    return reference.output(attended, weight, bias, residual, axes=axes, mailboxes=mailboxes)


BACKENDS = {
    "project_to_cache": _backends(reference.project_to_cache, hopper.project_to_cache, None, "eps", "tiles"),
    "output": {**dict.fromkeys(("reference", "cpu", "tpu"), reference.output), "hopper": _hopper_output},
    "route": _backends(reference.route, hopper.route, hopper.MAX_ROUTED, "eps", "experts_per_token", "tiles"),
    "unembed": _backends(reference.unembed, hopper.unembed, hopper.MAX_UNEMBEDDED, "eps", "tiles"),
}
JOINS = {"reference": lambda: False, "cpu": lambda: False, "hopper": lambda: True, "tpu": lambda: False}


def joins(*, impl: Impl = "auto") -> bool:
    """Whether the implementation reads the weights of all heads as one part: then `joined` is worth its copy."""
    return choose("project_to_cache", JOINS, impl)()


def project_to_cache(
    x: Float[Array, "T D"],
    norm_scale: Float[Array, " D"],
    heads: Sequence[HeadWeights],
    rotation: tuple[Float[Array, "T half"], Float[Array, "T half"]],
    keys: Float[Array, "P K slots W"],
    values: Float[Array, "P K slots W"],
    pages: Int[Array, " T"],
    slots: Int[Array, " T"],
    *,
    eps: float,
    impl: Impl = "auto",
) -> tuple[Float[Array, "T N H"], Float[Array, "P K slots W"], Float[Array, "P K slots W"]]:
    """RMSNorm, then queries, keys and values; returns the queries, and the pools with the new keys and values in them.

    `heads` are the query heads, the key heads and the value heads, in this order: as three parts, say, as published, or
    as one, which Hopper's kernels read (more are joined in each call, a copy: `joined` does it once). The pools say how
    many heads are keys and values.

    A token's keys and values go to slot `slots[t]` of page `pages[t]`; a page number at or past P means nowhere. No two
    tokens may go to one place, and no number is negative. Where a pool is wider than the heads, zeros fill the rest.
    Kernels write in place where the pools passed in are not used again.

    The norm is computed in float32 and rounded once to x's dtype. Products accumulate in float32, the bias is added
    in float32, the sum is rounded to x's dtype; then dim i of queries and keys turns against dim i + H/2 by `rotation`,
    cosines and sines, both rounded to x's dtype first, every operation in that dtype. Local arrays: call inside
    shard_map.

    Raises Unsupported if the named implementation cannot run these arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> x, scale, angles = jnp.ones((3, 8)), jnp.ones(8), jnp.ones((3, 2))
        >>> heads = HeadWeights(jnp.ones((6 + 2 + 2, 4, 8)), jnp.ones((6 + 2 + 2, 4)))
        >>> pool, pages, slots = jnp.zeros((5, 2, 7, 4)), jnp.array([4, 0, 5]), jnp.array([6, 0, 1])
        >>> queries, _, values = project_to_cache(
        ...     x, scale, [heads], (angles, angles), pool, pool, pages, slots, eps=1e-5, impl="reference"
        ... )
        >>> queries.shape, [round(values[place].sum().item()) for place in ((4, 0, 6), (0, 1, 0), slice(None))]
        ((3, 6, 4), [36, 36, 144])
    """
    run = choose("project_to_cache", BACKENDS["project_to_cache"], impl)
    return run(x, norm_scale, heads, rotation, keys, values, pages, slots, eps=eps)


def output(
    attended: Float[Array, "T N H"],
    weight: Float[Array, "D N H"],
    bias: Float[Array, " D"],
    residual: Float[Array, "T D"],
    *,
    axes: AxisNames = (),
    mailboxes: Mailboxes = _NONE,
    impl: Impl = "auto",
) -> tuple[Float[Array, "T D"], Mailboxes]:
    """Heads back to the model's width, with bias, added to the residual stream.

    The product accumulates in float32, the bias is added in float32, the sum is rounded to the residual's dtype and
    added to it in that dtype. Where heads are split over the mesh axes `axes`, the devices' products are summed as
    `pallas_kernels.exchange.add_parts` does it, within the kernel where there is one. Local arrays: call inside
    shard_map. Returns the mailboxes for the next sum.

    Raises Unsupported if the named implementation cannot run these arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> attended, weight = jnp.ones((3, 6, 4)), jnp.ones((8, 6, 4))
        >>> stream, _ = output(attended, weight, jnp.ones(8), jnp.ones((3, 8)), impl="reference")
        >>> stream[0, 0].item()
        26.0
    """
    run = choose("output", BACKENDS["output"], impl)
    return run(attended, weight, bias, residual, axes=axes, mailboxes=mailboxes)


def route(
    x: Float[Array, "T D"],
    norm_scale: Float[Array, " D"],
    router_weight: Float[Array, "E D"],
    router_bias: Float[Array, " E"],
    *,
    eps: float,
    experts_per_token: int,
    impl: Impl = "auto",
) -> tuple[Float[Array, "T D"], Int[Array, "T A"], Float[Array, "T A"]]:
    """RMSNorm, then each token's experts, best first, and the softmax over their scores alone.

    Returns the normed rows too, in x's dtype: what the experts read. Scores accumulate in float32 and stay in it, bias
    included; of equal ones the expert with the lower number comes first. Local arrays: call inside shard_map.

    Raises Unsupported if the named implementation cannot run these arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> args = (jnp.ones((1, 8)), jnp.ones(8), jnp.eye(5, 8), jnp.arange(5.0))
        >>> _, expert_ids, shares = route(*args, eps=1e-5, experts_per_token=2, impl="reference")
        >>> expert_ids.tolist(), round(shares.sum().item(), 3)
        ([[4, 3]], 1.0)
    """
    run = choose("route", BACKENDS["route"], impl)
    return run(x, norm_scale, router_weight, router_bias, eps=eps, experts_per_token=experts_per_token)


def unembed(
    x: Float[Array, "T D"],
    norm_scale: Float[Array, " D"],
    weight: Float[Array, "V D"],
    *,
    eps: float,
    impl: Impl = "auto",
) -> Float[Array, "T V"]:
    """RMSNorm, rounded to x's dtype, then the logits: accumulated and returned in float32.

    Local arrays: call inside shard_map.

    Raises Unsupported if the named implementation cannot run these arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> unembed(jnp.ones((3, 8)), jnp.ones(8), jnp.ones((20, 8)), eps=1e-5, impl="reference").shape
        (3, 20)
    """
    return choose("unembed", BACKENDS["unembed"], impl)(x, norm_scale, weight, eps=eps)
