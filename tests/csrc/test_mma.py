"""The tensor cores' instructions as csrc/gpu_mma.h emulates them: layouts of the PTX manual, and a product of matrices.

The formulas for a lane's registers are those of the PTX ISA 8.7, "Matrix Fragments for mma.m16n8k16 with floating point
type" and "ldmatrix", written here once more: a kernel that agrees with the emulation agrees with them.
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
LANES = range(32)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    path = tmp_path_factory.mktemp("mma") / "mma"
    command = ["g++", "-std=c++17", "-O1", f"-I{CSRC}", str(HERE / "mma.cpp"), "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return path


def row_of_a(lane: int, i: int) -> int:
    return lane // 4 if 0 <= i < 2 or 4 <= i < 6 else lane // 4 + 8


def column_of_a(lane: int, i: int) -> int:
    return lane % 4 * 2 + (i & 1) + (0 if i < 4 else 8)


def row_of_b(lane: int, i: int) -> int:
    return lane % 4 * 2 + (i & 1) + (0 if i < 2 else 8)


def row_of_c(lane: int, i: int) -> int:
    return lane // 4 if i < 2 else lane // 4 + 8


def column_of_c(lane: int, i: int) -> int:
    return lane % 4 * 2 + (i & 1)


def test_emulated_instructions_have_the_layouts_of_the_manual(program):
    random = np.random.default_rng(0)
    a, b = (random.normal(size=shape).astype(np.float16) for shape in ((16, 16), (16, 8)))
    c = random.normal(size=(16, 8)).astype(np.float32)
    of_a = np.array([[a[row_of_a(lane, i), column_of_a(lane, i)] for i in range(8)] for lane in LANES])
    of_b = np.array([[b[row_of_b(lane, i), lane // 4] for i in range(4)] for lane in LANES])
    of_c = np.array([[c[row_of_c(lane, i), column_of_c(lane, i)] for i in range(4)] for lane in LANES])
    rows = random.normal(size=(32, 8)).astype(np.float16)
    addresses = random.permutation(32).astype(np.int32)  # which row each lane points to
    numbers = np.array([1.5, -(2.0**-24), 0.1, 65519.0, 1e30, -np.inf, np.nan, -70000.0], dtype=np.float32)
    text = b"".join(array.tobytes() for array in (of_a, of_b, of_c, rows, addresses, numbers))
    done = subprocess.run([program], input=text, check=True, capture_output=True).stdout
    sums, registers, halves = done[:512], done[512:1024], done[1024:]

    product = np.empty((16, 8))
    for lane, values in enumerate(np.frombuffer(sums, np.float32).reshape(32, 4)):
        for i, value in enumerate(values):
            product[row_of_c(lane, i), column_of_c(lane, i)] = value
    terms = np.abs(a).astype(np.float64) @ np.abs(b) + np.abs(c)  # 16 roundings of sums no larger than these
    assert np.all(np.abs(product - (a.astype(np.float64) @ b + c)) <= 16 * 2.0**-24 * terms)

    for lane, values in enumerate(np.frombuffer(registers, np.float16).reshape(32, 4, 2)):
        for matrix in range(4):
            row = rows[addresses[8 * matrix + lane // 4]]
            assert np.array_equal(values[matrix], row[[lane % 4 * 2, lane % 4 * 2 + 1]])

    right = np.array([1.5, -(2.0**-24), 0.1, 65504.0, 65504.0, -65504.0, -65504.0, -65504.0], dtype=np.float16)
    assert np.array_equal(np.frombuffer(halves, np.float16), right)
