"""Register-level pieces that the Hopper kernels share, for use inside `plgpu.inline_mgpu`.

Every function takes and returns MLIR values of one thread. Fragments are those of the PTX instructions
mma.m16n8k16 and wgmma (PTX ISA, "Matrix fragments for mma.m16n8k16"): lane = 4 * g + t holds, of a 16 x 16 A tile,
rows g and g + 8 at columns 2t, 2t + 1, 2t + 8, 2t + 9; of a 16 x 8 B tile, column g at those four rows; of the
16 x 8 result, rows g and g + 8 at columns 2t, 2t + 1.
"""

from collections.abc import Sequence

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

Value = ir.Value

PACKED_MASK = 0x81C081C0
"""Sign, exponent and mantissa bits of an e2m1 number inside a bfloat16, twice."""
STREAMED = "nc.L1::no_allocate.L2::256B."
"""How to load what is read once: past the L1 cache, and bringing its neighbours into the L2 cache."""


def i32() -> ir.Type:
    """A 32-bit register."""
    return ir.IntegerType.get_signless(32)


def f32() -> ir.Type:
    """A float32 register."""
    return ir.F32Type.get()


def constant(value: int) -> Value:
    """A 32-bit constant."""
    return mgpu.c(value, i32())


def assembly(
    results: Sequence[ir.Type], operands: Sequence[Value], code: str, constraints: str, *, effect: bool
) -> list[Value]:
    """Inline PTX with any number of results; `effect` keeps it in its place among other such instructions."""
    if not results:
        llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, code, constraints, has_side_effects=True)
        return []
    if len(results) == 1:
        return [llvm.inline_asm(results[0], operands, code, constraints, has_side_effects=effect)]
    joined = llvm.inline_asm(
        llvm.StructType.get_literal(list(results)), operands, code, constraints, has_side_effects=effect
    )
    return [llvm.extractvalue(kind, joined, [index]) for index, kind in enumerate(results)]


def address(ref: Value) -> Value:
    """The 64-bit address of the first element of a memref in global memory."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.utils.memref_ptr(ref))


def shared_address(ref: Value) -> Value:
    """The 32-bit address of the first element of a memref in shared memory."""
    return llvm.ptrtoint(i32(), mgpu.utils.memref_ptr(ref))


def scale_pair(scale_word: Value, byte: int) -> Value:
    """Byte `byte` of a word as the exponent of two bfloat16 powers of two."""
    code = f"{{ .reg .b32 a; prmt.b32 a, $1, 0, 0x4{byte}4{byte}; shl.b32 $0, a, 7; }}"
    return assembly([i32()], [scale_word], code, "=r,r", effect=False)[0]


def scale_float(scale_word: Value, byte: int) -> Value:
    """Byte `byte` of a word as the exponent of a float32 power of two."""
    bits = constant(0x7F800000)
    moved = arith.shrui(scale_word, constant(1)) if byte == 3 else arith.shli(scale_word, constant(23 - 8 * byte))
    return arith.bitcast(f32(), arith.andi(moved, bits))


def codes(word: Value) -> list[Value]:
    """Eight e2m1 values of one word times 2**-126: four registers of two bfloat16 each, subnormals included.

    The word's bit order is that of `pallas_kernels.experts.hopper_layout`. Masked and shifted, a code is a bfloat16
    of exponent field 0 to 3.
    """

    def masked(value: Value, mask: int) -> Value:
        return arith.andi(value, constant(mask))

    left = arith.shli(word, constant(6)), arith.shli(word, constant(2))
    last = arith.ori(masked(left[1], 0x80C080C0), masked(arith.shrui(word, constant(6)), 0x01000100))
    rotated = assembly([i32()], [word], "shf.l.wrap.b32 $0, $1, $1, 12;", "=r,r", effect=False)[0]
    return [*(masked(value, PACKED_MASK) for value in (word, left[0], rotated)), last]


def unpack(word: Value, scale: Value) -> list[Value]:
    """`codes` times a pair of equal scales, which make up for the 2**-126."""
    return [scaled(code, scale) for code in codes(word)]


def scaled(pair: Value, scales: Value) -> Value:
    """Two bfloat16 times two others."""
    return assembly([i32()], [pair, scales], "mul.bf16x2 $0, $1, $2;", "=r,r,r", effect=False)[0]


def mma(accumulator: Sequence[Value], a: Sequence[Value], b: Sequence[Value]) -> list[Value]:
    """accumulator + a @ b with bfloat16 fragments: four float32, four and two registers."""
    code = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    operands = [*a, *b, *accumulator]
    return assembly([f32()] * 4, operands, code, "=f,=f,=f,=f,r,r,r,r,r,r,0,1,2,3", effect=False)


def load_vector(pointer: Value, offset: int = 0, *, hint: str = "") -> list[Value]:
    """Four consecutive words from global memory; `offset` in bytes, `hint` such as `STREAMED`."""
    code = f"ld.global.{hint}v4.u32 {{$0,$1,$2,$3}}, [$4+{offset}];"
    return assembly([i32()] * 4, [pointer], code, "=r,=r,=r,=r,l", effect=True)


def load_word(pointer: Value, offset: int = 0, *, hint: str = "") -> Value:
    """One word from global memory."""
    return assembly([i32()], [pointer], f"ld.global.{hint}u32 $0, [$1+{offset}];", "=r,l", effect=True)[0]


def load_vector_if(condition: Value, pointer: Value, offset: int = 0, *, hint: str = "") -> list[Value]:
    """`load_vector` where the condition (1 bit) holds; elsewhere the words are whatever the registers held."""
    code = f"@$5 ld.global.{hint}v4.u32 {{$0,$1,$2,$3}}, [$4+{offset}];"
    return assembly([i32()] * 4, [pointer, condition], code, "=r,=r,=r,=r,l,b", effect=True)


def load_word_if(condition: Value, pointer: Value, offset: int = 0, *, hint: str = "") -> Value:
    """`load_word` where the condition (1 bit) holds; elsewhere the word is whatever the register held."""
    code = f"@$2 ld.global.{hint}u32 $0, [$1+{offset}];"
    return assembly([i32()], [pointer, condition], code, "=r,l,b", effect=True)[0]


def exp2(value: Value) -> Value:
    """2 to the power of a float32, subnormals flushed to zero."""
    return assembly([f32()], [value], "ex2.approx.ftz.f32 $0, $1;", "=f,f", effect=False)[0]


def shuffle_xor(value: Value, distance: int) -> Value:
    """The float32 of the lane whose number differs in the bits of `distance`; every lane of the warp must be there."""
    code = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;"
    return assembly([f32()], [value], code, "=f,f", effect=True)[0]


def bfloat16_pair(low: Value, high: Value) -> Value:
    """Two float32 rounded to bfloat16, in one register."""
    return assembly([i32()], [high, low], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", effect=False)[0]


def halves(low: Value, high: Value, half: int) -> Value:
    """The lower (0) or upper (1) 16 bits of two registers, in one."""
    selector = (0x5410, 0x7632)[half]
    return assembly([i32()], [low, high], f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r", effect=False)[0]


def multiply_add(a: Value, b: Value, c: Value) -> Value:
    """a * b + c in float32, rounded once."""
    return assembly([f32()], [a, b, c], "fma.rn.ftz.f32 $0, $1, $2, $3;", "=f,f,f,f", effect=False)[0]


def shuffle_from(value: Value, lane: Value) -> Value:
    """The float32 that another lane of the warp has; every lane of the warp must be there."""
    return assembly([f32()], [value, lane], "shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "=f,f,r", effect=True)[0]
