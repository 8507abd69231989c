"""What the GPU kernels compile to: registers, spills and instructions per parameter, without a GPU.

Reads the machine code of the CUDA kernels in lopt._C, where it was built for the compute capability asked for, and
compiles Triton's with its own toolchain. `advance` decides the speed of a step: its tile loop is told apart from the
rest, and divided by the parameters of a tile. An instruction counts once for the 32 threads of a warp; one takes 16
bytes of the instruction cache.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lopt import native
from lopt.backends import triton as backend
from lopt.backends import triton_flat
from lopt.backends.flat import Call
from lopt.backends.reference import sums_columns
from lopt.backends.triton import Tile
from lopt.config import DIRECTION_EPS, GRADIENT_LIMIT
from lopt.metaparams import MetaParams

OTHER_TILES = [Tile(128, 2, None), Tile(256, 4, None), Tile(256, 2, None), Tile(512, 4, None)]
INTEGERS = ("tensors", "n", "tiles", "total", "per_program", "weight_stride", "columns")
POINTERS = {
    **dict.fromkeys(("table", "begins", "firsts", "places"), "*i64"),
    **dict.fromkeys(("chunks", "tickets", "ticket", "slots", "owners"), "*i32"),
}  # the others are to float32
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)([^;]*);")
USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)")
SPILLS = ("LDL", "STL")
CUDA_THREADS = {"prepare": 256, "advance": 128, "summarise": 256, "apply": 256}  # of a block, csrc/hrnn_gpu.h


@dataclasses.dataclass(frozen=True)
class Code:
    """A compiled kernel.

    Attributes:
        registers: per thread. spilled: bytes of stack per thread.
        instructions: in all. loop: of each kind, in the longest loop. inner: in the longest loop within that.
    """

    registers: int
    spilled: int
    instructions: int
    loop: collections.Counter[str]
    inner: int


class Kernel(NamedTuple):
    """A Triton kernel.

    Attributes:
        function: of triton.jit. constants: its compile-time arguments but BLOCK and THREADS, which `tile` gives.
        options: of the compiler. turns: of a loop within the loop over tiles.
    """

    function: Any
    constants: dict[str, Any]
    tile: Tile
    options: dict[str, Any] = {}
    turns: int = 1


def kernels() -> dict[str, Kernel]:
    """Each kernel for the shipped meta-parameters' configuration on float32."""
    hrnn, config = backend._kernels(), MetaParams.resolve(None).config
    sizes = {"TENSOR_SIZE": 20, "GLOBAL_SIZE": 20}
    columns = sums_columns(config)
    features = {
        "KIND": 0,
        "ATTENTION": 0,
        "DAMPED": int(config.damping > 0),
        "GRADIENT_SHORTCUT": True,
        "COUNT": hrnn.ROWS.value,
        "COMPACT": False,
    }
    inputs = {
        "DAMPING": config.damping,
        "DAMPING_DECAY": config.damping_decay,
        "DISTANCE": config.log_lr_min_distance > 0,
        "LIMIT": GRADIENT_LIMIT,
        "INPUTS": config.tensor_input_size,
        "COLUMNS": columns.count,
        "SQUARES": columns.direction,
        "ATTENTION": 0,
        "LAST": False,
        "WIDTH": 32,
    }
    meta, row = triton_flat._kernels(), Tile(0, 1, None)
    epsilons = (config.ms_eps, config.rms_eps)
    both = triton_flat.options(Call((), 0, (), config.gradient_products, config.attention, *epsilons, 0))
    part, whole = triton_flat.PART, triton_flat.BACKWARD.block
    return {
        "prepare": Kernel(
            hrnn.prepare,
            {
                **sizes,
                "LIMIT": GRADIENT_LIMIT,
                "PROBLEM": True,
                "DAMPED": config.damping > 0,
                "LOG_LR_MIN_STEPS": config.log_lr_min_steps,
                "LOG_LR_MIN_DISTANCE": config.log_lr_min_distance,
                "LOG_LR_MIN_DISTANCE_LIMIT": config.log_lr_min_distance_limit,
                "LOG_LR_MAX_RATIO": config.log_lr_max_ratio,
                "COMPACT": False,
                "KIND": 0,
            },
            backend.STREAM,
        ),
        "advance": Kernel(hrnn.advance, features, backend.TILE),
        "advance compact": Kernel(hrnn.advance, {**features, "COMPACT": True}, backend.TILE),
        "summarise": Kernel(hrnn.summarise, {**sizes, **inputs, "EPS": DIRECTION_EPS}, Tile(0, 4, None)),
        "apply": Kernel(hrnn.apply, {"KIND": 0, "ATTENTION": 0}, backend.STREAM),
        "meta share": Kernel(meta.share, {"PRODUCTS": True, "ATTENTION": 0, "BACKWARD": True}, row),
        "meta forward": Kernel(meta.forward, both, triton_flat.FORWARD, triton_flat.OPTIONS),
        "meta backward": Kernel(
            meta.backward, {**both, "PART": part}, triton_flat.BACKWARD, triton_flat.OPTIONS, whole // part
        ),
        "meta add_groups": Kernel(meta.add_groups, {"SKIPPED": 0}, row),
    }


