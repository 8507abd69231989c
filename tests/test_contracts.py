"""What PyTorch's own suite asks of every optimizer (see tests/torch_suite.py), and what is usually put around one."""

import copy
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lopt import HRNN, HRNNConfig, MetaParams, backends

# Untrained meta-parameters take RMS-normalised steps of a known size: directions of losses are theirs to promise.
META = MetaParams.init(HRNNConfig(), seed=1)
ATTENTION = MetaParams.init(HRNNConfig(attention=True), seed=1)
BACKENDS = [
    name
    for name, reason in backends.available().items()
    if reason is None and backends.BACKENDS[name].device in ("*", "cpu")
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"maximize": True},
    {"lr": torch.tensor(0.5)},
    {"nonfinite": "raise", "capturable": True},
]

pytestmark = pytest.mark.filterwarnings("ignore:lr=.* multiplies the learned step")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def linear(contiguous: bool = True, seed: int = 0) -> tuple[nn.Parameter, nn.Parameter, Tensor]:
    """A weight [10, 5], a bias [10], and the input [5] of `quadratic`."""
    torch.manual_seed(seed)
    if contiguous:
        weight, bias = nn.Parameter(torch.randn(10, 5)), nn.Parameter(torch.randn(10))
    else:
        weight, bias = nn.Parameter(torch.randn(10, 5, 2)[..., 0]), nn.Parameter(torch.randn(10, 2)[..., 0])
    return weight, bias, torch.randn(5)


def quadratic(optimizer: HRNN, weight: Tensor, bias: Tensor, inputs: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = (weight.mv(inputs) + bias).square().sum()
    loss.backward()
    return loss


def assert_equal_state(left: HRNN, right: HRNN) -> None:
    for one, other in zip(left.param_groups, right.param_groups, strict=True):
        for a, b in zip(one["params"], other["params"], strict=True):
            assert torch.equal(a, b)
            assert left.state[a].keys() == right.state[b].keys()
            assert [name for name in left.state[a] if not torch.equal(left.state[a][name], right.state[b][name])] == []


# The contracts of torch.optim


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("schedulers", [[], ["step"], ["plateau"], ["step", "plateau"]], ids="+".join)
def test_the_loss_goes_the_right_way(
    backend: str, options: dict[str, Any], contiguous: bool, schedulers: list[str]
) -> None:
    weight, bias, inputs = linear(contiguous)
    optimizer = HRNN([weight, bias], meta=META, backend=backend, init_lr=1e-2, **copy.deepcopy(options))
    made = [
        lr_scheduler.StepLR(optimizer, gamma=0.9, step_size=10)
        if name == "step"
        else lr_scheduler.ReduceLROnPlateau(optimizer)
        for name in schedulers
    ]
    first = quadratic(optimizer, weight, bias, inputs).item()
    for _ in range(20):
        loss = optimizer.step(lambda: quadratic(optimizer, weight, bias, inputs))
        for scheduler in made:
            scheduler.step(loss.item()) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()
    last = quadratic(optimizer, weight, bias, inputs).item()
    assert last > first if options.get("maximize") else last < first


def test_groups_with_options_of_their_own_train_and_an_lr_of_nearly_zero_holds_still(backend: str) -> None:
    weight, bias, inputs = linear()
    still = nn.Parameter(torch.randn(2))
    before = still.detach().clone()
    groups = [{"params": [weight, bias], "lr": 1.0, "init_lr": 1e-2, "weight_decay": 0.1}, {"params": [still]}]
    optimizer = HRNN(groups, lr=1e-28, meta=META, backend=backend)
    first = quadratic(optimizer, weight, bias, inputs).item()
    for _ in range(20):
        quadratic(optimizer, weight, bias, inputs)
        still.grad = torch.rand_like(still)
        optimizer.step()
    assert quadratic(optimizer, weight, bias, inputs).item() < first
    assert torch.equal(still, before)


def test_zero_gradients_are_steps_like_others_and_leave_everything_finite(backend: str) -> None:
    param = nn.Parameter(torch.randn(5, 1))
    optimizer = HRNN([param], meta=META, backend=backend)
    for _ in range(50):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    assert optimizer.state[param]["step"] == 50
    assert param.isfinite().all()
    assert all(value.isfinite().all() for value in optimizer.state[param].values())


def test_every_parameter_that_was_stepped_has_state(backend: str) -> None:
    model = nn.Linear(5, 5)
    optimizer = HRNN(model.parameters(), meta=META, backend=backend)
    model(torch.rand(2, 5)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 2
    assert all(optimizer.state.values())


def test_state_of_another_key_than_a_parameter_harms_no_step_copy_or_load(backend: str) -> None:
    weight, bias, inputs = linear()
    optimizer = HRNN([weight, bias], meta=META, backend=backend)
    optimizer.state["test"] = 1
    quadratic(optimizer, weight, bias, inputs)
    optimizer.step()
    assert copy.deepcopy(optimizer).state["test"] == 1
    fresh = HRNN([weight, bias], meta=META, backend=backend)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.state["test"] == 1
    fresh.step()


def test_state_dict_hooks_run_before_and_after() -> None:
    optimizer = HRNN([nn.Parameter(torch.zeros(2))], meta=META)
    optimizer.register_state_dict_pre_hook(lambda optimizer: optimizer.state.__setitem__("test", 1))
    assert optimizer.state_dict()["state"]["test"] == 1

    def remove(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "seen": state_dict["state"].pop("test")}

    optimizer.register_state_dict_post_hook(remove)
    assert optimizer.state_dict()["seen"] == 1
    assert "test" not in optimizer.state_dict()["state"]


def test_load_hooks_run_in_their_order() -> None:
    optimizer = HRNN([nn.Parameter(torch.zeros(2))], meta=META)
    saved = optimizer.state_dict()

    def in_place(_: Any, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0]["lr"] = 2.0

    def in_a_copy(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] = 3.0
        return state_dict

    optimizer.register_load_state_dict_pre_hook(in_place)
    optimizer.register_load_state_dict_pre_hook(in_a_copy, prepend=True)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 2.0
    optimizer.register_load_state_dict_pre_hook(in_a_copy)
    optimizer.register_load_state_dict_post_hook(lambda opt: opt.state.__setitem__("lr", opt.param_groups[0]["lr"]))
    optimizer.load_state_dict(saved)
    assert optimizer.state["lr"] == 3.0


def test_step_hooks_of_all_optimizers_run_around_those_of_one_until_removed() -> None:
    optimizer, calls = HRNN([nn.Parameter(torch.zeros(2))], meta=META), []
    hooks = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("all before")),
        register_optimizer_step_post_hook(lambda *_: calls.append("all after")),
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
    ]
    try:
        optimizer.step()
    finally:
        for hook in hooks:
            hook.remove()
    optimizer.step()
    assert calls == ["all before", "before", "after", "all after"]


