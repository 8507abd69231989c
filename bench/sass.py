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
from typing import Any

from lopt import native
from lopt.backends import triton as backend
from lopt.backends.triton import Tile
from lopt.config import DIRECTION_EPS, GRADIENT_LIMIT

OTHER_TILES = [Tile(128, 2, None), Tile(256, 4, None), Tile(256, 2, None), Tile(512, 4, None)]
POINTERS = {"table": "*i64", "chunks": "*i32", "tickets": "*i32", "ticket": "*i32"}  # the others are to float32
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)([^;]*);")
USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)")
SPILLS = ("LDL", "STL")
CUDA_THREADS = {"prepare": 256, "advance": 128, "summarise": 256, "apply": 256}  # of a block, csrc/hrnn_gpu.h


@dataclasses.dataclass(frozen=True)
class Code:
    """A compiled kernel.

    Attributes:
        registers: per thread. spilled: bytes of stack per thread.
        instructions: in all. loop: of each kind, in the longest loop.
    """

    registers: int
    spilled: int
    instructions: int
    loop: collections.Counter[str]


def kernels() -> dict[str, tuple[Any, dict[str, Any], Tile]]:
    """Each kernel with its compile-time arguments for the default configuration on float32, and its tile."""
    hrnn = backend._kernels()
    sizes = {"TENSOR_SIZE": 20, "GLOBAL_SIZE": 20}
    features = {"KIND": 0, "ATTENTION": 0, "GRADIENT_SHORTCUT": True, "COUNT": hrnn.ROWS.value}
    inputs = {"INPUTS": 22, "COLUMNS": 24, "SQUARES": 22, "ATTENTION": 0, "LAST": False, "WIDTH": 32}
    return {
        "prepare": (hrnn.prepare, {**sizes, "LIMIT": GRADIENT_LIMIT, "PROBLEM": True, "KIND": 0}, backend.STREAM),
        "advance": (hrnn.advance, features, backend.TILE),
        "summarise": (hrnn.summarise, {**sizes, **inputs, "EPS": DIRECTION_EPS}, Tile(0, 4, None)),
        "apply": (hrnn.apply, {"KIND": 0, "ATTENTION": 0}, backend.STREAM),
    }


def compile_kernel(kernel: Any, constants: dict[str, Any], tile: Tile, capability: int) -> Code:
    """Compile a kernel and read what became of it.

    Args:
        kernel: a triton.jit function. constants: its compile-time arguments but BLOCK and THREADS, which `tile` gives.
        capability: of the GPU, such as 90.

    Raises:
        RuntimeError: Triton's disassembler does not read what its compiler wrote; the message says what it printed.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tile_constants = {"BLOCK": tile.block, "THREADS": 32 * tile.warps}
    constants = {**constants, **{name: value for name, value in tile_constants.items() if name in kernel.arg_names}}
    signature = {
        name: "constexpr" if name in constants else "i32" if name == "tensors" else POINTERS.get(name, "*fp32")
        for name in kernel.arg_names
    }
    options = {"num_warps": tile.warps, "enable_fp_fusion": True, "maxnreg": tile.registers}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
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
        loop = collections.Counter(kind for address, kind, _ in instructions if begin <= address <= end)
        if name in used and instructions:
            codes[name] = Code(*used[name], len(instructions), loop)
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
                block = threads * pack if name == "advance" else 0
                rows.append(row(f"cuda {name}{attention}", Tile(block, threads // 32, None), code))
    return rows


def longest_loop(instructions: list[tuple[int, str, str]]) -> tuple[int, int]:
    """First and last address of the backward branch that spans most; (0, -1) without one."""
    longest = 0, -1
    for address, name, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        if target and address - int(target[1], 16) > longest[1] - longest[0]:
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
WIDTHS = (20, 6, 6, 6, 10, 8, 13, 8, 7, 12)


def line(cells: Sequence[object]) -> str:
    """Cells of a row under HEADER, the first and the last to the left."""
    aligned = [f"{cell!s:>{width}}" for cell, width in zip(cells[1:], WIDTHS[1:], strict=False)]
    return f"{cells[0]!s:<{WIDTHS[0]}}{''.join(aligned)}   {cells[-1]}"


def row(name: str, tile: Tile, code: Code) -> list[object]:
    """What HEADER names."""
    loop = sum(code.loop.values())
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
        f"{loop * tile.warps / tile.block:.1f}" if tile.block else "-",
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
    table = [(name, kernel, constants, tile) for name, (kernel, constants, tile) in kernels().items()]
    if args.tiles:
        _, kernel, constants, _ = table[1]
        table += [("advance", kernel, constants, tile) for tile in OTHER_TILES]
    for name, kernel, constants, tile in table:
        print(line(row(f"triton {name}", tile, compile_kernel(kernel, constants, tile, args.capability))), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
