"""Words, conditions and loops of one thread: what makes a kernel written inside `plgpu.inline_mgpu` readable.

Arithmetic with the usual operators on 32-bit registers, branches and loops over MLIR values, and what the lanes of a
warp and the warps of a block tell each other.
"""

import dataclasses
from collections.abc import Callable, Sequence

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels.hopper import Value, assembly, constant, f32, i32

WARP = 32
WORD_BITS = 32
ALL_LANES = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True, eq=False)
class Condition:
    """One bit."""

    value: Value

    def __and__(self, other: "Condition") -> "Condition":
        return Condition(arith.andi(self.value, other.value))

    def negated(self) -> "Condition":
        """The opposite."""
        return Condition(arith.xori(self.value, mgpu.c(1, ir.IntegerType.get_signless(1))))

    def choose(self, yes: "Word | int", no: "Word | int") -> "Word":
        """`yes` where the condition holds, `no` elsewhere."""
        return Word(arith.select(self.value, _operand(yes), _operand(no)))


@dataclasses.dataclass(frozen=True, eq=False)
class Word:
    """An unsigned 32-bit register; arithmetic wraps around."""

    value: Value

    def __add__(self, other: "Word | int") -> "Word":
        return Word(arith.addi(self.value, _operand(other)))

    def __sub__(self, other: "Word | int") -> "Word":
        return Word(arith.subi(self.value, _operand(other)))

    def __mul__(self, other: "Word | int") -> "Word":
        return Word(arith.muli(self.value, _operand(other)))

    def __floordiv__(self, divisor: int) -> "Word":
        """By a constant, of a word below 2**32 / divisor: then one instruction gives it."""
        if divisor & (divisor - 1) == 0:
            return self >> (divisor.bit_length() - 1)
        reciprocal = -(-(1 << WORD_BITS) // divisor)
        return _word("mul.hi.u32 $0, $1, $2;", "=r,r,r", self.value, constant(reciprocal))

    def __mod__(self, divisor: int) -> "Word":
        """The rest of `//`."""
        if divisor & (divisor - 1) == 0:
            return self & (divisor - 1)
        return self - self // divisor * divisor

    def __and__(self, other: "Word | int") -> "Word":
        return Word(arith.andi(self.value, _operand(other)))

    def __or__(self, other: "Word | int") -> "Word":
        return Word(arith.ori(self.value, _operand(other)))

    def __lshift__(self, other: "Word | int") -> "Word":
        return Word(arith.shli(self.value, _operand(other)))

    def __rshift__(self, other: "Word | int") -> "Word":
        return Word(arith.shrui(self.value, _operand(other)))

    def __lt__(self, other: "Word | int") -> Condition:
        return Condition(arith.cmpi(arith.CmpIPredicate.ult, self.value, _operand(other)))

    def __ge__(self, other: "Word | int") -> Condition:
        return Condition(arith.cmpi(arith.CmpIPredicate.uge, self.value, _operand(other)))

    def equals(self, other: "Word | int") -> Condition:
        """Whether the two are the same."""
        return Condition(arith.cmpi(arith.CmpIPredicate.eq, self.value, _operand(other)))

    def at_most(self, other: "Word | int") -> "Word":
        """The smaller of the two."""
        return Word(arith.minui(self.value, _operand(other)))


def word(value: int) -> Word:
    """A constant."""
    return Word(constant(value))


def pointer(base: Value, index: Word, size: int) -> Value:
    """The 64-bit address of element `index` of an array of elements of `size` bytes."""
    i64 = ir.IntegerType.get_signless(64)
    return arith.addi(base, arith.muli(arith.extui(i64, index.value), mgpu.c(size, i64)))


def when(condition: Condition, body: Callable[[], Sequence[Value]], otherwise: Sequence[Value] = ()) -> list[Value]:
    """Run `body` where the condition holds; its results there, `otherwise` elsewhere."""
    branch = scf.IfOp(condition.value, [value.type for value in otherwise], has_else=bool(otherwise))
    with ir.InsertionPoint(branch.then_block):
        scf.yield_(list(body()))
    if branch.else_block is not None:
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(list(otherwise))
    return list(branch.results)


def repeat(
    start: Word, stop: Word, step: int, carried: Sequence[Value], body: Callable[[Word, list[Value]], Sequence[Value]]
) -> list[Value]:
    """Run `body` for start, start + step, ... below stop (all under 2**31); it gets and returns what is carried."""
    loop = scf.ForOp(start.value, stop.value, constant(step), list(carried))
    with ir.InsertionPoint(loop.body):
        scf.yield_(list(body(Word(loop.induction_variable), list(loop.inner_iter_args))))
    return list(loop.results)


def thread() -> Word:
    """The thread's number in its block."""
    return Word(mgpu.utils.thread_idx())


def warp() -> Word:
    """The warp's number in its block, known to the compiler to be the same in all lanes."""
    return Word(mgpu.utils.warp_idx())


def block() -> Word:
    """The block's number in a grid of one dim."""
    return _word("mov.u32 $0, %ctaid.x;", "=r")


def ballot(condition: Condition) -> Word:
    """One bit for every lane of the warp."""
    return _word(f"vote.sync.ballot.b32 $0, $1, {ALL_LANES};", "=r,b", condition.value, effect=True)


def lanes_with_same(key: Word) -> Word:
    """One bit for every lane of the warp that holds the same key."""
    return _word(f"match.any.sync.b32 $0, $1, {ALL_LANES};", "=r,r", key.value, effect=True)


def count_bits(bits: Word) -> Word:
    """How many bits are set."""
    return _word("popc.b32 $0, $1;", "=r,r", bits.value)


def lanes_before() -> Word:
    """One bit for every lane of a lower number."""
    return _word("mov.u32 $0, %lanemask_lt;", "=r")


def from_lane(value: Word, lane: Word | int) -> Word:
    """What another lane of the warp holds."""
    code = f"shfl.sync.idx.b32 $0, $1, $2, 31, {ALL_LANES};"
    return _word(code, "=r,r,r", value.value, _operand(lane), effect=True)


def largest_of_lanes(value: Word) -> Word:
    """The largest value in the warp."""
    return _word(f"redux.sync.max.u32 $0, $1, {ALL_LANES};", "=r,r", value.value, effect=True)


def sum_up_to_lane(value: Word, lane: Word) -> Word:
    """The sum over the lanes of the warp up to this one."""
    distance = 1
    while distance < WARP:
        code = f"shfl.sync.up.b32 $0, $1, {distance}, 0, {ALL_LANES};"
        other = _word(code, "=r,r", value.value, effect=True)
        value = value + (lane >= distance).choose(other, 0)
        distance *= 2
    return value


def load_shared(address: Word, offset: int = 0) -> Word:
    """A word of shared memory."""
    return _word(f"ld.shared.u32 $0, [$1+{offset}];", "=r,r", address.value, effect=True)


def load_shared_vector(address: Word, offset: int = 0) -> list[Value]:
    """Four consecutive float32 of shared memory."""
    code = f"ld.shared.v4.f32 {{$0,$1,$2,$3}}, [$4+{offset}];"
    return assembly([f32()] * 4, [address.value], code, "=f,=f,=f,=f,r", effect=True)


def store_shared(address: Word, value: Word, *, only: Condition | None = None) -> None:
    """Write a word of shared memory, where the condition holds."""
    if only is None:
        assembly([], [address.value, value.value], "st.shared.u32 [$0], $1;", "r,r", effect=True)
    else:
        assembly([], [address.value, value.value, only.value], "@$2 st.shared.u32 [$0], $1;", "r,r,b", effect=True)


def store_shared_vector(address: Word, values: Sequence[Value], offset: int = 0) -> None:
    """Write four consecutive float32 of shared memory."""
    code = f"st.shared.v4.f32 [$4+{offset}], {{$0,$1,$2,$3}};"
    assembly([], [*values, address.value], code, "f,f,f,f,r", effect=True)


def count_up(address: Word, *, only: Condition) -> None:
    """Add one to a word of shared memory, where the condition holds; the order of the threads is not defined."""
    assembly([], [address.value, only.value], "@$1 red.shared.add.u32 [$0], 1;", "r,b", effect=True)


def store(address: Value, value: Value, kind: str, *, only: Condition) -> None:
    """Write to global memory where the condition holds; `kind` is PTX's: "f32", or "b16" for the low half of a word."""
    constraint = {"f32": "f", "b16": "r"}[kind]
    code = "@$2 st.global.f32 [$0], $1;"
    if kind == "b16":
        code = "{ .reg .b16 low; cvt.u16.u32 low, $1; @$2 st.global.b16 [$0], low; }"
    assembly([], [address, value, only.value], code, f"l,{constraint},b", effect=True)


def sync_warp() -> None:
    """Wait for the warp's other lanes; they see each other's writes then."""
    assembly([], [], f"bar.warp.sync {ALL_LANES};", "", effect=True)


def sync_block() -> None:
    """Wait for the block's other threads; they see each other's writes then."""
    assembly([], [], "bar.sync 0;", "", effect=True)


def arrive(barrier: Word, num_warps: int) -> None:
    """Tell the barrier's other warps that this one's reads and writes are done, without waiting."""
    assembly([], [barrier.value], f"bar.arrive $0, {num_warps * WARP};", "r", effect=True)


def wait(barrier: Word, num_warps: int) -> None:
    """Wait until `num_warps` warps, this one included, have arrived at a barrier of the block."""
    assembly([], [barrier.value], f"bar.sync $0, {num_warps * WARP};", "r", effect=True)


def _operand(value: Word | int) -> Value:
    return constant(value) if isinstance(value, int) else value.value


def _word(code: str, constraints: str, *operands: Value, effect: bool = False) -> Word:
    return Word(assembly([i32()], operands, code, constraints, effect=effect)[0])