@pytest.mark.parametrize(("saved_named", "loading_named"), [(True, True), (True, False), (False, True)])
def test_names_are_kept_when_either_side_has_them(saved_named: bool, loading_named: bool) -> None:
    model = nn.Sequential(nn.Conv2d(4, 2, 1, stride=2), nn.BatchNorm2d(2))

    def build(named: bool) -> HRNN:
        return HRNN(model.named_parameters() if named else model.parameters(), meta=META)

    source, target = build(saved_named), build(loading_named)
    model(torch.rand(1, 4, 8, 8)).sum().backward()
    source.step()
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    target.step()
    names = target.state_dict()["param_groups"][0]["param_names"]
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_equal_runs_have_equal_dictionaries_and_repeated_groups_the_same_one(backend: str) -> None:
    runs = []
    for _ in range(2):
        weight, bias, inputs = linear()
        optimizer = HRNN([weight, bias], meta=META, backend=backend)
        for _ in range(5):
            quadratic(optimizer, weight, bias, inputs)
            optimizer.step()
        runs.append(optimizer)
    assert_equal_state(*runs)
    assert runs[0].state_dict()["param_groups"] == runs[1].state_dict()["param_groups"]
    runs[1].param_groups.extend(runs[1].param_groups)
    assert runs[0].state_dict()["param_groups"][-1] == runs[1].state_dict()["param_groups"][-1]


