"""Small pieces of one Hopper thread's code that the projections share, beside those of `pallas_kernels.hopper`.

Every function runs inside `plgpu.inline_mgpu` and takes and returns MLIR values of one thread: addresses are 64-bit
integers in global memory and 32-bit ones in shared memory, `int` arguments are known when compiling.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm

from pallas_kernels.hopper import Value, address, assembly, constant, i32

__all__ = ["Thread", "Value", "address", "assembly", "constant", "i32"]


@dataclasses.dataclass(frozen=True)
class Thread:
    """Where a thread stands in its block, and in the fragments of `mma.m16n8k16`: lane = 4 * group + member."""

    index: Value
    warp: Value
    lane: Value
    group: Value
    member: Value

    @classmethod
    def current(cls) -> "Thread":
        """The thread that runs."""
        index = arith.index_cast(i32(), gpu.thread_id(gpu.Dimension.x))
        lane = arith.andi(index, constant(31))
        warp = arith.shrui(index, constant(5))
        return cls(index, warp, lane, arith.shrui(lane, constant(2)), arith.andi(lane, constant(3)))


def block_index() -> Value:
    """The block's place in a grid of one dim, clusters counted through."""
    return arith.index_cast(i32(), gpu.block_id(gpu.Dimension.x))


def f32() -> ir.Type:
    """A register that holds a float32."""
    return ir.F32Type.get()


def number(value: float) -> Value:
    """A float32 constant."""
    return mgpu.c(value, f32())


def plus(one: Value, two: Value | int) -> Value:
    """Sum of 32-bit integers."""
    return one if isinstance(two, int) and two == 0 else arith.addi(one, _integer(two))


def times(one: Value, two: Value | int) -> Value:
    """Product of 32-bit integers."""
    return one if isinstance(two, int) and two == 1 else arith.muli(one, _integer(two))


def shifted(value: Value, bits: int) -> Value:
    """An unsigned 32-bit integer over 2**bits."""
    return value if bits == 0 else arith.shrui(value, constant(bits))


def each_turn(count: int, body: Callable[[Value], None]) -> None:
    """Run `body` with 0, 1, ... count - 1.

    A loop and not `count` copies: the compiler would compute what two such places share once, and hold it in registers
    in between.
    """

    @mgpu.utils.fori(constant(count), [])
    def _(turn: Value, carry: list[Value]) -> list[Value]:
        body(turn)
        return carry


def less(one: Value, two: Value | int) -> Value:
    """Whether one unsigned 32-bit integer is below another, as one bit."""
    return arith.cmpi(arith.CmpIPredicate.ult, one, _integer(two))


def smaller(one: Value, two: Value | int) -> Value:
    """The smaller of two unsigned 32-bit integers."""
    return arith.minui(one, _integer(two))


def moved(base: Value, num_bytes: Value) -> Value:
    """A global address and an unsigned 32-bit number of bytes past it."""
    return arith.addi(base, arith.extui(ir.IntegerType.get_signless(64), num_bytes))


def element(base: Value, index: Value, num_bytes: int) -> Value:
    """The global address of an element of an array, found in 64 bits: arrays may be larger than 4 GB."""
    wide = ir.IntegerType.get_signless(64)
    return arith.addi(base, arith.muli(arith.extui(wide, index), mgpu.c(num_bytes, wide)))


def _integer(value: Value | int) -> Value:
    return constant(value) if isinstance(value, int) else value


CACHED = "ld.global"
"""A load that leaves the line in the L1 cache, for what several warps read."""
STREAMED = "ld.relaxed.gpu.global.L1::no_allocate.L2::256B"
"""A load of what is read once. Relaxed, so that ptxas leaves it before a `pin`; it moves `ld.global.nc` past one."""


def load_global_words(pointer: Value, offset: int = 0, *, when: Value | None = None, how: str = CACHED) -> list[Value]:
    """Four words (eight bfloat16 values), 16-byte aligned; with `when` (one bit) off, zeros and no access."""
    if when is None:
        code = f"{how}.v4.u32 {{$0,$1,$2,$3}}, [$4+{offset}];"
        return assembly([i32()] * 4, [pointer], code, "=r,=r,=r,=r,l", effect=True)
    code = (
        "{ .reg .pred p; setp.ne.u32 p, $5, 0; mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0; "
        f"@p {how}.v4.u32 {{$0,$1,$2,$3}}, [$4+{offset}]; }}"
    )
    operands = [pointer, arith.extui(i32(), when)]
    return assembly([i32()] * 4, operands, code, "=&r,=&r,=&r,=&r,l,r", effect=True)


def pin() -> None:
    """Keep streamed loads issued so far before what follows, which ptxas would put first to save registers."""
    assembly([], [], "bar.warp.sync 0xffffffff;", "~{memory}", effect=True)


def load_global_bfloat16(pointer: Value) -> Value:
    """One bfloat16 of global memory as a float32."""
    half = ir.IntegerType.get_signless(16)
    loaded = assembly([half], [pointer], "ld.global.nc.u16 $0, [$1];", "=h,l", effect=True)[0]
    return arith.bitcast(f32(), arith.shli(arith.extui(i32(), loaded), constant(16)))


