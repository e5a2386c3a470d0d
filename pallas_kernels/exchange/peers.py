"""Parts of a sum over devices, written by each thread straight into the other devices' memory (NVLink).

Eight bytes that travel hold four of data and four that say which sum they belong to. They are written and read as one,
so whoever finds the number finds the data with it: there is no other signal, and no barrier (the protocol that NCCL
calls LL). Both buffers of a pair are used in turn. A device writes into one for the next but one sum only once it has
read the sum in between, for which every other device had to be done with this one.
"""

from collections.abc import Sequence
from typing import Any

from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper_thread as code
from pallas_kernels.exchange.mailbox import Mailbox
from pallas_kernels.hopper_thread import Value

_WORD_BYTES = 4


class Peers:
    """The other devices of a group, seen by a thread of one kernel that makes one sum."""

    def __init__(self, context: Any, boxes: Value, number: Value, mailbox: Mailbox, *, num_devices: int) -> None:
        """`boxes` and `number` are the kernel's references to the mailbox's arrays; devices of a group follow each
        other in the mesh."""
        self._num_devices = num_devices
        _, _, senders, num_words = mailbox.boxes.shape
        device = context.device_id()
        rank = arith.remui(device, code.constant(num_devices))
        first = arith.subi(device, rank)
        self._number = code.plus(code.load_global_word(code.address(number)), 1 + mailbox.calls)
        pair = code.times(arith.andi(self._number, code.constant(1)), _WORD_BYTES * senders * num_words)

        def slot(box: Value, sender: Value) -> Value:
            return code.moved(box, code.plus(pair, code.times(sender, _WORD_BYTES * num_words)))

        self._others = [
            arith.remui(code.plus(rank, distance), code.constant(num_devices)) for distance in range(1, num_devices)
        ]
        self._theirs = [
            slot(code.address(context.to_remote(boxes, code.plus(first, other))), rank) for other in self._others
        ]
        self._ours = [slot(code.address(boxes), other) for other in self._others]

    def send(self, place: Value, values: Sequence[Value]) -> None:
        """Write one or two float32 values, those from number `place` of this device's part on, to all others."""
        words = [arith.bitcast(code.i32(), value) for value in values]
        listed = "{$1,$2}" if len(words) == 1 else "{$1,$3,$2,$3}"
        text = f"st.volatile.global.v{2 * len(words)}.u32 [$0], {listed};"
        for box in self._theirs:
            operands = [code.moved(box, _offset(place)), *words, self._number]
            code.assembly([], operands, text, ",".join(["l", *["r"] * (len(words) + 1)]), effect=True)

    def total(self, place: Value, own: Sequence[Value]) -> list[Value]:
        """The sums over all devices in the order of their ranks, once the others' values have come.

        They are added in the same order everywhere, so that all devices have the same bits.
        """
        heard = [self._wait(code.moved(box, _offset(place)), len(own)) for box in self._ours]
        sums: list[Value] = []
        for sender in range(self._num_devices):
            part = list(own)
            for other, values in zip(self._others, heard, strict=True):
                is_it = arith.cmpi(arith.CmpIPredicate.eq, other, code.constant(sender))
                part = [arith.select(is_it, theirs, ours) for theirs, ours in zip(values, part, strict=True)]
            sums = [arith.addf(one, two) for one, two in zip(sums, part, strict=True)] if sums else part
        return sums

    def _wait(self, pointer: Value, count: int) -> list[Value]:
        """One or two values, read until they carry this sum's number."""
        numbers = [f"n{index}" for index in range(count)]
        loaded = ", ".join(f"${index}, n{index}" for index in range(count))
        tests = "setp.ne.u32 p, n0, $N; " + ("setp.ne.or.u32 p, n1, $N, p; " if count == 2 else "")
        text = (
            f"{{ .reg .pred p; .reg .b32 {', '.join(numbers)}; again_${{:uid}}: "
            f"ld.volatile.global.v{2 * count}.u32 {{{loaded}}}, [$P]; {tests}@p bra again_${{:uid}}; }}"
        )
        text = text.replace("$P", f"${count}").replace("$N", f"${count + 1}")
        constraints = ",".join([*["=&r"] * count, "l", "r"])
        words = code.assembly([code.i32()] * count, [pointer, self._number], text, constraints, effect=True)
        return [arith.bitcast(code.f32(), word) for word in words]


def _offset(place: Value) -> Value:
    return code.times(place, 2 * _WORD_BYTES)