def test_the_runner_of_torchs_suite_runs_every_entry_and_fails_when_a_test_does(tmp_path: Path) -> None:
    pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest: pip install 'lopt[test]'")
    suite = """
        import torch
        from optim.test_swa_utils import TestSWAUtils
        from torch.testing._internal.common_device_type import instantiate_device_type_tests, onlyCPU
        from torch.testing._internal.common_optimizers import optim_db, optims
        from torch.testing._internal.common_utils import TestCase

        class TestOptimRenewed(TestCase):
            @onlyCPU
            @optims(optim_db, dtypes=[torch.float32])
            def test_steps(self, device, dtype, optim_info):
                for given in optim_info.optim_inputs_func(device=device):
                    param = torch.ones(3, device=device, dtype=dtype, requires_grad=True)
                    param.grad = torch.ones_like(param)
                    optim_info.optim_cls([param], **given.kwargs).step()
                    self.assertNotEqual(param, torch.ones(3))

            @onlyCPU
            @optims(optim_db, dtypes=[torch.float32])
            def test_errors(self, device, dtype, optim_info):
                cases = optim_info.optim_error_inputs_func(device=device, dtype=dtype)
                self.assertGreater(len(cases), 4)
                for case in cases:
                    given = case.optimizer_error_input
                    warns = issubclass(case.error_type, Warning)
                    expect = self.assertWarnsRegex if warns else self.assertRaisesRegex
                    with expect(case.error_type, case.error_regex):
                        optim_info.optim_cls(given.params, **given.kwargs)

            @onlyCPU
            @optims(optim_db, dtypes=[torch.float32])
            def test_complex_2d(self, device, dtype, optim_info):
                raise AssertionError("is to be skipped")

            @onlyCPU
            @optims(optim_db, dtypes=[torch.float32])
            def test_fails(self, device, dtype, optim_info):
                self.fail()

        instantiate_device_type_tests(TestOptimRenewed, globals())
    """
    path = tmp_path / "test_optim.py"
    path.write_text(textwrap.dedent(suite))
    runner = Path(__file__).with_name("torch_suite.py")
    done = subprocess.run([sys.executable, str(runner), str(path), "-v"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    for name in ["HRNNReference"] + ["HRNN"] * ("cpu" in BACKENDS):
        said = {line.split(" ")[0]: line for line in done.stderr.splitlines() if f"_{name}_cpu_float32 " in line}
        assert said[f"test_steps_{name}_cpu_float32"].endswith("ok")
        assert said[f"test_errors_{name}_cpu_float32"].endswith("ok")  # what every optimizer refuses, in torch's words
        assert "skipped 'a tensor of complex numbers is one tensor" in said[f"test_complex_2d_{name}_cpu_float32"]
        assert said[f"test_fails_{name}_cpu_float32"].endswith("FAIL")


# What is put around an optimizer


def test_accumulated_gradients_are_one_step_on_their_sum(backend: str) -> None:
    results = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model, inputs = nn.Linear(4, 3), torch.randn(8, 4)
        optimizer = HRNN(model.parameters(), meta=META, backend=backend)
        for _ in range(3):
            optimizer.zero_grad()
            for part in inputs.chunk(parts):
                (model(part).square().sum() / len(inputs)).backward()
            optimizer.step()
        assert {state["step"].item() for state in optimizer.state.values()} == {3}
        results.append(torch.cat([param.detach().reshape(-1) for param in model.parameters()]))
    # Sums of eight in another order: some float32 roundings of values around 1, over three steps.
    torch.testing.assert_close(*results, rtol=0, atol=32 * 2**-24)


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])
def test_clipped_gradients_are_what_is_seen(backend: str, clip: Any) -> None:
    runs = []
    for clipped in (True, False):
        weight, bias, inputs = linear()
        optimizer = HRNN([weight, bias], meta=META, backend=backend)
        for _ in range(3):
            quadratic(optimizer, weight, bias, inputs)
            if clipped:
                clip([weight, bias], 0.1)
            else:
                copies = [nn.Parameter(param.detach().clone()) for param in (weight, bias)]
                for own, param in zip(copies, (weight, bias), strict=True):
                    own.grad = param.grad.clone()
                clip(copies, 0.1)
                for own, param in zip(copies, (weight, bias), strict=True):
                    param.grad = own.grad
            optimizer.step()
        runs.append(optimizer)
    assert_equal_state(*runs)


def test_a_nonfinite_norm_of_clipping_is_a_skipped_step(backend: str) -> None:
    weight, bias, inputs = linear()
    optimizer = HRNN([weight, bias], meta=META, backend=backend)
    quadratic(optimizer, weight, bias, inputs)
    weight.grad[0, 0] = math.inf
    nn.utils.clip_grad_norm_([weight, bias], 1.0)  # makes NaN of what was infinite
    before = weight.detach().clone()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(weight, before)


@pytest.mark.parametrize("average", ["swa", "ema"])
@pytest.mark.parametrize("meta", [META, ATTENTION], ids=["paper", "attention"])
def test_averaged_models_average_the_parameters_to_evaluate(average: str, meta: MetaParams) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = HRNN(model.parameters(), meta=meta)
    multi_avg = {"swa": None, "ema": swa_utils.get_ema_multi_avg_fn(0.9)}[average]
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=multi_avg)
    schedule = swa_utils.SWALR(optimizer, swa_lr=0.5, anneal_epochs=2)
    inputs = torch.randn(16, 3)
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.eval()  # the attended point, if there is one, is not what is evaluated
        averaged.update_parameters(model)
        seen.append(model[0].weight.detach().clone())
        optimizer.train()
    swa_utils.update_bn([inputs], averaged)
    expected = seen[0]
    for count, value in enumerate(seen[1:], 1):
        expected = expected + (value - expected) / (count + 1) if average == "swa" else 0.9 * expected + 0.1 * value
    torch.testing.assert_close(averaged.module[0].weight.detach(), expected, rtol=0, atol=8 * 2**-24)
    assert averaged(inputs).isfinite().all()
