"""What the script that reads machine code tells of the GPU kernels, all of which it has to be able to compile."""

import pytest

from lopt.backends import triton
from lopt.bench import sass

QUICK = ("prepare", "summarise", "apply", "meta share", "meta add_groups")  # the others take many seconds each


@pytest.mark.slow
@pytest.mark.skipif(triton.ABSENT is not None, reason=str(triton.ABSENT))
@pytest.mark.parametrize("name", QUICK)
def test_kernels_compile_without_a_gpu(name: str) -> None:
    code = sass.compile_kernel(sass.kernels()[name], 90)
    assert code.registers > 0
    assert code.spilled == 0
