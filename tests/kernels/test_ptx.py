"""The machine that runs compiled kernels on the CPU: its results, and that it finds what a kernel must not do.

Layouts of the instructions for matrices are those that Triton's compiler relies on; what other instructions give is
computed here from the words of the PTX manual.
"""

import re
import struct

import numpy as np
import pytest
import torch

import lopt
from lopt import HRNNConfig, MetaParams

from .ptx import launch, machine
from .ptx.memory import Fault
from .ptx.source import parse

# Threads find their number in %r0, the block's in %r1, and in %rd0 where their own word of the argument is.
PROGRAM = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry program(.param .u64 program_param_0)
.maxntid {threads}
{{
    .reg .pred %p<8>;
    .reg .b16 %rs<8>;
    .reg .b32 %r<16>;
    .reg .b64 %rd<16>;
    .shared .align 16 .b8 memory[1024];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mad.lo.s32 %r2, %r1, {threads}, %r0;
    ld.param.u64 %rd1, [program_param_0];
    mad.wide.u32 %rd0, %r2, 4, %rd1;
    mov.u32 %r3, memory;
    shl.b32 %r4, %r0, 2;
    add.u32 %r3, %r3, %r4;
    {body}
    ret;
}}
"""


def execute(body: str, words: torch.Tensor, threads: int, blocks: int = 1) -> None:
    """Run a program over words of memory."""
    (kernel,) = parse(PROGRAM.format(threads=threads, body=body)).values()
    machine.run(kernel, blocks, struct.pack("q", words.data_ptr()), launch.tensors_of(words))


def of_one(instructions: str, *operands: int) -> int:
    """What instructions leave in %r8, with operands in %r5 and the following."""
    words = torch.tensor([[value % 2**32] for value in (*operands, 0)], dtype=torch.int64).to(torch.uint32)
    loads = "".join(f"ld.global.u32 %r{5 + i}, [%rd0+{4 * i}];" for i in range(len(operands)))
    execute(f"{loads} {instructions} st.global.u32 [%rd0+{4 * len(operands)}], %r8;", words, 1)
    return int(words[-1])


def bits(value: float) -> int:
    return struct.unpack("I", struct.pack("f", value))[0]


def number(word: int) -> float:
    return struct.unpack("f", struct.pack("I", word))[0]


@pytest.mark.parametrize(
    ("instructions", "operands", "result"),
    [
        ("add.s32 %r8, %r5, %r6;", (2**32 - 1, 3), 2),
        ("mul.hi.s32 %r8, %r5, %r6;", (-3, 2), -1),
        ("mul.hi.u32 %r8, %r5, %r6;", (2**31, 6), 3),
        ("div.s32 %r8, %r5, %r6;", (-7, 2), -3),
        ("rem.s32 %r8, %r5, %r6;", (-7, 2), -1),
        ("div.u32 %r8, %r5, %r6;", (-7, 2), 2**31 - 4),
        ("shl.b32 %r8, %r5, %r6;", (1, 32), 0),
        ("shr.s32 %r8, %r5, %r6;", (-8, 40), -1),
        ("shr.u32 %r8, %r5, %r6;", (-8, 28), 15),
        ("bfe.u32 %r8, %r5, %r6, 4;", (0xABCD, 8), 0xB),
        ("bfe.s32 %r8, %r5, 5, 1;", (32,), -1),
        ("bfi.b32 %r8, %r5, %r6, 8, 8;", (0xEE, 0x11223344), 0x1122EE44),
        ("prmt.b32 %r8, %r5, %r6, 0x5410;", (0x33221100, 0x77665544), 0x55441100),
        ("prmt.b32 %r8, %r5, %r6, 0xF4C0;", (0x33221180, 0x00665580), 0x0080FF80),
        ("lop3.b32 %r8, %r5, %r6, %r7, 0xE8;", (0b1100, 0b1010, 0b0110), 0b1110),
        ("mov.b32 {%rs0, %rs1}, %r5; mov.b32 %r8, {%rs1, %rs0};", (0x12345678,), 0x56781234),
        ("setp.lt.s32 %p0, %r5, %r6; selp.b32 %r8, 1, 2, %p0;", (-1, 0), 1),
        ("setp.lt.u32 %p0, %r5, %r6; selp.b32 %r8, 1, 2, %p0;", (-1, 0), 2),
        ("mov.u32 %r8, 1; setp.eq.s32 %p0, %r5, 3; @%p0 mov.u32 %r8, 2; @!%p0 mov.u32 %r8, 3;", (4,), 3),
        ("cvt.u16.u32 %rs0, %r5; cvt.s32.s16 %r8, %rs0;", (0x1FFFF,), -1),
        ("cvt.rzi.s32.f32 %r8, %r5;", (bits(-2.75),), -2),
        ("cvt.rni.s32.f32 %r8, %r5;", (bits(2.5),), 2),
        ("cvt.rzi.s16.f32 %rs0, %r5; cvt.s32.s16 %r8, %rs0;", (bits(1e9),), 32767),
        ("cvt.rzi.s32.f32 %r8, %r5;", (bits(float("nan")),), 0),
        ("cvt.rn.f32.s32 %r8, %r5;", (-(2**24) - 1,), bits(-(2.0**24))),
        ("cvt.sat.f32.f32 %r8, %r5;", (bits(1.5),), bits(1.0)),
        ("cvt.rn.f16.f32 %rs0, %r5; cvt.f32.f16 %r8, %rs0;", (bits(65520.0),), bits(float("inf"))),
        ("cvt.rn.f16x2.f32 %r8, %r5, %r6;", (bits(1.0), bits(-2.0)), 0x3C00C000),
        ("max.f32 %r8, %r5, %r6;", (bits(float("nan")), bits(-1.0)), bits(-1.0)),
        ("copysign.f32 %r8, %r5, %r6;", (bits(-0.0), bits(3.0)), bits(-3.0)),
        ("setp.ne.f32 %p0, %r5, %r5; selp.b32 %r8, 1, 2, %p0;", (bits(float("nan")),), 2),
        ("setp.neu.f32 %p0, %r5, %r5; selp.b32 %r8, 1, 2, %p0;", (bits(float("nan")),), 1),
        ("fma.rn.f32 %r8, %r5, %r5, %r6;", (bits(1 + 2.0**-23), bits(-1 - 2.0**-22)), bits(2.0**-46)),
        (
            "cvt.f64.f32 %rd2, %r5; fma.rn.f64 %rd3, %rd2, %rd2, 0dBFF0000000000000; cvt.rn.f32.f64 %r8, %rd3;",
            (bits(1 + 2.0**-23),),
            bits(2.0**-22),
        ),
        ("div.approx.f32 %r8, %r5, %r6;", (bits(2.0**127), bits(2.0**127)), 0),
        ("add.rz.f32 %r8, %r5, %r6;", (bits(1.0), bits(-(2.0**-30))), bits(1 - 2.0**-24)),
        ("mul.ftz.f32 %r8, %r5, %r6;", (bits(2.0**-100), bits(2.0**-40)), 0),
        ("mul.f32 %r8, %r5, %r6;", (bits(2.0**-100), bits(2.0**-40)), bits(2.0**-140)),
        ("ex2.approx.ftz.f32 %r8, %r5;", (bits(-130.0),), 0),
        ("lg2.approx.ftz.f32 %r8, %r5;", (bits(8.0),), bits(3.0)),
        (
            "mov.b64 %rd2, {%r5, %r6}; fma.rn.f32x2 %rd3, %rd2, %rd2, %rd2; mov.b64 {%r8, %r9}, %rd3;",
            (bits(3.0), bits(5.0)),
            bits(12.0),
        ),
        ("min.f16x2 %r8, %r5, %r6;", (0x3C00C000, 0x40003C00), 0x3C00C000),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_instruction_gives_what_the_manual_says(instructions, operands, result):
    assert of_one(instructions, *operands) == result % 2**32


@pytest.mark.parametrize(
    ("name", "function", "bound"),
    [
        ("ex2", np.exp2, 2**-22),
        ("rcp", lambda x: 1 / x, 2**-23),
        ("rsqrt", lambda x: x**-0.5, 2**-22.9),
        ("sqrt", lambda x: x**0.5, 2**-23),
        ("lg2", np.log2, 2**-22),
    ],
)
def test_approximations_are_off_by_much_of_what_the_manual_allows_and_by_no_more(name, function, bound):
    x = torch.linspace(0.51, 7.3, 4096)
    words = x.clone()
    execute(f"ld.global.f32 %r5, [%rd0]; {name}.approx.ftz.f32 %r6, %r5; st.global.f32 [%rd0], %r6;", words, 128, 32)
    right = function(x.double().numpy())
    error = np.abs(words.double().numpy() - right)
    scale = np.where((x.numpy() < 2), 1, np.abs(right)) if name == "lg2" else np.abs(right)
    assert 0.9 * bound < (error / scale).max() <= bound + 2**-24


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 64])
def test_matrices_multiplied_as_triton_compiles_it_are_their_product(simulate, size):
    simulate("triton", capability=80)
    import triton
    import triton.language as tl

    @triton.jit
    def multiply(a, b, c, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        at = i[:, None] * SIZE + i[None, :]
        tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).half() for _ in range(2))
    c = torch.full((size, size), torch.nan)
    ptx = multiply[(1,)](a, b, c, SIZE=size, enable_fp_fusion=True).asm["ptx"]
    assert "mma.sync.aligned.m16n8k16" in ptx and "ldmatrix" in ptx
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=0, atol=1e-4)


STORE = "st.shared.u32 [%r3], %r0;"
TURNED = "xor.b32 %r5, %r4, {}; mov.u32 %r6, memory; add.u32 %r6, %r6, %r5; ld.shared.u32 %r7, [%r6];"
ACROSS_WARPS, WITHIN_A_WARP = TURNED.format(128), TURNED.format(4)
OTHER_BLOCK = "xor.b32 %r5, %r2, 32; mad.wide.u32 %rd2, %r5, 4, %rd1; {} ld.global.u32 %r6, [%rd2];"
TICKET = """
    st.global.u32 [%rd0], %r0; bar.sync 0; setp.ne.s32 %p0, %r0, 0; @%p0 bra $wait;
    {fence} atom.global.add.u32 %r7, [%rd1+4096], 1; {fence_behind} st.shared.u32 [memory], %r7;
    $wait: bar.sync 0; ld.shared.u32 %r8, [memory]; setp.eq.s32 %p1, %r8, 0; @%p1 bra $end;
    xor.b32 %r5, %r2, 32; mad.wide.u32 %rd2, %r5, 4, %rd1; ld.global.u32 %r6, [%rd2]; $end:
