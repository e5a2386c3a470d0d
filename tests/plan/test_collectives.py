"""Collectives are read as they are written: pairs once, loops as often as they turn, branches once."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from gptoss_jax.plan.collectives import Collective, program_collectives, sending_seconds, step_collectives
from gptoss_jax.sharding import make_mesh
from tests.plan.devices import cpus

PROGRAM = """HloModule jit_decode, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %x)
}

%inner (arg: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %arg = (s32[], bf16[4,8]{1,0}) parameter(0)
  %each = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} all-reduce(%arg), channel_id=1, to_apply=%add
  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%arg, %each)
}

%quiet (arg: f32[4]) -> f32[4] {
  ROOT %arg = f32[4]{0} parameter(0)
}

%busy (arg: f32[4]) -> f32[4] {
  %arg = f32[4]{0} parameter(0)
  ROOT %moved = f32[4]{0} collective-permute(%arg), source_target_pairs={{0,1}}
}

%fused (p: f32[2]) -> f32[2] {
  %p = f32[4]{0} parameter(0)
  ROOT %scattered = f32[2]{0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

%body (arg: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %arg = (s32[], bf16[4,8]{1,0}) parameter(0)
  %runs = (s32[], bf16[4,8]{1,0}) while(%arg), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"6"}}
  %start = ((f32[16]{0}), f32[32]{0}) all-gather-start(%arg), channel_id=2, dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
  %both = (f32[3]{0}, pred[5]{0}) all-reduce(%arg, %arg), to_apply=%add
  %chosen = f32[4]{0} conditional(%arg, %arg, %arg), branch_computations={%quiet, %busy}
  %merged = f32[2]{0} fusion(%chosen), kind=kCustom, calls=%fused
  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%arg, %done)
}

ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %once = bf16[2,4,8]{2,1,0} all-to-all(%x), dimensions={0}
  %loop = (s32[], bf16[4,8]{1,0}) while(%x), condition=%c, body=%body
  ROOT %out = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""
STEP = [
    Collective("all-reduce", 64, 6, 2),
    Collective("all-gather", 128, 1, 0),
    Collective("all-reduce", 17, 1, 0),
    Collective("collective-permute", 16, 1, 0),
    Collective("reduce-scatter", 8, 1, 0),
]


def test_each_collective_of_a_step_and_of_the_program() -> None:
    assert step_collectives(PROGRAM, 3) == STEP
    assert program_collectives(PROGRAM, 3) == [Collective("all-to-all", 128, 1, 0), *STEP]
    assert step_collectives(PROGRAM.replace(" while(%x)", " custom-call(%x)"), 3) == [
        Collective("all-to-all", 128, 1, 0)
    ]


def test_collectives_of_a_compiled_program() -> None:
    mesh = make_mesh(expert=4, tensor=2)

    def sums(x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = jax.lax.psum(jnp.sin(x), ("expert", "tensor")) / 8
        return jax.lax.all_gather(x, "expert")

    with jax.set_mesh(mesh):
        program = jax.jit(jax.shard_map(sums, in_specs=P(), out_specs=P(), check_vma=False))
        text = program.lower(jax.ShapeDtypeStruct((4, 10), jnp.float32)).compile().as_text()
    assert text is not None
    assert program_collectives(text, 3) == [Collective("all-reduce", 160, 3, 1), Collective("all-gather", 640, 1, 0)]


def test_time_of_collectives_grows_with_their_number_and_bytes() -> None:
    chip = cpus(4).chip  # 10 us each, 1 GB/s
    assert sending_seconds([], chip, 4) == 0
    few = [Collective("all-reduce", 1_000_000, 2, 1)]
    assert sending_seconds(few, chip, 4) == pytest.approx(2 * (10e-6 + 2 * 0.75e-3))
    gathered = [Collective("all-gather", 1_000_000, 2, 1)]
    assert sending_seconds(gathered, chip, 4) == pytest.approx(2 * (10e-6 + 0.75e-3))
