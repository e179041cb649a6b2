"""The reader of compiled programs, on small programs compiled for 8 fake CPU devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from freqkv_jax import sharding
from freqkv_jax.hlo import Program
from freqkv_jax.hlo_text import Array, parse_arrays


def compiled(function, *args, **options):
    return Program(jax.jit(function, **options).lower(*args).compile().as_text())


def spread(shape, spec, mesh):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(1, 4, 2)


def test_shapes_are_read():
    arrays = parse_arrays("(bf16[2,1024]{1,0:T(2,128)(2,1)S(1)}, /*index=1*/s32[], pred[3])")
    assert arrays == (Array("bf16", (2, 1024)), Array("s32", ()), Array("pred", (3,)))
    assert [a.num_bytes for a in arrays] == [4096, 4, 3]
    assert Array("s4", (3,)).num_bytes == 2
    assert Array("f8e4m3fn", (5,)).num_bytes == 5
    assert Array("token", ()).num_bytes == 0


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        Program("HloModule empty")


def test_all_gather_is_found_with_bytes_and_origin(mesh):
    def gather(x, y):
        return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, P())) + x.sum()

    program = compiled(
        gather, spread((2,), P(), mesh), spread((8, 16), P("fsdp"), mesh), keep_unused=True
    )
    [found] = [c for c in program.collectives() if c.kind == "all-gather"]
    assert found.output == (Array("f32", (8, 16)),)
    assert (found.num_bytes, found.runs, found.total_bytes) == (512, 1, 512)
    assert found.origin == "parameter 1"


def test_all_reduce_is_found_with_its_op_name(mesh):
    program = compiled(
        lambda x, w: x @ w,
        spread((4, 8), P(None, "tensor"), mesh),
        spread((8, 6), P("tensor"), mesh),
    )
    [found] = program.collectives()
    assert found.kind == "all-reduce" and found.num_bytes == 4 * 6 * 4
    assert "dot_general" in found.op_name and found.origin == "computed"


def test_collectives_in_loops_count_each_turn(mesh):
    def inner(x, w):
        def body(x, _):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(body, x, None, length=5)[0]

    def outer(x, w):
        return jax.lax.fori_loop(0, 3, lambda _, x: inner(x, w), x)

    args = spread((4, 8), P(None, "tensor"), mesh), spread((8, 8), P("tensor"), mesh)
    program = compiled(outer, *args)
    reduces = [c for c in program.collectives() if c.kind in ("all-reduce", "reduce-scatter")]
    assert sum(c.runs for c in reduces) == 15
    assert not program.unknown_loops


def test_a_weight_that_a_loop_hands_on_is_traced_to_its_parameter(mesh):
    def loop(x, w):
        def body(x, _):
            whole = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
            return jnp.tanh(whole * x.sum() + x), None

        return jax.lax.scan(body, x, None, length=7)[0]

    program = compiled(loop, spread((8, 16), P(), mesh), spread((8, 16), P("fsdp"), mesh))
    gathers = [c for c in program.collectives() if c.kind == "all-gather"]
    assert gathers and {c.origin for c in gathers} == {"parameter 1"}


def test_a_loop_of_unknown_length_is_named():
    def loop(x):
        return jax.lax.while_loop(lambda x: x.sum() < 100.0, lambda x: x * 2, x)

    program = compiled(loop, jnp.ones(3))
    assert program.collectives() == []
    assert len(program.unknown_loops) == 1


# As a TPU program has it: no known_trip_count, a counter that starts at 2 and a limit in the tuple.
TPU_LOOP = """HloModule jit_f, is_scheduled=true

%fused (p.1: bf16[8,128]) -> bf16[8,128] {
  %p.1 = bf16[8,128]{1,0} parameter(0)
  ROOT %n.1 = bf16[8,128]{1,0} negate(%p.1), backend_config={"estimated_cycles":"999"}
}

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %s = bf16[] add(%a, %b)
}

%all-reduce-scatter.1 (i: bf16[8,128]) -> bf16[4,128] {
  %i = bf16[8,128]{1,0} parameter(0)
  %r = bf16[8,128]{1,0} all-reduce(%i), channel_id=1, to_apply=%add
  %z = s32[] constant(0)
  ROOT %d = bf16[4,128]{1,0} dynamic-slice(%r, %z, %z), dynamic_slice_sizes={4,128}
}

