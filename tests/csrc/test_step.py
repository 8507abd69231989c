"""csrc/hrnn_step.h is one header for two compilers: what nvcc makes of it for the host are the bits that g++ makes."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
OPTIONS = ["-std=c++17", "-O1", f"-I{CSRC}", str(HERE / "step.cpp"), "-o"]


def output(compiler: list[str], program: Path) -> list[str]:
    subprocess.run([*compiler, *OPTIONS, program], check=True, capture_output=True, timeout=300)
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.slow
def test_nvcc_and_the_host_compiler_agree_bit_for_bit(tmp_path):
    for compiler in ("nvcc", "g++"):
        if shutil.which(compiler) is None:
            pytest.skip(f"{compiler} is not installed")
    ours = output(["g++"], tmp_path / "host")
    theirs = output(["nvcc", "-x", "cu", "-arch=sm_90", "-ccbin", "g++"], tmp_path / "cuda")
    values = [struct.unpack("!f", bytes.fromhex(line.split()[1]))[0] for line in ours]
    assert len(values) == 50 * 4 * (10 + 4 + 4 + 11 + 1 + 1 + 2 + 2)
    assert len(set(values)) > 0.9 * len(values) and all(abs(value) < 1e3 for value in values)
    assert ours == theirs
