"""What the instructions of PTX that compute something compute, over arrays of threads.

The approximations (ex2, lg2, rcp, rsqrt, sqrt, div.full) are off by what the manual allows: by a part of the bound that
depends on the operand's bits, in either direction; results that float32 has exactly are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .memory import UNSIGNED, Array
from .source import BITS, Statement

Function = Callable[..., Any]
DTYPES = {f"s{8 * size}": np.dtype(f"i{size}") for size in UNSIGNED}
DTYPES |= {f"{kind}{8 * size}": np.dtype(f"u{size}") for size in UNSIGNED for kind in "bu"}
DTYPES |= {f"f{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)}
DTYPES |= {"bf16": DTYPES["b16"], "f16x2": DTYPES["b32"], "bf16x2": DTYPES["b32"], "f32x2": DTYPES["b64"]}
DTYPES["pred"] = np.dtype(bool)
PAIRS = {"f16x2": DTYPES["f16"], "f32x2": DTYPES["f32"]}
FLOATS = ("f16", "f32", "f64")
TINY = np.float32(2.0**-126)


def flushed(x: Array) -> Array:
    """Subnormal numbers as zero of their sign."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def rounded(x: Array, mode: str, dtype: np.dtype) -> Array:
    """float64 to another dtype: to nearest even, down, up or towards zero."""
    near = x.astype(dtype)
    if mode == "rn":
        return near
    below = np.where(near > x, np.nextafter(near, dtype.type(-np.inf)), near)
    above = np.where(near < x, np.nextafter(near, dtype.type(np.inf)), near)
    return {"rm": below, "rp": above, "rz": np.where(x < 0, above, below)}[mode]


def to_bf16(x: Array, mode: str) -> Array:
    """float32 to the bits of a bfloat16."""
    bits = x.view(np.uint32)
    up = 0x7FFF + ((bits >> 16) & 1) if mode == "rn" else 0
    return np.where(np.isnan(x), 0x7FFF, (bits + up) >> 16).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def approximate(function: Function, relative: float, absolute: float = 0.0) -> Function:
    """A function of float64 as one of float32 that is off by parts of its bounds."""

    def of(x: Array, *others: Array) -> Array:
        exact = function(x.astype(np.float64), *(other.astype(np.float64) for other in others))
        near = exact.astype(np.float32)
        part = (x.view(np.uint32) * np.uint32(2654435761)).astype(np.float64) / 2**31 - 1
        off = exact + part * (relative * np.abs(exact) + absolute)
        return np.where((near == exact) | ~np.isfinite(near), near, off.astype(np.float32))

    return of


def logarithm(x: Array) -> Array:
    near_one = (x > 0.5) & (x < 2)
    return np.where(near_one, approximate(np.log2, 0, 2.0**-22)(x), approximate(np.log2, 2.0**-22)(x))


def quotient(x: Array, y: Array) -> Array:
    return x / y


APPROXIMATE = {
    "ex2": approximate(np.exp2, 2.0**-22),
    "lg2": logarithm,
    "rcp": approximate(np.reciprocal, 2.0**-23),
    "rsqrt": approximate(lambda x: 1 / np.sqrt(x), 2.0**-22.9),
    "sqrt": approximate(np.sqrt, 2.0**-23),
    "div": approximate(quotient, 2.0**-22),
}


def rough_quotient(x: Array, y: Array) -> Array:
    """div.approx, which is 0 by numbers beyond 2^126."""
    beyond = np.isfinite(y) & (np.abs(y) > np.float32(2.0**126))
    return np.where(beyond, np.copysign(np.float32(0), x * y), APPROXIMATE["div"](x, y))


EXACT = {"rcp": np.reciprocal, "sqrt": np.sqrt, "div": quotient, "add": np.add, "sub": np.subtract, "mul": np.multiply}
BINARY = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def whole_quotient(x: Array, y: Array) -> Array:
    """Towards zero; by zero, all bits."""
    by = np.where(y == 0, 1, y).astype(y.dtype)
    down = x // by
    up = (down * by != x) & ((x < 0) != (by < 0))
    return np.where(y == 0, ~(x & 0), down + up.astype(x.dtype))


def remainder(x: Array, y: Array) -> Array:
    return np.where(y == 0, x, x - whole_quotient(x, y) * y).astype(x.dtype)


def wide(x: Array) -> Array:
    """Integers in twice as many bits."""
    return x.astype(f"{x.dtype.kind}{2 * x.dtype.itemsize}")


def high(x: Array, y: Array) -> Array:
    """The upper half of a product."""
    return (wide(x) * wide(y) >> 8 * x.dtype.itemsize).astype(x.dtype)


def shift(left: bool) -> Function:
    def by(x: Array, count: Array) -> Array:
        bits = 8 * x.dtype.itemsize
        most = np.minimum(count.astype(np.uint64), bits - 1).astype(x.dtype)
        moved = x << most if left else x >> most
        beyond = moved * 0 if left or x.dtype.kind == "u" else moved
        return np.where(count >= bits, beyond, moved).astype(x.dtype)

    return by