%body (t: (s32[], bf16[8,128], /*index=2*/s32[])) -> (s32[], bf16[8,128], s32[]) {
  %t = (s32[], bf16[8,128]{1,0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%t), index=0
  %x.1 = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %l.1 = s32[] get-tuple-element(%t), index=2
  %f.1 = bf16[8,128] fusion(%x.1), calls=%fused, backend_config={"estimated_cycles":"10"}
  %g.1 = bf16[4,128] fusion(%f.1), calls=%all-reduce-scatter.1, metadata={op_name="body/dot"}
  %c.1 = (bf16[8,128], bf16[8,128], u32[]) copy-start(%f.1), backend_config={"estimated_cycles":"7"}
  %c.2 = bf16[8,128]{1,0} copy-done(%c.1)
  %one = s32[] constant(1)
  %i.2 = s32[] add(%i.1, %one)
  ROOT %o = (s32[], bf16[8,128]{1,0}, s32[]) tuple(%i.2, %c.2, %l.1)
}

%condition (t.2: (s32[], bf16[8,128], s32[])) -> pred[] {
  %t.2 = (s32[], bf16[8,128]{1,0}, s32[]) parameter(0)
  %i.3 = s32[] get-tuple-element(%t.2), index=0
  %l.2 = s32[] get-tuple-element(%t.2), index=2
  ROOT %lt = pred[] compare(%i.3, %l.2), direction=LT
}

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %two = s32[] constant(2)
  %limit = s32[] constant(6)
  %moved = s32[] copy(%limit), backend_config={"estimated_cycles":"3"}
  %init = (s32[], bf16[8,128]{1,0}, s32[]) tuple(%two, %x, %moved)
  %w = (s32[], bf16[8,128]{1,0}, s32[]) while(%init), condition=%condition, body=%body
  %k = bf16[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %out = bf16[8,128]{1,0} get-tuple-element(%w), index=1
}
"""


def test_tpu_loops_and_cycles():
    program = Program(TPU_LOOP)
    # (6 - 2) turns of 10, and the copy of 3; what a fusion holds is in the fusion's own figure.
    assert program.estimated_cycles() == {
        "cycles": 43,
        "async_cycles": 28,
        "without_estimate": 5,
    }
    assert not program.unknown_loops


def test_a_fused_all_reduce_and_slice_is_a_reduce_scatter():
    [found] = Program(TPU_LOOP).collectives()
    assert (found.kind, found.runs, found.num_bytes) == ("reduce-scatter", 4, 2048)
    assert found.op_name == "body/dot"


def test_asynchronous_pairs_count_once():
    text = """HloModule m

ENTRY %main (x: f32[2,8]) -> f32[8,8] {
  %x = f32[2,8]{1,0} parameter(0)
  %s = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%x), dimensions={0}
  %p = (f32[2,8]{1,0}, f32[2,8]{1,0}, u32[], u32[]) collective-permute-start(%x)
  %q = f32[2,8]{1,0} collective-permute-done(%p)
  ROOT %d = f32[8,8]{1,0} all-gather-done(%s)
}
"""
    found = {c.kind: c for c in Program(text).collectives()}
    assert found["all-gather"].output == (Array("f32", (8, 8)),)
    assert found["all-gather"].num_bytes == 256
    assert found["collective-permute"].num_bytes == 64
    assert len(Program(text).collectives()) == 2


KERNEL = """HloModule m

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %k = f32[8,8] custom-call(%x), custom_call_target="tpu_custom_call", attributes={metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="attention/kernel"}
  %c = f32[8,8]{1,0} custom-call(%k), custom_call_target="ConcatBitcast"
  ROOT %n = f32[8,8]{1,0} negate(%c), backend_config={"estimated_cycles":"5"}
}
"""


def test_metadata_that_spans_lines_does_not_end_a_computation():
    program = Program(KERNEL)
    assert list(program.entry.instructions) == ["x", "k", "c", "n"]
    assert program.entry.instructions["k"].op_name == "attention/kernel"
    assert program.num_kernels() == 1
    assert program.estimated_cycles() == {
        "cycles": 5,
        "async_cycles": 0,
        "without_estimate": 1,
    }
    assert program.longest_loop() is None


# A weight that is fetched before the loop, and in every turn for the next one, in two slices.
PREFETCH = """HloModule m