def load_global_word(pointer: Value) -> Value:
    """32 bits of global memory."""
    return assembly([i32()], [pointer], "ld.global.nc.u32 $0, [$1];", "=r,l", effect=True)[0]


def load_global_pair(pointer: Value) -> list[Value]:
    """Two words of global memory, 8-byte aligned."""
    return assembly([i32()] * 2, [pointer], "ld.global.nc.v2.u32 {$0,$1}, [$2];", "=r,=r,l", effect=True)


def load_global_float(pointer: Value) -> Value:
    """One float32 of global memory."""
    return assembly([f32()], [pointer], "ld.global.nc.f32 $0, [$1];", "=f,l", effect=True)[0]


def store_global_bfloat16(pointer: Value, pair: Value, half: int) -> None:
    """Store one of a word's two bfloat16 values."""
    word = pair if half == 0 else arith.shrui(pair, constant(16))
    short = arith.trunci(ir.IntegerType.get_signless(16), word)
    assembly([], [pointer, short], "st.global.u16 [$0], $1;", "l,h", effect=True)


def store_global_float(pointer: Value, value: Value, offset: int = 0, *, when: Value | None = None) -> None:
    """Store a float32, with `when` only if that bit is set; lanes that do not store stay with the others."""
    if when is None:
        assembly([], [pointer, value], f"st.global.f32 [$0+{offset}], $1;", "l,f", effect=True)
        return
    code = f"{{ .reg .pred p; setp.ne.u32 p, $2, 0; @p st.global.f32 [$0+{offset}], $1; }}"
    assembly([], [pointer, value, arith.extui(i32(), when)], code, "l,f,r", effect=True)


def store_global_word(pointer: Value, value: Value) -> None:
    """Store 32 bits."""
    assembly([], [pointer, value], "st.global.u32 [$0], $1;", "l,r", effect=True)


def store_global_pair(pointer: Value, words: Sequence[Value], offset: int = 0) -> None:
    """Store two words, 8-byte aligned."""
    assembly([], [pointer, *words], f"st.global.v2.u32 [$0+{offset}], {{$1,$2}};", "l,r,r", effect=True)


def store_global_words(pointer: Value, words: Sequence[Value], offset: int = 0) -> None:
    """Store four words, 16-byte aligned."""
    code = f"st.global.v4.u32 [$0+{offset}], {{$1,$2,$3,$4}};"
    assembly([], [pointer, *words], code, "l,r,r,r,r", effect=True)


def shared_address(ref: Value) -> Value:
    """The 32-bit address of a shared-memory memref's first element."""
    return llvm.ptrtoint(i32(), mgpu.utils.memref_ptr(ref))


def load_shared_words(pointer: Value, offset: int = 0) -> list[Value]:
    """Four words of shared memory, 16-byte aligned."""
    code = f"ld.shared.v4.u32 {{$0,$1,$2,$3}}, [$4+{offset}];"
    return assembly([i32()] * 4, [pointer], code, "=r,=r,=r,=r,r", effect=True)


def load_shared_float(pointer: Value, offset: int = 0) -> Value:
    """One float32 of shared memory."""
    return assembly([f32()], [pointer], f"ld.shared.f32 $0, [$1+{offset}];", "=f,r", effect=True)[0]


def store_shared_float(pointer: Value, value: Value, *, when: Value | None = None) -> None:
    """Store a float32 to shared memory, with `when` only if that bit is set."""
    if when is None:
        assembly([], [pointer, value], "st.shared.f32 [$0], $1;", "r,f", effect=True)
        return
    code = "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p st.shared.f32 [$0], $1; }"
    assembly([], [pointer, value, arith.extui(i32(), when)], code, "r,f,r", effect=True)


def store_shared_floats(pointer: Value, pair: Sequence[Value], offset: int = 0) -> None:
    """Store two float32 values to shared memory, 8-byte aligned."""
    assembly([], [pointer, *pair], f"st.shared.v2.f32 [$0+{offset}], {{$1,$2}};", "r,f,f", effect=True)


def store_shared_words(pointer: Value, words: Sequence[Value], offset: int = 0) -> None:
    """Store four words to shared memory, 16-byte aligned."""
    code = f"st.shared.v4.u32 [$0+{offset}], {{$1,$2,$3,$4}};"
    assembly([], [pointer, *words], code, "r,r,r,r,r", effect=True)


def store_shared_pair(pointer: Value, words: Sequence[Value]) -> None:
    """Store two words to shared memory, 8-byte aligned."""
    assembly([], [pointer, *words], "st.shared.v2.u32 [$0], {$1,$2};", "r,r,r", effect=True)


def load_shared_pair(pointer: Value) -> list[Value]:
    """Two words of shared memory, 8-byte aligned."""
    return assembly([i32()] * 2, [pointer], "ld.shared.v2.u32 {$0,$1}, [$2];", "=r,=r,r", effect=True)