def permuted(x: Array, y: Array, selection: Array) -> Array:
    """prmt: each byte of the result is one of the eight of y and x, or its sign."""
    both = x.astype(np.uint64) | y.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(x)
    for byte in range(4):
        which = (selection.astype(np.uint64) >> np.uint64(4 * byte)) & np.uint64(15)
        value = (both >> (which & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        sign = np.where(value >> np.uint64(7) != 0, np.uint64(255), np.uint64(0))
        result |= (np.where(which >> np.uint64(3) != 0, sign, value) << np.uint64(8 * byte)).astype(np.uint32)
    return result


def extracted(x: Array, position: Array, length: Array) -> Array:
    """bfe: a field of bits as a number, of a signed one with its sign."""
    assert x.dtype.itemsize == 4
    begin, count = (np.minimum(value & 255, 32).astype(np.int64) for value in (position, length))
    mask = (np.int64(1) << count) - 1
    field = (x.astype(np.int64) >> begin) & mask
    if x.dtype.kind == "u":
        return field.astype(x.dtype)
    sign = (x.astype(np.int64) >> np.minimum(begin + count - 1, 31)) & (count > 0)
    return (field | -sign & ~mask).astype(x.dtype)


def inserted(x: Array, y: Array, position: Array, length: Array) -> Array:
    """bfi: the lowest bits of x into y."""
    assert x.dtype.itemsize == 4
    begin, count = (np.minimum(value & 255, 32).astype(np.uint64) for value in (position, length))
    mask = ((np.uint64(1) << count) - np.uint64(1)) << begin
    kept = y.astype(np.uint64) & ~mask
    return (kept | ((x.astype(np.uint64) << begin) & mask)).astype(y.dtype)


def looked_up(table: int) -> Function:
    """lop3: any function of three bits."""

    def of(x: Array, y: Array, z: Array) -> Array:
        result = np.zeros_like(x)
        for index in range(8):
            if table >> index & 1:
                bits = [value if index >> place & 1 else ~value for value, place in ((x, 2), (y, 1), (z, 0))]
                result |= bits[0] & bits[1] & bits[2]
        return result

    return of


COMPARE = {
    **dict.fromkeys(("eq", "equ"), np.equal),
    **dict.fromkeys(("ne", "neu"), np.not_equal),
    **dict.fromkeys(("lt", "ltu", "lo"), np.less),
    **dict.fromkeys(("le", "leu", "ls"), np.less_equal),
    **dict.fromkeys(("gt", "gtu", "hi"), np.greater),
    **dict.fromkeys(("ge", "geu", "hs"), np.greater_equal),
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
    "nan": lambda x, y: np.isnan(x) | np.isnan(y),
}


def comparison(statement: Statement) -> Function:
    name, combine = statement.modifiers[0], next((m for m in statement.modifiers if m in BINARY), None)
    compare, floats = COMPARE[name], statement.type in FLOATS

    def of(x: Array, y: Array, *condition: Array) -> Array:
        result = compare(x, y)
        if floats and name not in ("num", "nan"):
            unordered = np.isnan(x) | np.isnan(y)
            result = result | unordered if len(name) == 3 else result & ~unordered
        return BINARY[combine](result, *condition) if combine else result

    return of


def conversion(statement: Statement) -> Function:
    """cvt, from the last type to the one before."""
    to, from_ = (modifier for modifier in statement.modifiers if modifier in BITS)
    modes = {"rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi"}
    mode = next((modifier for modifier in statement.modifiers if modifier in modes), "rn")
    flush, saturate, dtype = "ftz" in statement.modifiers, "sat" in statement.modifiers, DTYPES[to]
    whole_from, whole_to = (type_[0] in "us" for type_ in (from_, to))
    assert mode == "rn" or not whole_from
    assert to != "bf16" or from_ == "f32"
    assert not whole_to or whole_from or (from_ != "f64" and BITS[to] <= 32)

    def of(x: Array) -> Array:
        if from_ == "bf16":
            x = from_bf16(x)
        if flush and x.dtype == np.float32:
            x = flushed(x)
        if to == "bf16":
            return to_bf16(x, mode)
        if to in FLOATS:
            if x.dtype.kind == "f":
                if mode.endswith("i"):
                    x = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x)
                if dtype.itemsize < x.dtype.itemsize:
                    x = rounded(x.astype(np.float64), mode, dtype)
            result = x.astype(dtype)
            if saturate:
                result = np.where(np.isnan(result), 0, np.clip(result, 0, 1)).astype(dtype)
            return flushed(result) if flush and to == "f32" else result
        if x.dtype.kind == "f":
            whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x.astype(np.float64))
            limits = np.iinfo(dtype)
            inside = np.where(np.isnan(whole) | (whole >= limits.max) | (whole <= limits.min), 0, whole).astype(dtype)
            result = np.where(whole >= limits.max, limits.max, np.where(whole <= limits.min, limits.min, inside))
            return result.astype(dtype)
        if saturate:
            limits = np.iinfo(dtype)
            x = np.clip(x, limits.min, limits.max)
        return x.astype(dtype)

    return of