%body (t: (s32[], f32[4,8], f32[4,8])) -> (s32[], f32[4,8], f32[4,8]) {
  %t = (s32[], f32[4,8]{1,0}, f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %w = f32[4,8]{1,0} get-tuple-element(%t), index=1
  %f = f32[4,8]{1,0} get-tuple-element(%t), index=2
  %g = f32[8,8]{1,0} all-gather(%f), dimensions={0}
  %a = f32[2,8]{1,0} slice(%w), slice={[0:2], [0:8]}
  %b = f32[2,8]{1,0} slice(%OTHER), slice={[2:4], [0:8]}
  %j = f32[4,8]{1,0} custom-call(%a, %b), custom_call_target="ConcatBitcast"
  ROOT %o = (s32[], f32[4,8]{1,0}, f32[4,8]{1,0}) tuple(%i, %w, %j)
}

%condition (t.2: (s32[], f32[4,8], f32[4,8])) -> pred[] {
  %t.2 = (s32[], f32[4,8]{1,0}, f32[4,8]{1,0}) parameter(0)
  ROOT %c = pred[] constant(true)
}

ENTRY %main (z: s32[], w: f32[4,8], v: f32[4,8]) -> f32[4,8] {
  %z = s32[] parameter(0)
  %w.1 = f32[4,8]{1,0} parameter(1)
  %v = f32[4,8]{1,0} parameter(2)
  %first = f32[4,8]{1,0} copy(%FIRST)
  %init = (s32[], f32[4,8]{1,0}, f32[4,8]{1,0}) tuple(%z, %w.1, %first)
  %l = (s32[], f32[4,8]{1,0}, f32[4,8]{1,0}) while(%init), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  ROOT %r = f32[4,8]{1,0} get-tuple-element(%l), index=2
}
"""


@pytest.mark.parametrize(
    ("first", "other", "origin"),
    [
        ("w.1", "w", "parameter 1"),
        ("w.1", "f", "parameter 1"),  # handed on from turn to turn
        ("v", "w", "computed"),
        ("w.1", "g", "computed"),
    ],
)
def test_a_weight_that_a_loop_prefetches_is_traced(first, other, origin):
    text = PREFETCH.replace("%FIRST", f"%{first}").replace("%OTHER", f"%{other}")
    [found] = Program(text.replace("\\\n", "")).collectives()
    assert (found.origin, found.runs) == (origin, 3)


def test_a_collective_that_is_spread_over_fusions_counts_once():
    text = """HloModule m

%start (p: f32[2,8]) -> (f32[2,8], f32[4,8]) {
  %p = f32[2,8]{1,0} parameter(0)
  %g.1 = f32[4,8]{1,0} all-gather(%p), channel_id=7, dimensions={0}
  ROOT %s = (f32[2,8]{1,0}, f32[4,8]{1,0}) custom-call(%g.1), custom_call_target="Start"
}

%beside (q: f32[2,8]) -> f32[4,8] {
  %q = f32[2,8]{1,0} parameter(0)
  ROOT %g.2 = f32[4,8]{1,0} all-gather(%q), channel_id=7, dimensions={0}
}

ENTRY %main (x: f32[2,8], y: f32[2,8]) -> f32[4,8] {
  %x = f32[2,8]{1,0} parameter(0)
  %y = f32[2,8]{1,0} parameter(1)
  %a = (f32[2,8]{1,0}, f32[4,8]{1,0}) fusion(%y), kind=kCustom, calls=%start
  %e = f32[2,8]{1,0} get-tuple-element(%a), index=0
  %b = f32[4,8]{1,0} fusion(%e), kind=kCustom, calls=%beside
  ROOT %c = f32[4,8]{1,0} all-gather(%x), channel_id=8, dimensions={0}
}
"""
    found = Program(text).collectives()
    assert [(c.name, c.origin) for c in found] == [("g.1", "parameter 1"), ("c", "parameter 0")]
