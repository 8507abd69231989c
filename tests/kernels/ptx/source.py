"""PTX, the instructions that nvcc and Triton compile to, as data: kernels, their registers and their statements.

Source: PTX ISA 9.0, chapters 4, 5 and 10.
"""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple, TypeAlias

BITS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "f16": 16, "f32": 32, "f64": 64}
BITS |= {f"{sign}{bits}": bits for sign in "us" for bits in (8, 16, 32, 64)}
BITS |= {"bf16": 16, "f16x2": 32, "bf16x2": 32, "f32x2": 64}


@dataclasses.dataclass(frozen=True)
class Register:
    """Of a kernel's registers, by number."""

    index: int


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A variable, a label or a special register, by name."""

    name: str


@dataclasses.dataclass(frozen=True)
class Address:
    """[base + offset]"""

    base: Register | Symbol | int
    offset: int


@dataclasses.dataclass(frozen=True)
class Float:
    """A literal of which the bits are given."""

    bits: int


Operand: TypeAlias = "Register | Symbol | Address | Float | int | tuple[Operand, ...]"


class Statement(NamedTuple):
    """An instruction.

    Attributes:
        name: what is before the first point. modifiers: what is behind it. operands: in their order.
        guard: the predicate under which it is executed; `negated` if that has to be false. text: as it stands there.
    """

    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    text: str

    @property
    def type(self) -> str:
        """The last modifier that is a type, without one empty."""
        return next((modifier for modifier in reversed(self.modifiers) if modifier in BITS), "")


@dataclasses.dataclass(eq=False)
class Kernel:
    """A kernel.

    Attributes:
        params: name -> offset in the bytes of all parameters, `params_size` of them.
        threads: of a block, where the kernel says so. registers: bits of each.
        shared, local: name -> offset in the memory of a block and of a thread; the sizes of these, in bytes, are
            `shared_size`, without what a launch adds, and `local_size`.
        labels: name -> the statement behind it.
    """

    name: str
    params: dict[str, int] = dataclasses.field(default_factory=dict)
    params_size: int = 0
    threads: int = 0
    registers: list[int] = dataclasses.field(default_factory=list)
    shared: dict[str, int] = dataclasses.field(default_factory=dict)
    shared_size: int = 0
    local: dict[str, int] = dataclasses.field(default_factory=dict)
    local_size: int = 0
    statements: list[Statement] = dataclasses.field(default_factory=list)
    labels: dict[str, int] = dataclasses.field(default_factory=dict)

    def offset(self, name: str) -> int:
        """Where a variable or parameter lies in its memory."""
        return {**self.params, **self.shared, **self.local}[name]


ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", re.DOTALL)
VARIABLE = re.compile(r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
STATEMENT = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*)", re.DOTALL)


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a module by name."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    outside = Kernel("")
    for match in re.finditer(r"^\s*(?:\.extern\s+)?\.shared\s+([^;]*);", text.partition(".entry")[0], re.MULTILINE):
        _declare(match[1], outside, "shared")
    kernels = {}
    for match in ENTRY.finditer(text):
        kernel = Kernel(match[1], shared=dict(outside.shared), shared_size=outside.shared_size)
        for param in filter(str.strip, match[2].split(",")):
            _declare(re.sub(r"\.param|\.ptr|\.global|(?<=\.global) \.align \d+", "", param), kernel, "params")
        if threads := re.search(r"\.(?:maxntid|reqntid)\s+(\d+)", match[3]):
            kernel.threads = int(threads[1])
        _parse_body(text[match.end() :], kernel)
        kernels[kernel.name] = kernel
    return kernels


def _declare(text: str, kernel: Kernel, space: str) -> None:
    """Lay out a variable of the shared or local memory, or a parameter."""
    variable = VARIABLE.search(text)
    assert variable, text
    size = BITS[variable[2]] // 8
    align, names = int(variable[1] or size), getattr(kernel, space)
    begin = -(-getattr(kernel, f"{space}_size") // align) * align
    names[variable[3]] = begin
    if variable[4] != "":  # otherwise its size is that of the launch
        setattr(kernel, f"{space}_size", begin + size * int(variable[4] or 1))


def _parse_body(text: str, kernel: Kernel) -> None:
    """Read the statements up to the brace that closes a kernel."""
    scopes: list[dict[str, Register]] = [{}]
    statement, position = "", 0
    while True:
        # A brace within a statement, before its semicolon, is a vector's; at its beginning it opens a scope.
        end = min(found for found in (text.find(mark, position) for mark in ";{}") if found >= 0)
        before, mark = text[position:end], text[end]
        position = end + 1
        statement += before
        if mark == "{" and _is_vector(statement):
            close = text.index("}", position)
            statement += text[end : close + 1]
            position = close + 1
            continue
        for line in ("" if mark == ";" else statement).split("\n"):
            _label(line, kernel)
        if mark == ";":
            _parse_statement(statement, kernel, scopes)
        elif mark == "{":
            scopes.append({})
        elif len(scopes) == 1:
            return
        else:
            scopes.pop()
        statement = ""


def _is_vector(before: str) -> bool:
    """Whether a brace behind this is part of an instruction's operands."""
    last = re.sub(r"[\w$]+:(?!:)", "", _without_directives(before)).strip()
    return last != ""


def _without_directives(text: str) -> str:
    return "\n".join(line for line in text.split("\n") if not re.match(r"\s*\.(loc|file|section)\b", line))


def _label(line: str, kernel: Kernel) -> str:
    """Take labels off a line and note them."""
    while match := re.match(r"\s*([\w$]+):(?!:)", line):
        kernel.labels[match[1]] = len(kernel.statements)
        line = line[match.end() :]
    return line


def _parse_statement(text: str, kernel: Kernel, scopes: list[dict[str, Register]]) -> None:
    text = "\n".join(_label(line, kernel) for line in _without_directives(text).split("\n")).strip()
    if not text or text.startswith(".pragma"):
        return
    if match := REGISTERS.match(text):
        for name in match[2].split(","):
            several = re.fullmatch(r"\s*([%\w$]+)<(\d+)>\s*", name)
            names = [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [name.strip()]
            for each in names:
                scopes[-1][each] = Register(len(kernel.registers))
                kernel.registers.append(BITS[match[1]])
        return
    if match := re.match(r"\.(shared|local)\s+(.*)", text, re.DOTALL):
        return _declare(match[2], kernel, match[1])
    match = STATEMENT.fullmatch(text)
    assert match, text

    def find(name: str) -> Register | Symbol:
        return next((scope[name] for scope in reversed(scopes) if name in scope), Symbol(name))

    def operand(part: str) -> Operand:
        part = part.strip()
        if part.startswith("{"):
            return tuple(operand(each) for each in part[1:-1].split(","))
        if part.startswith("["):
            base, sign, offset = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", part).groups()
            address, number = operand(base), int(offset or "0", 0)
            assert isinstance(address, (Register, Symbol, int)), text
            return Address(address, -number if sign == "-" else number)
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", part):
            return Float(int(part[2:], 16))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", part):
            return int(part.rstrip("U"), 0)
        return find(part)

    negated, guard, name, modifiers, rest = match.groups()
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", rest)
    condition = find(guard) if guard else None
    assert condition is None or isinstance(condition, Register), text
    kernel.statements.append(
        Statement(
            name,
            tuple(modifiers.replace("::cta", "").split(".")[1:]),
            tuple(operand(part) for part in parts if part.strip()),
            condition,
            bool(negated),
            re.sub(r"\s+", " ", text),
        )
    )