"""
FENCED = TICKET.format(fence="membar.gl;", fence_behind="membar.gl;")
STORED_LATE = FENCED.replace("membar.gl; atom", "membar.gl; st.global.u32 [%rd0], 99; atom")
STORED_BY_ALL = "st.shared.u32 [memory], 7;"
STORED_BY_ONE = "setp.eq.s32 %p0, %r0, 63; @%p0 st.shared.u32 [memory], 9;"
LOADED_BY_A_WARP = f"{STORE} bar.sync 0; and.b32 %r5, %r0, 32; shl.b32 %r5, %r5, 2; mov.u32 %r6, memory;"
LOADED_BY_A_WARP += "add.u32 %r6, %r6, %r5; ld.shared.u32 %r7, [%r6];"
STORED_BY_A_LANE = "and.b32 %r8, %r0, 31; setp.eq.s32 %p0, %r8, 3; @%p0 st.shared.u32 [%r6], 5;"


@pytest.mark.parametrize(
    ("fault", "body", "threads", "blocks"),
    [
        ("no tensor's", "ld.global.u32 %r5, [%rd0+65536];", 1, 1),
        ("no tensor's", "ld.global.u32 %r5, [%rd0+-64];", 1, 1),
        ("not aligned", "ld.global.u32 %r5, [%rd0+2];", 1, 1),
        ("not aligned", "ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%rd0+8];", 1, 1),
        ("beyond the 1024 bytes of shared memory", "st.shared.u32 [%r3+1024], %r0;", 1, 1),
        ("nobody has written", "ld.shared.u32 %r5, [%r3];", 1, 1),
        ("race: a load of shared", f"{STORE} {ACROSS_WARPS}", 64, 1),
        ("race: a load of shared", f"{STORE} bar.warp.sync -1; {ACROSS_WARPS}", 64, 1),
        ("race: a load of shared", f"{STORE} {WITHIN_A_WARP}", 32, 1),
        ("race: a store to shared", f"{STORE} bar.sync 0; {ACROSS_WARPS} st.shared.u32 [%r3], %r7;", 64, 1),
        ("different values to one place", "st.shared.u32 [memory], %r0;", 32, 1),
        ("race: a load of global", f"st.global.u32 [%rd0], %r0; {OTHER_BLOCK.format('bar.sync 0;')}", 32, 2),
        ("race: a load of global", TICKET.format(fence="", fence_behind="membar.gl;"), 32, 2),
        ("race: a load of global", TICKET.format(fence="membar.gl;", fence_behind=""), 32, 2),
        ("race: a load of global", TICKET.format(fence="membar.cta;", fence_behind="membar.gl;"), 32, 2),
        ("race: a load of global", TICKET.format(fence="membar.gl;", fence_behind="membar.cta;"), 32, 2),
        ("race: a load of global", STORED_LATE, 32, 2),
        ("race: a store to shared", f"{STORED_BY_ALL} {STORED_BY_ONE}", 64, 1),
        ("race: a store to shared", f"{STORED_BY_ALL} bar.warp.sync -1; {STORED_BY_ONE}", 64, 1),
        ("race: a store to shared", f"{LOADED_BY_A_WARP} {STORED_BY_A_LANE}", 64, 1),
        ("race: a store to shared", f"{LOADED_BY_A_WARP} st.shared.u32 [%r6], 0;", 64, 1),
        ("constant load", "st.global.u32 [%rd0], %r0; ld.global.nc.u32 %r5, [%rd0];", 1, 1),
        ("part of a warp", "setp.lt.u32 %p0, %r0, 16; @%p0 bar.warp.sync -1;", 32, 1),
        ("part of a warp", "setp.lt.u32 %p0, %r0, 16; @%p0 shfl.sync.bfly.b32 %r5, %r0, 1, 31, -1;", 32, 1),
        (
            "parts of a warp take in different places",
            "setp.lt.u32 %p0, %r0, 16; @%p0 bra $other; bar.sync 0; bra $end; $other: bar.sync 0; $end:",
            32,
            1,
        ),
        ("does not come to an end", "$again: bra $again;", 1, 1),
    ],
)
def test_what_a_kernel_must_not_do_is_found(monkeypatch, fault, body, threads, blocks):
    monkeypatch.setattr(machine, "MOST_STEPS", 1000)
    with pytest.raises(Fault, match=fault):
        execute(body, torch.zeros(2048, dtype=torch.int32), threads, blocks)


@pytest.mark.parametrize(
    ("body", "threads", "blocks"),
    [
        (f"{STORE} bar.sync 0; {ACROSS_WARPS}", 64, 1),
        (f"{STORE} bar.warp.sync -1; {WITHIN_A_WARP}", 64, 1),
        (f"{STORE} bar.sync 0; {ACROSS_WARPS} bar.sync 0; st.shared.u32 [%r3], %r7;", 64, 1),
        (STORED_BY_ALL, 64, 1),
        (f"{STORED_BY_ALL} bar.sync 0; {STORED_BY_ONE}", 64, 1),
        (f"{LOADED_BY_A_WARP} bar.warp.sync -1; {STORED_BY_A_LANE}", 64, 1),
        ("setp.lt.u32 %p0, %r0, 40; @%p0 bra $end; bar.sync 0; $end:", 64, 2),
        (FENCED, 32, 2),
    ],
)
def test_what_a_kernel_may_do_is_no_fault(body, threads, blocks):
    words = torch.zeros(2048, dtype=torch.int32)
    execute(body, words, threads, blocks)
    if body is FENCED:
        assert words[:64].tolist() == [*range(32)] * 2 and words[1024] == 2


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("tanh.approx.f32 %r5, %r5;", "this instruction is not known"),
        ("add.sat.s32 %r5, %r5, %r5;", ".sat is not known here"),
        ("prmt.b32.f4e %r5, %r5, %r5, %r6;", ".f4e is not known here"),
        ("max.f32 %r5, %r5, %r5, %r6;", "so many operands"),
        ("min.bf16x2 %r5, %r5, %r5;", "in this form"),
        ("mov.u32 %r5, %clock;", "in this form"),
        ("atom.shared.add.u32 %r5, [%r3], 1;", "in this form"),
    ],
)
def test_what_the_machine_does_not_know_it_names(statement, reason):
    with pytest.raises(NotImplementedError, match=f"{re.escape(statement[:-1])}: .*{re.escape(reason)}"):
        execute(statement, torch.zeros(1), 1)


def train(backend: str, state_format: str) -> torch.Tensor:
    """Parameters after two steps over tensors of several chunks, of which one fills warps."""
    config = HRNNConfig(log_lr_min=-6.0, log_lr_min_distance=0.1, log_lr_max_ratio=1.1, damping=0.5)
    params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (4100, 520, 5)]
    optimizer = lopt.HRNN(params, meta=MetaParams.init(config, seed=3), backend=backend, state_format=state_format)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return torch.cat([param.detach() for param in params])


def leave_out(monkeypatch: pytest.MonkeyPatch, name: str, modifier: str, kernel_name: str) -> list[str]:
    """Let kernels of a name run without their statements of a kind; returns the list that these are noted in."""
    left_out, make = [], machine.ACTIONS[name]

    def make_or_leave_out(statement, kernel):
        warp = "warp" in statement.modifiers
        if kernel_name not in kernel.name or modifier not in statement.modifiers or warp != (modifier == "warp"):
            return make(statement, kernel)
        left_out.append(statement.text)
        return lambda launch, group: None

    monkeypatch.setitem(machine.ACTIONS, name, make_or_leave_out)
    machine.compiled.cache_clear()
    return left_out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "kernel", "name", "modifier", "state_format"),
    [
        ("cuda", "prepare", "bar", "sync", "float32"),
        ("cuda", "advance", "bar", "sync", "float32"),
        ("cuda", "advance", "bar", "warp", "compact"),
        ("cuda", "advance", "membar", "gl", "float32"),
        ("cuda", "advance", "membar", "gl", "compact"),
        ("cuda", "summarise", "bar", "sync", "float32"),
        ("cuda", "summarise", "membar", "gl", "float32"),
        ("triton", "prepare", "bar", "sync", "float32"),
        ("triton", "advance", "bar", "sync", "float32"),
        ("triton", "summarise", "bar", "sync", "float32"),
    ],
)
def test_a_kernel_without_its_barriers_or_fences_races(
    simulate, monkeypatch, backend, kernel, name, modifier, state_format
):
    simulate(backend)
    left_out = leave_out(monkeypatch, name, modifier, kernel)
    try:
        with pytest.raises(Fault, match=f"{kernel}.*: (a race|.*nobody has written)"):
            train(backend, state_format)
    finally:
        machine.compiled.cache_clear()
    assert left_out


@pytest.mark.slow
@pytest.mark.parametrize("state_format", ["float32", "compact"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_no_kernel_races_as_it_is(simulate, backend, state_format):
    simulate(backend)
    assert train(backend, state_format).isfinite().all()
