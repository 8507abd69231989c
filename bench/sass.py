"""What the Triton kernels compile to: registers, spills and instructions per parameter, without a GPU.

Compiles for a compute capability with Triton's own toolchain and reads the machine code. `advance` decides the speed of
a step: its tile loop is told apart from the rest, and divided by the parameters of a tile. An instruction counts once
for the 32 threads of a warp.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lopt.backends import triton as backend
from lopt.backends.triton import Tile
from lopt.config import DIRECTION_EPS, GRADIENT_LIMIT

OTHER_TILES = [Tile(128, 2, None), Tile(256, 4, None), Tile(256, 2, None), Tile(512, 4, None)]
POINTERS = {"table": "*i64", "chunks": "*i32", "tickets": "*i32", "ticket": "*i32"}  # the others are to float32
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)([^;]*);")
SPILLS = ("LDL", "STL")


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
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        usage, text = (
            subprocess.run([str(tool), option, str(binary)], capture_output=True, text=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    instructions = [(int(address, 16), name, rest) for address, name, rest in INSTRUCTION.findall(text)]
    if found is None or not instructions:
        raise RuntimeError(f"{tool} does not read the compiled kernel: {usage[:200]!r}, {text[:200]!r}")
    begin, end = longest_loop(instructions)
    loop = collections.Counter(name for address, name, _ in instructions if begin <= address <= end)
    return Code(int(found[1]), int(found[2]), len(instructions), loop)


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
WIDTHS = (10, 6, 6, 6, 10, 8, 13, 8, 7, 12)


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

    print(f"triton {triton.__version__}, sm_{args.capability}")
    print(line(HEADER))
    table = [(name, kernel, constants, tile) for name, (kernel, constants, tile) in kernels().items()]
    if args.tiles:
        _, kernel, constants, _ = table[1]
        table += [("advance", kernel, constants, tile) for tile in OTHER_TILES]
    for name, kernel, constants, tile in table:
        print(line(row(name, tile, compile_kernel(kernel, constants, tile, args.capability))), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
