"""The benchmark of meta-training: its rows, and what it measures. No timing is asserted."""

import subprocess
import sys

import pytest
import torch

from lopt import HRNNConfig, MetaParams, cli
from lopt.bench import meta
from lopt.bench.results import load
from lopt.meta import recipe as recipes
from lopt.meta.estimators import TruncatedBPTT
from lopt.meta.recipe import Recipe, Stage
from lopt.meta.tasks import paper
from lopt.meta.unroll import Draw
from lopt.train.group import Group

COMMON = {"mixes": lambda: [[paper.Quadratic(4)], [paper.Bowl(5.0)]], "rows": 4, "unroll": Draw(3), "episode": Draw(9)}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    stages = (
        Stage("first", 1, estimator="bptt", lr=1.0, **COMMON),
        Stage("then", 1, estimator="pes", lr=1.0, **COMMON),
    )
    recipe = Recipe(HRNNConfig(level_sizes=(3, 3, 3), timescales=2, ms_eps=1e-24), stages, 1)
    monkeypatch.setitem(recipes.RECIPES, "default", recipe)
    return recipe


def test_every_stage_appends_its_speed_and_memory(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    assert cli.main(["bench", "meta", "--rounds", "2", "--rows", "2", "4", "--out", str(out)]) == 0
    rows = load(out)
    found = {(row.op, row.case, row.unit) for row in rows}
    assert found == {
        (op, f"{stage} x{count}", unit)
        for op, stage in (("meta bptt", "first"), ("meta pes", "then"))
        for count in (2, 4)
        for unit in ("task-steps/s", "B/parameter-step")
    }
    for row in rows:
        speed = row.unit == "task-steps/s"
        assert (row.p50 > 0) == (speed or row.op == "meta bptt")
        assert row.n == int(row.case[-1]) * 6 and row.tensors == 2
    assert "task-steps/s" in capsys.readouterr().out
    assert cli.main(["bench", "meta", "--stages", "last", "--out", str(out)]) == 2
    assert "has first, then" in capsys.readouterr().err


def test_saved_bytes_are_per_parameter_and_step(tiny):
    """Twice as many steps save twice as much, and at least the hidden states of each step."""
    stage = tiny.stages[0]
    few, many = (
        meta.saved_bytes(meta.prepare(tiny, stage, 8, torch.device("cpu"))._replace(steps=steps)) for steps in (4, 40)
    )
    assert few > 4 * tiny.config.hidden_size
    assert many == pytest.approx(few, rel=0.3)  # what is saved once per unroll counts for less
    bench = meta.prepare(tiny, stage, 8, torch.device("cpu"))
    assert isinstance(bench.estimator, TruncatedBPTT) and isinstance(bench.meta, MetaParams)


def test_processes_share_out_the_rows(tmp_path):
    out = tmp_path / "rows.csv"
    options = ["--stages", "evolve", "--rows", "4", "--rounds", "1", "--budget", "0", "--out", str(out)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "lopt", "bench", "meta", *options], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    speed, memory = load(out)  # written once
    assert (speed.backend, speed.threads, speed.case) == ("hrnn PES, 2 processes", 2, "evolve x4")
    assert speed.p50 > 0 and memory.p50 == 0


def test_rows_that_processes_cannot_share_are_refused(tiny):
    with pytest.raises(ValueError, match="--rows 6: 2 processes need a multiple of 4"):
        meta.prepare(tiny, tiny.stages[1], 6, torch.device("cpu"), Group(0, 2))