def compile_kernel(kernel: Kernel, capability: int) -> Code:
    """Compile a kernel for a GPU's compute capability, such as 90, and read what became of it.

    Raises:
        RuntimeError: Triton's disassembler does not read what its compiler wrote; the message says what it printed.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, tile = kernel.function.arg_names, kernel.tile
    tile_constants = {"BLOCK": tile.block, "THREADS": 32 * tile.warps}
    constants = {**kernel.constants, **{name: value for name, value in tile_constants.items() if name in names}}
    types = {**dict.fromkeys(INTEGERS, "i32"), **POINTERS, **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, "*fp32") for name in names}
    options = {"num_warps": tile.warps, "enable_fp_fusion": True, "maxnreg": tile.registers, **kernel.options}
    source = ASTSource(kernel.function, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        (code,) = read_codes(binary).values()
    return code


def cuobjdump(*arguments: str) -> str:
    """What the disassembler prints: the CUDA toolkit's, or the one that comes with Triton."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        import triton

        tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return subprocess.run([tool, *arguments], capture_output=True, text=True).stdout


def read_codes(binary: Path, *options: str) -> dict[str, Code]:
    """Name, as the linker knows it, -> compiled kernel, of a file with machine code for a GPU.

    Raises:
        RuntimeError: the disassembler does not read it; the message says what it printed.
    """
    usage, text = (cuobjdump(option, *options, str(binary)) for option in ("-res-usage", "-sass"))
    used = {name: (int(registers), int(stack)) for name, registers, stack in USAGE.findall(usage)}
    codes = {}
    for part in text.split("Function : ")[1:]:
        name = part.split(maxsplit=1)[0]
        instructions = [(int(address, 16), kind, rest) for address, kind, rest in INSTRUCTION.findall(part)]
        begin, end = longest_loop(instructions)
        body = [instruction for instruction in instructions if begin <= instruction[0] < end]
        first, last = longest_loop(body)
        loop = collections.Counter(kind for address, kind, _ in instructions if begin <= address <= end)
        inner = sum(first <= address <= last for address, _, _ in body)
        if name in used and instructions:
            codes[name] = Code(*used[name], len(instructions), loop, inner)
    if not codes:
        raise RuntimeError(f"cuobjdump does not read {binary}: {usage[:200]!r}, {text[:200]!r}")
    return codes


def cuda_rows(capability: int) -> list[list[object]]:
    """Rows of the CUDA kernels in lopt._C; none, with the reason, where it has none for the capability."""
    if reason := native.absent() or native.left_out().get("cuda"):
        return [["cuda", f"  left out: {reason}"]]
    try:
        codes = read_codes(Path(native.load().__file__), "-arch", f"sm_{capability}")
    except RuntimeError as error:
        return [["cuda", f"  no code for sm_{capability} in lopt._C: {error}"]]
    pack, rows = native.load().gpu_layout()["pack"], []
    for name, threads in CUDA_THREADS.items():
        for symbol, code in codes.items():
            if f"hrnn_{name}" in symbol:
                attention = " +att" if re.search(name + r"I(NS_7Variant\w*?)?ILb1|ILb1E", symbol) else ""
                compact = " compact" if "EEELb1E" in symbol else ""
                block = threads * pack if name == "advance" else 0
                rows.append(row(f"cuda {name}{compact}{attention}", Tile(block, threads // 32, None), code))
    return rows


def longest_loop(instructions: list[tuple[int, str, str]]) -> tuple[int, int]:
    """First and last address of the backward branch that spans most; (0, -1) without one.

    Behind the kernel's last instruction is code that is seldom run; a branch back from there closes no loop.
    """
    longest, exit_ = (0, -1), -1
    for address, name, rest in instructions:
        exit_ = address if name == "EXIT" else exit_
        target = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        if target and exit_ < int(target[1], 16) and address - int(target[1], 16) > longest[1] - longest[0]:
            longest = int(target[1], 16), address
    return longest


HEADER = (
    "kernel",
    "block",
    "warps",
    "limit",
    "registers",
    "stack B",
    "instructions",
    "in loop",
    "spills",
    "/ parameter",
    "most frequent in the loop",
)
WIDTHS = (26, 6, 6, 6, 10, 8, 13, 8, 7, 12)


def line(cells: Sequence[object]) -> str:
    """Cells of a row under HEADER, the first and the last to the left."""
    aligned = [f"{cell!s:>{width}}" for cell, width in zip(cells[1:], WIDTHS[1:], strict=False)]
    return f"{cells[0]!s:<{WIDTHS[0]}}{''.join(aligned)}   {cells[-1]}"


def row(name: str, tile: Tile, code: Code, turns: int = 1) -> list[object]:
    """What HEADER names; `turns` of the loop within the loop count for each parameter."""
    loop = sum(code.loop.values())
    executed = loop + (turns - 1) * code.inner
    return [
        name,
        tile.block or "-",
        tile.warps,
        tile.registers or "-",
        code.registers,
        code.spilled,
        code.instructions,
        loop,
        sum(code.loop[spill] for spill in SPILLS),
        f"{executed * tile.warps / tile.block:.1f}" if tile.block else "-",
        " ".join(f"{kind} {count}" for kind, count in code.loop.most_common(7)),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m lopt.bench.sass", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--capability", type=int, default=90, help="compute capability, such as 80 or 90 (default: 90)")
    parser.add_argument("--tiles", action="store_true", help="compile `advance` with other tiles too; a minute each")
    args = parser.parse_args(arguments)
    try:
        import triton
    except ImportError:
        print(f"{parser.prog}: triton is not installed; pip install lopt[triton]", file=sys.stderr)
        return 1

    print(f"sm_{args.capability}; triton {triton.__version__}")
    print(line(HEADER))
    for cells in cuda_rows(args.capability):
        print(line(cells) if len(cells) == len(HEADER) else "".join(map(str, cells)))
    table = list(kernels().items())
    if args.tiles:
        table += [("advance", kernels()["advance"]._replace(tile=tile)) for tile in OTHER_TILES]
    for name, kernel in table:
        code = compile_kernel(kernel, args.capability)
        print(line(row(f"triton {name}", kernel.tile, code, kernel.turns)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
