"""Counting launches: a program written for the purpose, with everything in it that counts otherwise than once."""

import jax
import jax.numpy as jnp

from gptoss_jax.bench.launches import count, program_launches, step_launches

PROGRAM = """HloModule jit_decode, is_scheduled=true, entry_computation_layout={(s32[4]{0})->s32[4]{0}}

%fused (p: s32[4]) -> s32[4] {
  %p = s32[4]{0} parameter(0)
  ROOT %add.9 = s32[4]{0} add(%p, %p)
}

%b (arg: (s32[], s32[4])) -> (s32[], s32[4]) {
  %arg = (s32[], s32[4]{0}) parameter(0)
  %inner.1 = s32[4]{0} fusion(%arg), kind=kLoop, calls=%fused
  ROOT %t = (s32[], s32[4]{0}) tuple(%arg, %inner.1)
}

%c (arg: (s32[], s32[4])) -> pred[] {
  %arg = (s32[], s32[4]{0}) parameter(0)
  ROOT %inner.2 = pred[] fusion(%arg), kind=kLoop, calls=%fused
}

%cheap (arg: s32[4]) -> s32[4] {
  ROOT %arg = s32[4]{0} parameter(0)
}

%dear (arg: s32[4]) -> s32[4] {
  %arg = s32[4]{0} parameter(0)
  ROOT %sorted = s32[4]{0} sort(%arg), dimensions={0}, to_apply=%fused
}

%command_buffer (p0: s32[4]) -> s32[4] {
  %p0 = s32[4]{0} parameter(0)
  %kernel.1 = s32[4]{0} custom-call(%p0), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(decode)/experts"}
  ROOT %view = s32[4]{0} bitcast(%kernel.1)
}

%body (arg: (s32[], /*index=1*/s32[4])) -> (s32[], s32[4]) {
  %arg = (s32[], /*index=1*/s32[4]{0}) parameter(0)
  %x = s32[4]{0} get-tuple-element(%arg), index=1
  %called = s32[4]{0} call(%x), to_apply=%command_buffer
  %looped = (s32[], s32[4]{0}) while(%arg), condition=%c, body=%b, backend_config={"known_trip_count":{"n":"3"}}
  %chosen = s32[4]{0} conditional(%x, %x, %x), branch_computations={%dear, %cheap}, metadata={op_name="cond"}
  %slice-start = ((s32[4]{0}), s32[4]{0}, u32[]) fusion-start(%x), kind=kLoop, calls=%fused
  %slice-done = s32[4]{0} fusion-done(%slice-start)
  %nothing = s32[4,0]{1,0} copy(%x)
  %copy.1 = s32[4]{0} copy(%x)
  ROOT %t = (s32[], s32[4]{0}) tuple(%arg, %called)
}

%condition (arg: (s32[], s32[4])) -> pred[] {
  %arg = (s32[], s32[4]{0}) parameter(0)
  ROOT %going = pred[] fusion(%arg), kind=kLoop, calls=%fused
}

ENTRY %main (x: s32[4]) -> s32[4] {
  %x = s32[4]{0} parameter(0)
  %before = s32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  %loop = (s32[], s32[4]{0}) while(%before), condition=%condition, body=%body
  ROOT %out = s32[4]{0} get-tuple-element(%loop), index=1
}
"""


def test_each_launch_of_a_step() -> None:
    launches = step_launches(PROGRAM)
    assert [(launch.name, launch.kind, launch.times) for launch in launches] == [
        ("kernel.1", "mosaic_gpu_v2", 1),
        ("inner.1", "fusion", 3),
        ("inner.2", "fusion", 3),
        ("chosen", "conditional", 1),
        ("slice-start", "fusion-start", 1),
        ("copy.1", "copy", 1),
        ("going", "fusion", 1),
    ]
    assert count(launches) == 11
    assert launches[0].source == "jit(decode)/experts"
    assert launches[0].shape == "s32[4]{0}"


def test_program_has_what_is_outside_of_the_loop_too() -> None:
    assert count(program_launches(PROGRAM)) == 12


def test_program_without_a_loop_is_one_step() -> None:
    text = jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((8, 8))).compile().as_text()
    assert count(step_launches(text)) == count(program_launches(text)) > 0


def test_text_of_this_compiler_can_be_read() -> None:
    def looped(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x[0, 0] < 100, lambda x: jnp.tanh(x @ x) + x, x)

    text = jax.jit(looped).lower(jnp.ones((64, 64))).compile().as_text()
    assert 1 <= count(step_launches(text)) <= count(program_launches(text))