def store_shared_word(pointer: Value, word: Value) -> None:
    """Store 32 bits to shared memory."""
    assembly([], [pointer, word], "st.shared.u32 [$0], $1;", "r,r", effect=True)


def load_shared_word(pointer: Value) -> Value:
    """32 bits of shared memory."""
    return assembly([i32()], [pointer], "ld.shared.u32 $0, [$1];", "=r,r", effect=True)[0]


def synchronize() -> None:
    """Wait for the whole block, shared memory included."""
    assembly([], [], "bar.sync 0;", "~{memory}", effect=True)


def multiply_add(one: Value, two: Value, three: Value) -> Value:
    """one * two + three in float32, rounded once."""
    return assembly([f32()], [one, two, three], "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", effect=False)[0]


def unpair(pair: Value) -> tuple[Value, Value]:
    """The two bfloat16 values of a word as float32, the lower half first."""
    low = arith.bitcast(f32(), arith.shli(pair, constant(16)))
    return low, arith.bitcast(f32(), arith.andi(pair, constant(0xFFFF0000)))


def pair(low: Value, high: Value) -> Value:
    """Two float32 values rounded to bfloat16 (nearest, ties to even), in one word."""
    return assembly([i32()], [high, low], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", effect=False)[0]


def rounded(low: Value, high: Value) -> tuple[Value, Value]:
    """Two float32 values rounded to bfloat16 and back."""
    return unpair(pair(low, high))


def warp_sum(value: Value) -> Value:
    """The sum over the warp's lanes, in every lane, added in the same order at every run."""
    for distance in (16, 8, 4, 2, 1):
        code = f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;"
        value = arith.addf(value, assembly([f32()], [value], code, "=f,f", effect=True)[0])
    return value


def inverse_root(value: Value) -> Value:
    """1 / sqrt, to within 2**-22 of it, as XLA's rsqrt on NVIDIA GPUs."""
    return assembly([f32()], [value], "rsqrt.approx.f32 $0, $1;", "=f,f", effect=False)[0]


def exponential(value: Value) -> Value:
    """e to the power of a float32, to within a few units in the last place."""
    scaled = arith.mulf(value, number(math.log2(math.e)))
    return assembly([f32()], [scaled], "ex2.approx.ftz.f32 $0, $1;", "=f,f", effect=False)[0]


def from_lane(value: Value, lane: int) -> Value:
    """Another lane's float32."""
    return assembly([f32()], [value], f"shfl.sync.idx.b32 $0, $1, {lane}, 0x1f, 0xffffffff;", "=f,f", effect=True)[0]


def warp_max(value: Value) -> Value:
    """The largest unsigned integer of the warp's lanes."""
    return assembly([i32()], [value], "redux.sync.max.u32 $0, $1, 0xffffffff;", "=r,r", effect=True)[0]


def warp_min(value: Value) -> Value:
    """The smallest unsigned integer of the warp's lanes."""
    return assembly([i32()], [value], "redux.sync.min.u32 $0, $1, 0xffffffff;", "=r,r", effect=True)[0]


def ordered(value: Value) -> Value:
    """A float32 as an unsigned integer of the same order, above 0 for every number."""
    bits = arith.bitcast(i32(), value)
    return arith.xori(bits, arith.ori(arith.shrsi(bits, constant(31)), constant(0x80000000)))


def unordered(key: Value) -> Value:
    """The float32 whose `ordered` this is."""
    flips = arith.ori(arith.xori(arith.shrsi(key, constant(31)), constant(0xFFFFFFFF)), constant(0x80000000))
    return arith.bitcast(f32(), arith.xori(key, flips))


def cluster_arrive() -> None:
    """Tell the cluster's other blocks that this thread has come here; its writes are visible to those that wait."""
    assembly([], [], "barrier.cluster.arrive.release.aligned;", "~{memory}", effect=True)


def cluster_wait() -> None:
    """Wait until every thread of the cluster has arrived."""
    assembly([], [], "barrier.cluster.wait.acquire.aligned;", "~{memory}", effect=True)


def store_first_block_float(pointer: Value, value: Value) -> None:
    """Store a float32 at the same shared address in the cluster's first block."""
    code = "{ .reg .b32 a; mapa.shared::cluster.u32 a, $0, 0; st.shared::cluster.f32 [a], $1; }"
    assembly([], [pointer, value], code, "r,f", effect=True)


def store_block_float(pointer: Value, value: Value, block: Value, *, when: Value) -> None:
    """Store a float32 at the same shared address in one of the cluster's blocks, if `when` is set."""
    code = (
        "{ .reg .b32 a; .reg .pred p; setp.ne.u32 p, $3, 0; @p mapa.shared::cluster.u32 a, $0, $2; "
        "@p st.shared::cluster.f32 [a], $1; }"
    )
    assembly([], [pointer, value, block, arith.extui(i32(), when)], code, "r,f,r,r", effect=True)
