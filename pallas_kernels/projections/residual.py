"""Output projection on Hopper GPUs: product, sum over devices, bias and residual in one kernel."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir.dialects import arith
from jaxtyping import Array, Float

from pallas_kernels import hopper_thread as code
from pallas_kernels.exchange.mailbox import Mailbox
from pallas_kernels.exchange.peers import Peers
from pallas_kernels.hopper_thread import Thread, Value
from pallas_kernels.projections.norm import Activations
from pallas_kernels.projections.product import UNIT_ROWS, Tiles, multiply, total


def output(
    attended: Float[Array, "T N H"],
    weight: Float[Array, "D N H"],
    bias: Float[Array, " D"],
    residual: Float[Array, "T D"],
    mailbox: Mailbox | None = None,
    *,
    tiles: Tiles,
    num_devices: int = 1,
) -> tuple[Float[Array, "T D"], Mailbox | None]:
    """See `pallas_kernels.projections.output`; arguments are checked by the caller. On several devices, whose heads
    these are not, products meet through the mailbox: each thread sends the ones that it finishes."""
    num_tokens, width = residual.shape
    num_columns = attended.shape[1] * attended.shape[2]
    num_items, num_threads = num_tokens * tiles.rows, 32 * tiles.warps
    num_turns = -(-num_items // num_threads)

    def run(context, attended, weight, bias, residual, *rest) -> tuple[()]:
        *mail, out, parts, extras = rest
        attended, weight, bias, residual, out = map(code.address, (attended, weight, bias, residual, out))
        parts, extras = map(code.shared_address, (parts, extras))
        peers = None
        if mailbox is not None:
            number, boxes = mail
            peers = Peers(context, boxes, number, mailbox, num_devices=num_devices)
        me = Thread.current()
        first_row = code.times(code.block_index(), tiles.rows)
        lane_row = code.moved(weight, code.times(code.plus(first_row, me.group), 2 * num_columns))

        def item(turn: Value) -> tuple[Value, Value, Value, Value, Value]:
            """Turn's item of this thread: which, whether it exists, its token, its row in the block and overall."""
            index = code.plus(me.index, code.times(turn, num_threads))
            token, row = arith.divui(index, code.constant(tiles.rows)), arith.remui(index, code.constant(tiles.rows))
            return index, code.less(index, num_items), token, row, code.plus(first_row, row)

        def stage(turn: Value) -> None:
            """Bias and residual of one of this thread's items to shared memory: nobody waits for them at the end."""
            index, exists, token, _, column = item(turn)
            with mgpu.utils.when(exists):
                place = code.plus(code.times(token, width), column)
                added = code.load_global_bfloat16(code.moved(bias, code.times(column, 2)))
                before = code.load_global_bfloat16(code.moved(residual, code.times(place, 2)))
                code.store_shared_word(code.plus(extras, code.times(index, 4)), code.pair(added, before))

        multiply(
            me,
            Activations(attended, num_columns, num_tokens, num_tokens),
            [(lane_row, 2 * num_columns * UNIT_ROWS * unit) for unit in range(tiles.units)],
            tiles,
            parts,
            meanwhile=lambda: code.each_turn(num_turns, stage),
        )

        def own(token: Value, row: Value) -> Value:
            return total(parts, code.plus(code.times(token, tiles.padded_rows), row), tiles, num_tokens)

        def finish(turn: Value) -> None:
            index, exists, token, row, column = item(turn)
            with mgpu.utils.when(exists):
                product = own(token, row)
                if peers is not None:
                    product = peers.total(code.plus(code.times(token, width), column), [product])[0]
                added, before = code.unpair(code.load_shared_word(code.plus(extras, code.times(index, 4))))
                product = arith.addf(product, added)
                product, _ = code.rounded(product, product)
                after = arith.addf(before, product)
                target = code.moved(out, code.times(code.plus(code.times(token, width), column), 2))
                code.store_global_bfloat16(target, code.pair(after, after), 0)

        if peers is not None:

            def send(turn: Value) -> None:
                _, exists, token, row, column = item(turn)
                with mgpu.utils.when(exists):
                    peers.send(code.plus(code.times(token, width), column), [own(token, row)])

            code.each_turn(num_turns, send)
        code.each_turn(num_turns, finish)
        return ()

    def output_kernel(*refs) -> None:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs), return_type=())(run)(*refs)

    boxes = None if mailbox is None else jax.new_ref(mailbox.boxes)
    mail = () if mailbox is None else (mailbox.number, boxes)
    out = plgpu.kernel(
        output_kernel,
        out_type=jax.ShapeDtypeStruct(residual.shape, residual.dtype),
        grid=(width // tiles.rows,),
        grid_names=("block",),
        num_threads=tiles.warps // 4,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((tiles.part_floats(num_tokens),), jnp.float32),
            plgpu.SMEM((num_items,), jnp.uint32),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, skip_device_barrier=True),
    )(attended, weight, bias, residual, *mail)
    return out, None if mailbox is None or boxes is None else mailbox.used(jax.freeze(boxes))