def paired(to: str, mode: str) -> Function:
    """cvt of two numbers into the halves of a register, the first into the upper one."""

    def of(x: Array, y: Array) -> Array:
        if to == "bf16x2":
            upper, lower = to_bf16(x, mode), to_bf16(y, mode)
        else:
            upper, lower = (value.astype(np.float16).view(np.uint16) for value in (x, y))
        return upper.astype(np.uint32) << 16 | lower

    return of


def in_pairs(function: Function, part: np.dtype) -> Function:
    """A function of numbers for both halves of registers."""

    def of(*values: Array) -> Array:
        pairs = (np.ascontiguousarray(value).view(part).reshape(-1, 2) for value in values)
        return np.ascontiguousarray(function(*pairs)).view(values[0].dtype).reshape(-1)

    return of


def halves(x: Array) -> tuple[Array, Array]:
    """float64 as the sum of two numbers whose products are exact (Veltkamp)."""
    big = x * 134217729.0
    upper = big - (big - x)
    return upper, x - upper


def multiplied_and_added(mode: str) -> Function:
    """fma: of float32 by float64, whose own rounding before that to float32 matters in one case of 2^29.

    Of float64 the product's and the sum's roundings are added behind, which is right but for one case of 2^50 or so.
    """

    def of(x: Array, y: Array, z: Array) -> Array:
        if x.dtype == np.float32:
            return rounded(x.astype(np.float64) * y + z, mode, x.dtype)
        product = x * y
        (a, b), (c, d) = halves(x), halves(y)
        lost = ((a * c - product) + a * d + b * c) + b * d
        total = product + z
        back = total - product
        exact = total + ((product - (total - back)) + (z - back) + lost)
        return np.where(np.isfinite(exact), exact, total)

    return of


def number_function(statement: Statement) -> Function:
    """The function of a statement that computes with floating numbers of float32 or float64."""
    name, modifiers = statement.name, statement.modifiers
    mode = next((modifier for modifier in modifiers if modifier in ("rn", "rz", "rm", "rp")), "rn")
    if name == "div" and "approx" in modifiers:
        function = rough_quotient
    elif name in APPROXIMATE and ("approx" in modifiers or "full" in modifiers):
        function = APPROXIMATE[name]
    elif name == "fma":
        function = multiplied_and_added(mode)
    elif name in EXACT:
        nearest = EXACT[name]

        def function(*values: Array) -> Array:
            if mode == "rn":
                return nearest(*values)
            return rounded(nearest(*(value.astype(np.float64) for value in values)), mode, values[0].dtype)
    elif name in ("min", "max"):
        quiet = {"min": np.fmin, "max": np.fmax}
        function = {"min": np.minimum, "max": np.maximum}[name] if "NaN" in modifiers else quiet[name]
    else:
        function = {"abs": np.abs, "neg": np.negative, "copysign": lambda sign, size: np.copysign(size, sign)}[name]
    if "ftz" not in modifiers:
        return function
    return lambda *values: flushed(function(*map(flushed, values)))


def whole_function(statement: Statement) -> tuple[Function, str, str]:
    """The function of a statement that computes with integers, and the types of its operands and of its result."""
    name, modifiers, type_ = statement.name, statement.modifiers, statement.type
    assert type_ == "pred" or type_[0] in "us" or type_ in ("b16", "b32", "b64")
    unsigned = "pred" if type_ == "pred" else f"u{BITS[type_]}"
    doubled = f"{type_[0]}{2 * BITS[type_]}" if BITS[type_] < 64 else ""
    wrapping = {"add": np.add, "sub": np.subtract, "neg": lambda x: 0 - x, "not": np.invert, **BINARY}
    signed = {"min": np.minimum, "max": np.maximum, "abs": np.abs, "div": whole_quotient, "rem": remainder}
    if name in wrapping:
        return wrapping[name], unsigned, unsigned
    if name in signed:
        return signed[name], type_, type_
    if name in ("mul", "mad"):
        if "wide" in modifiers:
            product: Function = lambda x, y: wide(x) * wide(y)  # noqa: E731
        elif "hi" in modifiers:
            assert BITS[type_] < 64
            product = high
        else:
            product, type_ = np.multiply, unsigned
        of = product if name == "mul" else lambda x, y, z: product(x, y) + z.astype(product(x, y).dtype)
        return of, type_, doubled if "wide" in modifiers else type_
    if name in ("shl", "shr"):
        return shift(name == "shl"), type_, type_
    if name == "lop3":
        *_, table = statement.operands
        assert isinstance(table, int)
        return looked_up(table), type_, type_
    if name == "bfe":
        return extracted, type_, type_
    return {"prmt": permuted, "bfi": inserted}[name], unsigned, unsigned
