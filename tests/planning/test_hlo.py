"""What is read from the text of a compiled program, on a text small enough to count by hand."""

import re

import pytest

from dpo.planning.hlo import Collective, parse_computations, read_program, shape_bytes

TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p0: f32[30,8,4], p1: s32[]) -> f32[8,4] {
  %p0 = f32[30,8,4]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,8,4]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,4}
  ROOT %flat = f32[8,4]{1,0} bitcast(%slice)
}

%body (state: (s32[], f32[30,8,4], f32[64,4])) -> (s32[], f32[30,8,4], f32[64,4]) {
  %state = (s32[], f32[30,8,4]{2,1,0}, f32[64,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %stack = f32[30,8,4]{2,1,0} get-tuple-element(%state), index=1
  %layer = f32[8,4]{1,0} fusion(%stack, %i), kind=kLoop, calls=%fused
  %gathered = f32[64,4]{1,0:T(8,128)} all-gather(%layer), channel_id=1, replica_groups=[2,8]<=[16], dimensions={0}
  ROOT %next = (s32[], f32[30,8,4]{2,1,0}, f32[64,4]{1,0}) tuple(%i, %stack, %gathered)
}

%condition (state.1: (s32[], f32[30,8,4], f32[64,4])) -> pred[] {
  %state.1 = (s32[], f32[30,8,4]{2,1,0}, f32[64,4]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

%all-reduce-scatter.1 (p: f32[64,4]) -> f32[4,4] {
  %p = f32[64,4]{1,0} parameter(0)
  %whole = f32[64,4]{1,0} all-reduce(%p), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  %start = s32[] constant(0)
  ROOT %part = f32[4,4]{1,0} dynamic-slice(%whole, %start, %start), dynamic_slice_sizes={4,4}
}

ENTRY %main (x: (s32[], f32[30,8,4], f32[64,4])) -> f32[4,4] {
  %x = (s32[], f32[30,8,4]{2,1,0}, f32[64,4]{1,0}) parameter(0)
  %loop = (s32[], f32[30,8,4]{2,1,0}, f32[64,4]{1,0}) while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"30"},"init":{"n":"0"}}
  %last = f32[64,4]{1,0} get-tuple-element(%loop), index=2
  %sent = f32[64,4]{1,0} collective-permute(%last), channel_id=3, source_target_pairs={{0,1},{1,0}}
  ROOT %scattered = f32[4,4]{1,0} fusion(%sent), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501


def test_shapes_have_the_bytes_of_their_elements():
    assert shape_bytes("f32[8,128]{1,0:T(8,128)}") == 4096
    assert shape_bytes("(bf16[3,2], pred[], s32[4]{0})") == 12 + 1 + 16
    assert shape_bytes("f8e4m3fn[16]") == 16


def test_a_loop_counts_as_often_as_it_runs():
    program = read_program(TEXT, 16)
    assert Collective("all-gather", "f32[8,4]", 8 * 4 * 4 * 8, 8, 30) in program.collectives
    assert program.unknown_loops == 0
    unknown = read_program(re.sub(r"backend_config=\{.*\}\n", "metadata={}\n", TEXT), 16)
    assert unknown.unknown_loops == 1
    assert any(c.kind == "all-gather" and c.count == 1 for c in unknown.collectives)


def test_an_all_reduce_that_keeps_a_slice_is_a_reduce_scatter():
    assert Collective("reduce-scatter", "f32[64,4]", 1024, 4, 1) in read_program(TEXT, 16).collectives


def test_a_permutation_is_between_two():
    assert Collective("collective-permute", "f32[64,4]", 1024, 2, 1) in read_program(TEXT, 16).collectives


def test_rings_send_all_but_their_own_share():
    sent = {kind: Collective(kind, "", 1200, 4, 2).wire_bytes for kind in ("all-gather", "all-reduce")}
    assert sent == {"all-gather": 2 * 900, "all-reduce": 2 * 1800}
    assert Collective("collective-permute", "", 1200, 2, 1).wire_bytes == 1200


def test_a_slice_of_a_stack_is_read_alone():
    """30 x (a layer read and written, a gather's input and output), the permutation, the fused scatter."""
    layer, index = 8 * 4 * 4, 4
    loop = 30 * (layer + index + layer + (layer + 1024))
    assert read_program(TEXT, 16).bytes_accessed == loop + 2 * 1024 + (1024 + 64)


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        # From memory to a place beside the cores, and back: one read, one write.
        ("(f32[64,4]{1,0:S(1)}, f32[64,4]{1,0}, u32[]{:S(2)}) copy-start(%x)", 1024),
        ("((f32[64,4]{1,0}), f32[16,4]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:16], [0:4]}", 256),
        ("((f32[64,4]{1,0}), f32[16,4]{1,0}, s32[]{:S(2)}) slice-start(%x), slice={[0:16], [0:4]}", 512),
        ("(f32[64,4]{1,0}, f32[64,4]{1,0}, u32[]{:S(2)}) collective-permute-start(%x)", 2048),
        ("f32[16,4]{1,0:S(1)} slice(%x), slice={[0:16], [0:4]}", 256),
        ('f32[16,4]{1,0} custom-call(), custom_call_target="AllocateBuffer"', 0),
    ],
)
def test_what_ends_elsewhere_moves_its_bytes_once(line, moved):
    text = f"""ENTRY %main (x: f32[64,4]) -> f32[64,4] {{
  %x = f32[64,4]{{1,0}} parameter(0)
  %begun = {line}
}}
"""
    assert read_program(text, 1).bytes_accessed == pytest.approx(moved, abs=4)  # and a word about its state


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse_computations("HloModule nothing\n")
