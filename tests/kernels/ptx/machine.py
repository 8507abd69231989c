"""Runs kernels given as PTX on the CPU, all threads of a launch in numpy arrays, and more strictly than a GPU.

Threads that stand at the same statement take it together, those that are behind first. An instruction of a warp needs
all of it; memory.py judges what is loaded and stored; results are those of arithmetic.py. What a kernel must not do is
a `Fault` that names the statement. Source: PTX ISA 9.0, chapters 8 and 9.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from . import arithmetic
from .arithmetic import DTYPES, FLOATS, PAIRS
from .memory import LOCAL, SHARED, UNSIGNED, WARP, Array, Clock, Fault, Memory
from .source import BITS, Address, Float, Kernel, Operand, Register, Statement, Symbol

MOST_STEPS = 50_000_000
LAST = np.iinfo(np.int32).max
LANES = np.arange(WARP)
Action = Callable[["Launch", "Group"], None]
ACTIONS: dict[str, Callable[[Statement, Kernel], Action]] = {}


class Group:
    """Threads that take a statement together: `index` selects them from an array, `threads` are their numbers."""

    def __init__(self, threads: Array, all_: bool) -> None:
        self.threads = threads
        self.index: Any = slice(None) if all_ else threads

    def where(self, condition: Array) -> Group:
        return self if condition.all() else Group(self.threads[condition], False)


class Launch:
    """A kernel that is running.

    Attributes:
        registers: of each, all threads' values. place: each thread's next statement, LAST after its end.
        waits: which stand at a barrier of their block.
    """

    def __init__(
        self, kernel: Kernel, blocks: int, params: bytes, allowed: Iterable[tuple[int, int]], shared: int, seed: int
    ) -> None:
        self.kernel, self.blocks, self.threads = kernel, blocks, kernel.threads
        count = blocks * kernel.threads
        assert kernel.threads % WARP == 0 or count < WARP, "warps lie in one block each"
        self.params = np.frombuffer(params.ljust(kernel.params_size + 8, b"\0"), np.uint8)
        self.clock = Clock(blocks, kernel.threads)
        self.memory = Memory(self.clock, blocks, kernel.shared_size + shared, kernel.local_size, allowed)
        self.registers = [  # at first anything
            np.ones(count, bool) if bits == 1 else np.full(count * bits // 8, 0xA5, np.uint8).view(UNSIGNED[bits // 8])
            for bits in kernel.registers
        ]
        self.place = np.zeros(count, np.int32)
        self.waits = np.zeros(count, bool)
        self.all = np.arange(count)
        self.random = np.random.default_rng(seed)
        self.steps = 0

    def special(self, name: str, threads: Array) -> Array:
        """A special register; blocks and the grid have one dimension."""
        register, _, axis = name.partition(".")
        if axis in ("y", "z"):
            return np.full(len(threads), register in ("%ntid", "%nctaid"), np.uint32)
        values = {
            "%tid": threads % self.threads,
            "%ctaid": threads // self.threads,
            "%ntid": np.full(len(threads), self.threads),
            "%nctaid": np.full(len(threads), self.blocks),
            "%laneid": threads % WARP,
        }
        return values[register].astype(np.uint32)

    def run(self) -> None:
        actions = compiled(self.kernel)
        with np.errstate(all="ignore"):
            while True:
                runnable = np.where(self.waits, LAST, self.place)
                place = int(runnable.min())
                if place == LAST:
                    if self.waits.any():
                        raise Fault(f"{self.kernel.name}: threads wait at a barrier for others that never come")
                    return
                chosen = np.flatnonzero(runnable == place)
                group = Group(chosen, len(chosen) == len(self.all))
                others = runnable[runnable > place]
                self._go(actions, group, place, int(others.min()) if len(others) else LAST)

    def _go(self, actions: list[Action], group: Group, place: int, until: int) -> None:
        """Let a group take statements until it stands where others do, or it parts."""
        while place < until:
            if place == len(actions):
                raise Fault(f"{self.kernel.name}: runs on behind its last statement")
            self.place[group.index] = place + 1
            statement, acting = self.kernel.statements[place], group
            self.steps += 1
            if self.steps > MOST_STEPS:
                raise Fault(f"{self.kernel.name}: does not come to an end")
            if statement.guard is not None:
                condition = self.registers[statement.guard.index][group.index] != statement.negated
                acting = group.where(condition)
            if len(acting.threads):
                try:
                    actions[place](self, acting)
                except Fault as fault:
                    raise Fault(f"{self.kernel.name}, {statement.text}: {fault}") from None
            if statement.name in ("bra", "ret", "exit", "bar"):
                next_ = self.place[group.index]
                if statement.name != "bra" or (next_ != next_[0]).any():
                    return
                place = int(next_[0])
            else:
                place += 1

    def meet(self, threads: Array | None = None) -> None:
        """Let the blocks go on of which all threads that have not ended wait."""
        if threads is not None:
            self.waits[threads] = True
        ended, waits = (self.place == LAST).reshape(self.blocks, -1), self.waits.reshape(self.blocks, -1)
        ready = np.repeat((ended | waits).all(1), self.threads) & self.waits
        lanes = (self.blocks * -(-self.threads // WARP), -1)
        first, last = np.where(ready, self.place, LAST).reshape(lanes), np.where(ready, self.place, -1).reshape(lanes)
        if (ready.reshape(lanes).any(1) & (first.min(1) != last.max(1))).any():
            raise Fault("a barrier of the block that parts of a warp take in different places")
        self.clock.block[ready] += 1
        self.clock.warp[ready] += 1
        self.waits[ready] = False

    def warps(self, group: Group, what: str) -> Array:
        """[warps, 32] threads of a group, which must be whole warps."""
        if len(group.threads) % WARP or (group.threads.reshape(-1, WARP) % WARP != LANES).any():
            raise Fault(f"{what} by a part of a warp")
        return group.threads.reshape(-1, WARP)


def run(
    kernel: Kernel, blocks: int, params: bytes, allowed: Iterable[tuple[int, int]], shared: int = 0, seed: int = 0
) -> None:
    """Launch a kernel and wait for it.

    params: the bytes of its parameters. allowed: begin and end of global memory. shared: bytes of shared memory beyond
    the kernel's own. seed: of the order in which threads of one statement get at an atomic operation.

    Raises:
        Fault: the kernel does what it must not.
    """
    Launch(kernel, blocks, params, allowed, shared, seed).run()


@functools.cache
def compiled(kernel: Kernel) -> list[Action]:
    return [action(statement, kernel) for statement in kernel.statements]


def instruction(*names: str):
    """Register what makes an action of statements of a name."""

    def register(make):
        ACTIONS.update(dict.fromkeys(names, make))
        return make

    return register


ROUNDINGS, SPACES = "rn rz rm rp ", "global shared local param "
COMPARISONS = "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor "
MODIFIERS = {  # of each instruction, those that mean something here, its types apart
    **dict.fromkeys(("add", "sub", "mul", "fma"), ROUNDINGS + "ftz lo hi wide"),
    **dict.fromkeys(("div", "rcp", "sqrt", "rsqrt", "ex2", "lg2"), "rn approx full ftz"),
    **dict.fromkeys(("min", "max"), "ftz NaN"),
    **dict.fromkeys(("abs", "neg"), "ftz"),
    "mad": "lo wide hi",
    "setp": COMPARISONS,
    "cvt": ROUNDINGS + "rni rzi rmi rpi ftz sat",
    "cvta": SPACES + "to",
    "ld": SPACES + "v2 v4 ca cg cs nc",
    "st": SPACES + "v2 v4 wb cs",
    "atom": SPACES + "gpu acq_rel add",
    "membar": "gl cta",
    "fence": "acq_rel gpu cta",
    "bra": "uni",
    "bar": "sync warp",
    "shfl": "sync bfly",
    "redux": "sync max min add",
    "ldmatrix": "sync aligned m8n8 x1 x2 x4 trans " + SPACES,
    "stmatrix": "sync aligned m8n8 x1 x2 x4 " + SPACES,
    "mma": "sync aligned m16n8k16 row col",
}
OPERANDS = {  # of those that compute, the result included
    **dict.fromkeys(("fma", "mad", "prmt", "bfe", "selp"), 4),
    **dict.fromkeys(("add", "sub", "mul", "div", "min", "max", "copysign", "rem", "and", "or", "xor", "shl", "shr"), 3),
    **dict.fromkeys(("rcp", "sqrt", "rsqrt", "ex2", "lg2", "abs", "neg", "not", "cvta", "mov"), 2),
    **dict.fromkeys(("bfi", "lop3"), 5),
}


def action(statement: Statement, kernel: Kernel) -> Action:
    make = ACTIONS.get(statement.name)
    if make is None:
        raise NotImplementedError(f"{statement.text}: this instruction is not known here")
    if unknown := set(statement.modifiers) - set(MODIFIERS.get(statement.name, "").split()) - set(BITS):
        raise NotImplementedError(f"{statement.text}: .{min(unknown)} is not known here")
    if len(statement.operands) != OPERANDS.get(statement.name, len(statement.operands)):
        raise NotImplementedError(f"{statement.text}: not known here with so many operands")
    try:
        return make(statement, kernel)
    except (KeyError, AssertionError, ValueError, TypeError) as error:
        raise NotImplementedError(f"{statement.text}: not known here in this form: {error!r}") from error


# ---------------------------------------------------------------- operands


def reader(operand: Operand, type_: str, kernel: Kernel) -> Callable[[Launch, Group], Array]:
    """What gets an operand's values as numbers of a type."""
    dtype = DTYPES[type_]
    if isinstance(operand, Register):
        index, bits = operand.index, kernel.registers[operand.index]
        if type_ == "pred" or bits == 8 * dtype.itemsize:
            return lambda launch, group: launch.registers[index][group.index].view(dtype)
        assert bits > 8 * dtype.itemsize, "an operand of too few bits"
        unsigned = UNSIGNED[dtype.itemsize]
        return lambda launch, group: launch.registers[index][group.index].astype(unsigned).view(dtype)
    if isinstance(operand, Float):
        constant = np.array([operand.bits], f"u{dtype.itemsize}").view(dtype)
    elif isinstance(operand, int):
        if dtype.kind == "b":
            constant = np.array([bool(operand)])
        else:
            assert dtype.kind != "f", "an integer for a floating number"
            constant = np.array([operand % (1 << 8 * dtype.itemsize)], f"u{dtype.itemsize}").view(dtype)
    elif isinstance(operand, Symbol) and operand.name.startswith("%"):
        name = operand.name
        assert name.partition(".")[0] in ("%tid", "%ctaid", "%ntid", "%nctaid", "%laneid")
        return lambda launch, group: launch.special(name, group.threads).astype(dtype)
    else:
        assert isinstance(operand, Symbol)
        constant = np.array([kernel.offset(operand.name)]).astype(dtype)
    return lambda launch, group: constant


