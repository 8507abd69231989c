"""What bench/gpu.sh, which needs a GPU to run, names without one."""

import re
from pathlib import Path

import pytest
import torch

from lopt.bench import gpu, step

ROOT = Path(__file__).parents[2]


def test_the_tests_that_the_script_runs_are_there() -> None:
    paths = re.findall(r"\btests/[\w./]+", (ROOT / "bench" / "gpu.sh").read_text())
    assert len(paths) >= 4
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_a_case_has_the_shapes_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(gpu.shapes("100 tensors")) == 100
    with pytest.raises(ValueError, match="no benchmark case 'resnet9'; there are 1k, .*, 100 tensors, resnet50"):
        step.shapes_of("resnet9")


def test_competitors_are_torchs_fused_and_foreach_adamw_that_step_without_a_gpu() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    makes = gpu.contenders()
    foreach = makes["adamw foreach"]([param])
    assert not foreach.defaults["capturable"] and foreach.defaults["foreach"]
    foreach.step()
    assert makes["adamw fused"]([param]).defaults["capturable"]
