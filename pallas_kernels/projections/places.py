"""Where a token's heads go: queries to an array of their own, keys and values straight into the cache's pools."""

import dataclasses

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import hopper_thread as code
from pallas_kernels.hopper_thread import Value

HEAD_DIM = 64
_HEAD_BYTES = 2 * HEAD_DIM
_NOWHERE = 0xFFFFFFFF
"""The row of what is dropped."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A head: whose it is, by its number among its own."""

    head: Value
    is_query: Value
    is_value: Value

    def pick(self, query: Value, key: Value, value: Value) -> Value:
        """That of three which belongs to this head's projection."""
        return arith.select(self.is_query, query, arith.select(self.is_value, value, key))

    @property
    def rotates(self) -> Value:
        """Whether positions turn it: one bit."""
        return arith.xori(self.is_value, mgpu.c(1, self.is_value.type))


@dataclasses.dataclass(frozen=True)
class Places:
    """The three arrays in global memory, in rows of one head each, and every token's page and slot."""

    num_heads: int
    num_kv_heads: int
    num_pages: int
    num_slots: int
    queries: Value
    keys: Value
    values: Value
    pages: Value
    slots: Value

    def locate(self, head: Value) -> Place:
        """A head, counted through queries, keys and values."""
        ends = self.num_heads, self.num_heads + self.num_kv_heads
        is_query = code.less(head, ends[0])
        is_value = arith.cmpi(arith.CmpIPredicate.uge, head, code.constant(ends[1]))
        skipped = Place(head, is_query, is_value).pick(*(code.constant(skip) for skip in (0, *ends)))
        return Place(arith.subi(head, skipped), is_query, is_value)

    def row(self, place: Place, token: Value) -> Value:
        """Which row of its array a token's head is written to."""
        page, slot = (code.load_global_word(code.element(each, token, 4)) for each in (self.pages, self.slots))
        fits = arith.andi(code.less(page, self.num_pages), code.less(slot, self.num_slots))
        page_head = code.plus(code.times(page, self.num_kv_heads), place.head)
        in_pool = code.plus(code.times(page_head, self.num_slots), slot)
        in_queries = code.plus(code.times(token, self.num_heads), place.head)
        return arith.select(place.is_query, in_queries, arith.select(fits, in_pool, code.constant(_NOWHERE)))

    @staticmethod
    def keeps(row: Value) -> Value:
        """Whether a row is one: one bit."""
        return code.less(row, _NOWHERE)

    def address(self, place: Place, row: Value, dim: Value) -> Value:
        """Where dim `dim` of a head lies that goes to `row`."""
        start = code.element(place.pick(self.queries, self.keys, self.values), row, _HEAD_BYTES)
        return code.moved(start, code.times(dim, 2))


def rotated(one: Value, two: Value, cos: Value, sin: Value, rotates: Value) -> tuple[Value, Value]:
    """Dims i and i + H / 2 of a head, rounded to bfloat16, turned with every operation rounded; the sums are not."""
    one_cos, two_sin = code.rounded(arith.mulf(one, cos), arith.mulf(two, sin))
    two_cos, one_sin = code.rounded(arith.mulf(two, cos), arith.mulf(one, sin))
    return (
        arith.select(rotates, arith.subf(one_cos, two_sin), one),
        arith.select(rotates, arith.addf(two_cos, one_sin), two),
    )