def writer(operand: Operand, type_: str, kernel: Kernel) -> Callable[[Launch, Group, Array], None]:
    """What puts numbers of a type into a register: in a wider one, integers keep their values."""
    assert isinstance(operand, Register), "not a register to write to"
    index, bits, dtype = operand.index, kernel.registers[operand.index], DTYPES[type_]
    unsigned = np.dtype(bool) if bits == 1 else np.dtype(UNSIGNED[bits // 8])

    def write(launch: Launch, group: Group, values: Array) -> None:
        assert values.dtype == dtype, f"{values.dtype} for {dtype}"
        same = dtype.itemsize == unsigned.itemsize
        launch.registers[index][group.index] = values.view(unsigned) if same else values.astype(unsigned)

    return write


def address_of(operand: Operand, kernel: Kernel) -> Callable[[Launch, Group], Array]:
    assert isinstance(operand, Address)
    base, offset = operand.base, operand.offset
    if isinstance(base, Register):
        bits, index = kernel.registers[base.index], base.index
        assert bits in (32, 64)
        dtype = UNSIGNED[bits // 8]
        moved = dtype(offset % (1 << bits))
        return lambda launch, group: (launch.registers[index][group.index] + moved).astype(np.uint64)
    place = base if isinstance(base, int) else kernel.offset(base.name)
    return lambda launch, group: np.full(len(group.threads), place + offset, np.uint64)


def each(read: Callable[[Launch, Group], Array], launch: Launch, group: Group) -> Array:
    """What a reader gets, also of a constant, for each thread of a group."""
    return np.broadcast_to(read(launch, group), group.threads.shape)


def listed(operand: Operand) -> tuple[Operand, ...]:
    """The members of a vector, or the operand alone."""
    return operand if isinstance(operand, tuple) else (operand,)


def compute(function, to: Operand, to_type: str, from_: Iterable[tuple[Operand, str]], kernel: Kernel) -> Action:
    """An action that puts a function of operands into a register."""
    write, reads = writer(to, to_type, kernel), [reader(operand, type_, kernel) for operand, type_ in from_]
    dtype = DTYPES[to_type]

    def act(launch: Launch, group: Group) -> None:
        write(launch, group, np.asarray(function(*(read(launch, group) for read in reads))).astype(dtype, copy=False))

    return act


# ---------------------------------------------------------------- arithmetic


@instruction(
    "add", "sub", "mul", "fma", "div", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "min", "max", "abs", "neg", "copysign"
)
def _numbers(statement: Statement, kernel: Kernel) -> Action:
    type_, (to, *from_) = statement.type, statement.operands
    if type_ not in FLOATS and type_ not in PAIRS:
        return _integers(statement, kernel)
    assert type_ == "f32" or not {"rz", "rm", "rp", "ftz", "approx"} & set(statement.modifiers)
    function = arithmetic.number_function(statement)
    if type_ in PAIRS:
        function = arithmetic.in_pairs(function, PAIRS[type_])
    return compute(function, to, type_, [(operand, type_) for operand in from_], kernel)


@instruction("rem", "mad", "and", "or", "xor", "not", "shl", "shr", "prmt", "bfe", "bfi", "lop3")
def _integers(statement: Statement, kernel: Kernel) -> Action:
    function, type_, result = arithmetic.whole_function(statement)
    to, *from_ = statement.operands
    if statement.name == "lop3":
        from_ = from_[:-1]
    types = [type_] * len(from_)
    if statement.name in ("shl", "shr"):
        types[1] = "u32"
    elif statement.name in ("bfe", "bfi"):
        types[-2:] = ["u32"] * 2
    elif statement.name == "mad":
        types[2] = result
    return compute(function, to, result, zip(from_, types, strict=True), kernel)


@instruction("setp")
def _setp(statement: Statement, kernel: Kernel) -> Action:
    to, *from_ = statement.operands
    types = [statement.type, statement.type, "pred"][: len(from_)]
    return compute(arithmetic.comparison(statement), to, "pred", zip(from_, types, strict=True), kernel)


@instruction("selp")
def _selp(statement: Statement, kernel: Kernel) -> Action:
    to, first, second, condition = statement.operands
    type_ = statement.type
    return compute(
        lambda x, y, p: np.where(p, x, y), to, type_, [(first, type_), (second, type_), (condition, "pred")], kernel
    )


@instruction("cvt")
def _cvt(statement: Statement, kernel: Kernel) -> Action:
    to_type, *types = [modifier for modifier in statement.modifiers if modifier in BITS]
    to, *from_ = statement.operands
    if len(from_) == 2:
        function = arithmetic.paired(to_type, "rz" if "rz" in statement.modifiers else "rn")
        return compute(function, to, "b32", [(operand, types[0]) for operand in from_], kernel)
    return compute(arithmetic.conversion(statement), to, to_type, [(from_[0], types[0])], kernel)


@instruction("cvta")
def _cvta(statement: Statement, kernel: Kernel) -> Action:
    space = next(modifier for modifier in statement.modifiers if modifier in ("global", "shared", "local"))
    window = np.uint64({"global": 0, "shared": SHARED, "local": LOCAL}[space])
    to, from_ = statement.operands
    away = "to" in statement.modifiers
    return compute(lambda x: x - window if away else x + window, to, "u64", [(from_, "u64")], kernel)


@instruction("mov")
def _mov(statement: Statement, kernel: Kernel) -> Action:
    to, from_ = statement.operands
    type_ = statement.type
    whole = f"u{BITS[type_]}" if type_ != "pred" else type_
    if isinstance(from_, tuple):
        part = f"u{BITS[type_] // len(from_)}"
        dtype = DTYPES[whole]

        def joined(*parts: Array) -> Array:
            return sum(value.astype(dtype) << dtype.type(i * BITS[part]) for i, value in enumerate(parts))

        return compute(joined, to, whole, [(operand, part) for operand in from_], kernel)
    if isinstance(to, tuple):
        bits = BITS[type_] // len(to)
        read, dtype = reader(from_, whole, kernel), DTYPES[whole]
        writes = [None if operand == Symbol("_") else writer(operand, f"u{bits}", kernel) for operand in to]

        def act(launch: Launch, group: Group) -> None:
            value = read(launch, group)
            for i, write in enumerate(writes):
                if write:
                    write(launch, group, (value >> dtype.type(i * bits)).astype(f"u{bits // 8}"))

        return act
    return compute(lambda x: x, to, whole, [(from_, whole)], kernel)


# ---------------------------------------------------------------- memory


def access(statement: Statement) -> tuple[str, int, int]:
    """Space, bytes of a number and how many of them of a load or store."""
    space = next((modifier for modifier in statement.modifiers if modifier in SPACES.split()), "")
    count = next((int(m[1:]) for m in statement.modifiers if m in ("v2", "v4")), 1)
    return space, BITS[statement.type] // 8, count


@instruction("ld")
def _ld(statement: Statement, kernel: Kernel) -> Action:
    space, width, count = access(statement)
    to, from_ = statement.operands
    writes = [writer(register, statement.type, kernel) for register in listed(to)]
    assert len(writes) == count
    dtype = DTYPES[statement.type]
    address, unchanging = address_of(from_, kernel), "nc" in statement.modifiers
    if space == "param":

        def load_param(launch: Launch, group: Group) -> None:
            begin = int(address(launch, group)[0])  # the same for all
            for i, write in enumerate(writes):
                write(launch, group, launch.params[begin + i * width : begin + (i + 1) * width].view(dtype))

        return load_param

    def act(launch: Launch, group: Group) -> None:
        values = launch.memory.load(space, address(launch, group), group.threads, width, count, unchanging)
        for write, value in zip(writes, values, strict=True):
            write(launch, group, value.view(dtype))

    return act


@instruction("st")
def _st(statement: Statement, kernel: Kernel) -> Action:
    space, width, count = access(statement)
    to, from_ = statement.operands
    reads = [reader(operand, statement.type, kernel) for operand in listed(from_)]
    assert len(reads) == count
    address = address_of(to, kernel)

    def act(launch: Launch, group: Group) -> None:
        values = np.stack([each(read, launch, group).view(UNSIGNED[width]) for read in reads])
        launch.memory.store(space, address(launch, group), group.threads, values)

    return act


@instruction("atom")
def _atom(statement: Statement, kernel: Kernel) -> Action:
    space, width, _ = access(statement)
    to, where, value = statement.operands
    assert space == "global" and "add" in statement.modifiers and statement.type[0] in "us"
    type_, address = f"u{8 * width}", address_of(where, kernel)
    read, write, orders = reader(value, type_, kernel), writer(to, type_, kernel), "acq_rel" in statement.modifiers

    def act(launch: Launch, group: Group) -> None:
        addresses, values = address(launch, group), each(read, launch, group)
        before = np.empty_like(values)
        for i in launch.random.permutation(len(values)):
            thread = int(group.threads[i])
            before[i] = launch.memory.add(space, int(addresses[i]), thread, values[i], orders)
        write(launch, group, before)

    return act


@instruction("membar", "fence")
def _membar(statement: Statement, kernel: Kernel) -> Action:
    between_blocks = bool({"gl", "gpu", "sys"} & set(statement.modifiers))

    def act(launch: Launch, group: Group) -> None:
        for thread in group.threads if between_blocks else ():
            launch.clock.fence(int(thread))

    return act


# ---------------------------------------------------------------- control


@instruction("bra")
def _bra(statement: Statement, kernel: Kernel) -> Action:
    (target,) = statement.operands
    assert isinstance(target, Symbol)
    place = kernel.labels[target.name]

    def act(launch: Launch, group: Group) -> None:
        launch.place[group.index] = place

    return act


@instruction("ret", "exit")
def _ret(statement: Statement, kernel: Kernel) -> Action:
    def act(launch: Launch, group: Group) -> None:
        launch.place[group.index] = LAST
        launch.meet()

    return act


@instruction("bar")
def _bar(statement: Statement, kernel: Kernel) -> Action:
    if "warp" in statement.modifiers:
        assert statement.operands in ((-1,), (0xFFFFFFFF,))

        def sync(launch: Launch, group: Group) -> None:
            launch.warps(group, "a barrier of a warp")
            launch.clock.warp[group.index] += 1

        return sync
    assert "sync" in statement.modifiers and statement.operands[0] == 0
    assert statement.operands[1:] in ((), (kernel.threads,))

    return lambda launch, group: launch.meet(group.threads)


# ---------------------------------------------------------------- warps


@instruction("shfl")
def _shfl(statement: Statement, kernel: Kernel) -> Action:
    to, value, lane, clamp, mask = statement.operands
    assert "bfly" in statement.modifiers and clamp == 31 and mask in (-1, 0xFFFFFFFF) and isinstance(lane, int)
    read, write = reader(value, "b32", kernel), writer(to, "b32", kernel)

    def act(launch: Launch, group: Group) -> None:
        launch.warps(group, "a shuffle")
        values = each(read, launch, group).reshape(-1, WARP)
        write(launch, group, values[:, LANES ^ lane].reshape(-1))

    return act


@instruction("redux")
def _redux(statement: Statement, kernel: Kernel) -> Action:
    to, value, mask = statement.operands
    of_mask = reader(mask, "b32", kernel)
    function = {"max": np.max, "min": np.min, "add": np.sum}[statement.modifiers[1]]
    type_ = statement.type
    read, write = reader(value, type_, kernel), writer(to, type_, kernel)

    def act(launch: Launch, group: Group) -> None:
        launch.warps(group, "a reduction")
        if (of_mask(launch, group) != 0xFFFFFFFF).any():
            raise Fault("a reduction over a part of a warp")
        values = each(read, launch, group).reshape(-1, WARP)
        write(launch, group, np.repeat(function(values, axis=1), WARP).astype(DTYPES[type_]))

    return act


@instruction("ldmatrix", "stmatrix")
def _matrix(statement: Statement, kernel: Kernel) -> Action:
    """8 x 8 matrices of 16 bits: lane i says where row i % 8 of matrix i / 8 is.

    It has columns 2 (i % 4) and 2 (i % 4) + 1 of row i / 4; with `trans`, of the transposed matrices.
    """
    assert "m8n8" in statement.modifiers and statement.type == "b16"
    transposed = "trans" in statement.modifiers
    count = int(next(modifier for modifier in statement.modifiers if modifier in ("x1", "x2", "x4"))[1:])
    loads = statement.name == "ldmatrix"
    registers, where = statement.operands if loads else statement.operands[::-1]
    address_of_row = address_of(where, kernel)

    def rows(launch: Launch, group: Group) -> tuple[Array, Array]:
        """[warps, 8 * count] addresses of rows, and the threads that give them."""
        threads = launch.warps(group, "a move of matrices")
        return address_of_row(launch, group).reshape(-1, WARP)[:, : 8 * count], threads[:, : 8 * count]

    if loads:
        writes = [writer(register, "b32", kernel) for register in listed(registers)]

        def load(launch: Launch, group: Group) -> None:
            address, thread = rows(launch, group)
            words = launch.memory.load("shared", address.reshape(-1), thread.reshape(-1), 4, 4)
            # A row's four words are those of four lanes.
            matrices = np.ascontiguousarray(words.T).view(np.uint16).reshape(len(address), count, 8, 8)
            if transposed:
                matrices = np.ascontiguousarray(matrices.swapaxes(-1, -2))
            for i, write in enumerate(writes):
                write(launch, group, np.ascontiguousarray(matrices[:, i]).reshape(-1).view(np.uint32))

        return load
    assert not transposed
    reads = [reader(register, "b32", kernel) for register in listed(registers)]

    def store(launch: Launch, group: Group) -> None:
        address, thread = rows(launch, group)
        lanes = [each(read, launch, group).reshape(-1, 8, 4) for read in reads]
        words = np.stack(lanes, 1).reshape(-1, 4)
        launch.memory.store("shared", address.reshape(-1), thread.reshape(-1), np.ascontiguousarray(words.T))

    return store


@instruction("mma")
def _mma(statement: Statement, kernel: Kernel) -> Action:
    """d = a @ b + c, [16, 8] = [16, 16] @ [16, 8] + [16, 8], float16 to float32.

    Sums are off by parts of 2^-22 of their largest term: tensor cores cut off what does not fit beside it.
    """
    shape, types = statement.modifiers[2], [modifier for modifier in statement.modifiers if modifier in BITS]
    assert shape == "m16n8k16" and types == ["f32", "f16", "f16", "f32"]
    d, *abc = statement.operands
    assert isinstance(d, tuple)
    writes = [writer(register, "f32", kernel) for register in d]
    a, b, c = (
        [reader(register, type_, kernel) for register in registers]
        for registers, type_ in zip(abc, ("b32", "b32", "f32"), strict=True)
        if isinstance(registers, tuple)
    )
    row, column = LANES // 4, LANES % 4 * 2

    def act(launch: Launch, group: Group) -> None:
        warps = len(launch.warps(group, "a product of matrices"))

        def lanes(read) -> Array:
            return each(read, launch, group).reshape(warps, WARP)

        def halves(read) -> Array:
            pairs = np.ascontiguousarray(lanes(read)).view(np.float16).reshape(warps, WARP, 2)
            return pairs.astype(np.float64)

        left, right = np.empty((warps, 16, 16)), np.empty((warps, 16, 8))
        start = np.empty((warps, 16, 8))
        for i, read in enumerate(a):
            for k in range(2):
                left[:, row + 8 * (i % 2), column + 8 * (i // 2) + k] = halves(read)[..., k]
        for i, read in enumerate(b):
            for k in range(2):
                right[:, column + 8 * i + k, row] = halves(read)[..., k]
        for i, read in enumerate(c):
            start[:, row + 8 * (i // 2), column + i % 2] = lanes(read)
        terms = left[:, :, :, None] * right[:, None]
        largest = np.maximum(np.abs(terms).max(2), np.abs(start))
        exact = terms.sum(2) + start
        off = np.sin(1e4 * exact) * 2.0**-22 * largest
        total = (exact + np.where(np.isfinite(off), off, 0)).astype(np.float32)
        for i, write in enumerate(writes):
            write(launch, group, total[:, row + 8 * (i // 2), column + i % 2].reshape(-1))

    return act
