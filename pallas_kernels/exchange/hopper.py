"""Sum of parts over devices on Hopper GPUs, for few rows: one kernel, of which each thread has two values of a row."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir.dialects import arith
from jaxtyping import Array, Float

from pallas_kernels import hopper_thread as code
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.exchange.mailbox import Mailbox
from pallas_kernels.exchange.parts import Parts
from pallas_kernels.exchange.peers import Peers
from pallas_kernels.hopper_card import NUM_MULTIPROCESSORS
from pallas_kernels.hopper_thread import Thread, Value

_THREADS = 128
_MOST_BLOCKS = 8 * NUM_MULTIPROCESSORS
"""As many as run at once, since they wait for each other's data; beyond, threads take several turns."""
_VALUES = 2


def add_parts(
    parts: Parts,
    residual: Float[Array, "T D"],
    bias: Float[Array, " D"] | None,
    mailbox: Mailbox,
    *,
    num_devices: int,
) -> tuple[Float[Array, "T D"], Mailbox]:
    """See `pallas_kernels.exchange.add_parts`; the group's devices follow each other in the mesh."""
    values = parts.values.astype(jnp.float32)
    num_tokens, num_parts, width = values.shape
    biases = () if bias is None else (bias,)
    owners = () if parts.ids is None else (parts.ids, jnp.zeros(1, jnp.int32) if parts.first is None else parts.first)
    if {array.dtype for array in (residual, *biases)} != {jnp.dtype(jnp.bfloat16)}:
        raise Unsupported(f"add_parts: rows of {residual.dtype}, not bfloat16")
    if width % _VALUES:
        raise Unsupported(f"add_parts: rows of {width} values, not an even number")
    row_items = width // _VALUES
    num_items = num_tokens * row_items
    num_blocks = min(-(-num_items // _THREADS), _MOST_BLOCKS)
    num_threads = num_blocks * _THREADS

    def run(context, values, residual, number, *rest) -> tuple[()]:
        *rest, boxes, out = rest
        values, residual, out, *rest = (code.address(ref) for ref in (values, residual, out, *rest))
        bias, owners = rest[: len(biases)], rest[len(biases) :]
        peers = Peers(context, boxes, number, mailbox, num_devices=num_devices)
        first = code.plus(code.times(code.block_index(), _THREADS), Thread.current().index)

        def own(item: Value, column: Value) -> list[Value]:
            """This device's part: its own parts' sum."""
            token = arith.divui(item, code.constant(row_items))
            start = code.plus(code.times(token, 4 * num_parts * width), code.times(column, 4 * _VALUES))
            sums: list[Value] = []
            for part in range(num_parts):
                words = code.load_global_pair(code.moved(values, code.plus(start, 4 * part * width)))
                if owners:
                    ids, first_id = owners
                    place = code.plus(code.times(token, 4 * num_parts), 4 * part)
                    expert = arith.subi(code.load_global_word(code.moved(ids, place)), code.load_global_word(first_id))
                    is_here = code.less(expert, parts.count)
                    words = [arith.select(is_here, word, code.constant(0)) for word in words]
                floats = [arith.bitcast(code.f32(), word) for word in words]
                sums = [arith.addf(one, two) for one, two in zip(sums, floats, strict=True)] if sums else floats
            return sums

        def each_item(body) -> None:
            def turn(index: Value) -> None:
                item = code.plus(first, code.times(index, num_threads))
                with mgpu.utils.when(code.less(item, num_items)):
                    body(item, arith.remui(item, code.constant(row_items)))

            code.each_turn(-(-num_items // num_threads), turn)

        def send(item: Value, column: Value) -> None:
            peers.send(code.times(item, _VALUES), own(item, column))

        def finish(item: Value, column: Value) -> None:
            pair = code.times(item, 2 * _VALUES)
            before = code.unpair(code.load_global_word(code.moved(residual, pair)))
            sums = peers.total(code.times(item, _VALUES), own(item, column))
            for vector in bias:
                added = code.unpair(code.load_global_word(code.moved(vector, code.times(column, 2 * _VALUES))))
                sums = [arith.addf(one, two) for one, two in zip(sums, added, strict=True)]
            after = [arith.addf(one, two) for one, two in zip(before, code.rounded(*sums), strict=True)]
            code.store_global_word(code.moved(out, pair), code.pair(*after))

        each_item(send)
        each_item(finish)
        return ()

    def add_parts_kernel(*refs) -> None:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs), return_type=())(run)(*refs)

    boxes = jax.new_ref(mailbox.boxes)
    out = plgpu.kernel(
        add_parts_kernel,
        out_type=jax.ShapeDtypeStruct(residual.shape, residual.dtype),
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=_THREADS // 128,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, skip_device_barrier=True),
    )(values, residual, mailbox.number, *biases, *owners, boxes)
    return out, mailbox.used(jax.freeze(boxes))
