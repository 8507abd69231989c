"""lopt.HRNN under torch.distributed: what two processes compute is what one computes.

Run as a program, `python test_distributed.py RANK FOLDER`, this file is one of the two processes that the tests start
once: it goes through all CHECKS and leaves what became of each in FOLDER. With `alone` in place of RANK it is a process
without others, which passes a checkpoint on.
"""

import contextlib
import copy
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lopt import HRNN, HRNNConfig, MetaParams, backends
from lopt.state import FORMATS, SAMPLES, rows
from lopt.train import parallel

# A checkpoint of one process is written and read without a process group, of which torch warns, and 2.6 of itself.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is ", "ignore:TypedStorage is deprecated")

WORLD = 2
TIMEOUT = 300  # seconds, of the whole program; a check that waits in vain ends after half of it
# A bound so high that it is what counts.
META = MetaParams.init(
    HRNNConfig(damping=0.5, log_lr_min_steps=1.0, log_lr_min_distance=2.0, log_lr_max_ratio=1.2), seed=1
)
ATTENTION = MetaParams.init(HRNNConfig(attention=True), seed=1)
BACKENDS = [
    name
    for name, reason in backends.available().items()
    if reason is None and backends.BACKENDS[name].device in ("*", "cpu")
]
# Sums over a tensor are taken in another order: some float32 roundings of 2^-24, more with every step. The largest
# difference seen in the checks below is 4 of them.
CLOSE = {"rtol": 32 * 2**-24, "atol": 32 * 2**-24}

UNABLE = parallel.unable_to_shard(torch.device("cpu"))  # FSDP's forward and backward pass

CHECKS: dict[str, Callable[[Path], None]] = {}


def on_two_processes(check: Callable[[Path], None]) -> Callable[[Path], None]:
    """Make a function one of the CHECKS. It is given a folder that both processes share."""
    CHECKS[check.__name__] = check
    return check


# The two processes


def build(seed: int = 0) -> nn.Sequential:
    """Rows 7, 7, 7, 1 and 1 on two processes: uneven shards, and empty ones."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 1))


def shard(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def content(optimizer: HRNN) -> dict[str, Tensor]:
    """Copies of whole parameters and whole states under readable names."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    tensors = {f"{i}.param": whole(param).clone() for i, param in enumerate(params)}
    for i, param in enumerate(params):
        for name, value in optimizer.state.get(param, {}).items():
            tensors[f"{i}.{name}"] = whole(value).clone()
    return tensors


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_on_all(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        others = [torch.empty_like(tensor) for _ in range(WORLD)]
        dist.all_gather(others, tensor)
        assert all(torch.equal(other, tensor) for other in others), name


def give_gradients(params: list[Tensor], step: int, skip: tuple[int, ...] = ()) -> None:
    """The same whole gradients, sharded where the parameter is."""
    generator = torch.Generator().manual_seed(1000 + step)
    for index, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        if isinstance(param, DTensor):
            grad = distribute_tensor(grad, param.device_mesh, param.placements)
        param.grad = None if index in skip else grad


def pair(backend: str | None = None, **options: Any) -> tuple[HRNN, HRNN]:
    """Optimizers of the same model, whole and sharded."""
    options = {"meta": META, "backend": backend, "weight_decay": 0.1} | options
    model = build()
    return HRNN(model.parameters(), **options), HRNN(shard(build()).parameters(), **options)


def params_of(optimizer: HRNN) -> list[Tensor]:
    return optimizer.param_groups[0]["params"]


def train(optimizer: HRNN, steps: range | int) -> None:
    for step in range(steps) if isinstance(steps, int) else steps:
        give_gradients(params_of(optimizer), step)
        optimizer.step()


def loss_of(model: nn.Module, step: int, count: int = 8, part: slice = slice(None)) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(count, 3, generator=generator)[part]
    return (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()


def halves() -> slice:
    return slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes of every all-reduce inside."""
    sizes: list[int] = []
    plain = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.nbytes)
        return plain(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        yield sizes
    finally:
        dist.all_reduce = plain


@on_two_processes
def ddp_replicas_are_bitwise_equal_after_100_steps(folder: Path) -> None:
    model = nn.parallel.DistributedDataParallel(build())
    optimizer = HRNN(model.parameters(), meta=META)
    for step in range(100):
        optimizer.zero_grad()
        loss_of(model, step, part=halves()).backward()
        optimizer.step()
    assert_same_on_all(content(optimizer))
    optimizer.zero_grad()
    with model.no_sync():  # the comparison can fail
        loss_of(model, 100, part=halves()).backward()
    optimizer.step()
    with contextlib.suppress(AssertionError):
        assert_same_on_all(content(optimizer))
        raise ValueError("replicas with gradients of their own are equal: the comparison sees nothing")


@on_two_processes
def sharded_parameters_are_trained_as_whole_ones_are(folder: Path) -> None:
    for backend in BACKENDS:
        for meta in (META, ATTENTION):
            one, two = pair(backend, meta=meta)
            for optimizer in (one, two):
                train(optimizer, 8)
            assert_close(content(one), content(two))


@on_two_processes
def fully_sharded_training_equals_training_on_one_process(folder: Path) -> None:
    if UNABLE:
        pytest.skip(UNABLE)
    model, sharded = build(), shard(build())
    one, two = HRNN(model.parameters(), meta=META), HRNN(sharded.parameters(), meta=META)
    before = loss_of(model, 0).item()
    for step in range(10):
        for optimizer, network, part in ((one, model, slice(None)), (two, sharded, halves())):
            optimizer.zero_grad()
            loss_of(network, step, part=part).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
    assert loss_of(model, 0).item() < before
    assert_close(content(one), content(two))


@on_two_processes
def state_is_sharded_like_its_parameter(folder: Path) -> None:
    _, optimizer = pair()
    train(optimizer, 1)
    for param in params_of(optimizer):
        state = optimizer.state[param]
        assert isinstance(param, DTensor) and isinstance(param.grad, DTensor)
        for row in rows(optimizer.config):
            value, size = state[row.name], row.size(optimizer.config)
            if row.per == "parameter":
                assert value.placements == (Shard(0 if size is None else 1),)
                assert value.shape == ((*param.shape,) if size is None else (size, *param.shape))
                assert value.to_local().shape[value.ndim - param.ndim :] == param.to_local().shape
            else:
                assert not isinstance(value, DTensor)
    empty = [param.to_local().numel() == 0 for param in params_of(optimizer)]
    assert any(empty) == (dist.get_rank() == 1)
    assert_same_on_all(content(optimizer))


@on_two_processes
def a_step_communicates_twice_and_little(folder: Path) -> None:
    one, two = pair()
    promising = pair(capturable=True)[1]
    columns = META.config.hidden_size + META.config.num_features + 3 + SAMPLES
    for optimizer, expected in (
        (one, []),
        (two, [4 * (1 + 6), 4 * 6 * columns]),
        (promising, [4, 4 * 6 * columns]),
    ):
        give_gradients(params_of(optimizer), 0)
        with counted() as sizes:
            optimizer.step()
        assert sizes == expected
    assert 4 * columns == 228  # bytes per tensor
    assert_equal(content(two), content(promising))


@on_two_processes
def parameters_sharded_along_any_dimension_or_not_at_all_train_together(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("outer", "inner"))
    layouts = [(Shard(0), Replicate()), (Shard(1), Shard(0)), (Replicate(), Shard(0)), (Shard(2), Replicate()), None]
    torch.manual_seed(0)
    values = [torch.randn(5, 3, 4), torch.randn(4, 3), torch.randn(6), torch.randn(2, 3, 3), torch.randn(4)]
    plain = [nn.Parameter(value.clone()) for value in values]
    mixed = [
        nn.Parameter(value.clone() if layout is None else distribute_tensor(value.clone(), mesh, layout))
        for value, layout in zip(values, layouts, strict=True)
    ]
    for backend in BACKENDS:
        optimizers = [HRNN(params, meta=META, backend=backend, base_fan_in=2) for params in (plain, mixed)]
        for optimizer in optimizers:
            train(optimizer, 4)
        assert_close(*map(content, optimizers))
        assert optimizers[1].state[mixed[1]]["hidden"].placements == (Shard(2), Shard(1))


@on_two_processes
def parameters_of_any_dtype_are_sharded(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float64, torch.complex64):
        values = [torch.randn(5, 3, dtype=dtype), torch.randn(1, dtype=dtype)]
        plain = [nn.Parameter(value.clone()) for value in values]
        mixed = [nn.Parameter(distribute_tensor(value.clone(), mesh, [Shard(0)])) for value in values]
        optimizers = [HRNN(params, meta=ATTENTION) for params in (plain, mixed)]
        for optimizer in optimizers:
            train(optimizer, 4)
            optimizer.eval()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.train()
            train(optimizer, range(4, 6))
        for left, right in zip(plain, mixed, strict=True):
            close = {"rtol": 2**-8, "atol": 0} if dtype == torch.bfloat16 else CLOSE
            own = distribute_tensor(left.detach(), mesh, [Shard(0)]).to_local()  # complex numbers are not gathered
            torch.testing.assert_close(right.detach().to_local(), own, **close)


@on_two_processes
def a_nonfinite_gradient_on_one_process_holds_back_all(folder: Path) -> None:
    for value in (float("nan"), float("inf"), 2e18):
        clean, hit = pair()[1], pair()[1]
        for optimizer in (clean, hit):
            train(optimizer, 2)
        give_gradients(params_of(hit), 7)
        if dist.get_rank() == 0:
            params_of(hit)[0].grad.to_local()[0, 0] = value
        before = content(hit)
        hit.step()
        assert_equal(content(hit), before)
        assert hit.skipped_steps == 1
        for optimizer in (clean, hit):
            train(optimizer, range(2, 4))
        assert_equal(content(clean), content(hit))


@on_two_processes
def nonfinite_raise_raises_on_all_processes_and_names_the_tensor_where_it_is(folder: Path) -> None:
    optimizer = pair(nonfinite="raise")[1]
    train(optimizer, 1)
    give_gradients(params_of(optimizer), 1)
    if dist.get_rank() == 0:
        params_of(optimizer)[1].grad.to_local()[0] = float("nan")
    before = content(optimizer)
    said = "1 of group 0, shape" if dist.get_rank() == 0 else "a gradient on another process is not finite"
    with pytest.raises(RuntimeError, match=said):
        optimizer.step()
    assert_equal(content(optimizer), before)
    train(optimizer, range(1, 2))


@on_two_processes
def gradscaler_skips_an_overflow_of_one_process_on_all(folder: Path) -> None:
    if UNABLE:
        pytest.skip(UNABLE)
    model = shard(build())
    optimizer, scaler = HRNN(model.parameters(), meta=META), torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step, part=halves())).backward()
        if step == 1 and dist.get_rank() == 1:
            params_of(optimizer)[0].grad.to_local()[0, 0] = float("inf")
        before = content(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert (content(optimizer)["0.param"] == before["0.param"]).all() == (step == 1)
    assert optimizer.skipped_steps == 1
    assert scaler.get_scale() == 32.0


@on_two_processes
def a_gradient_missing_on_one_process_counts_as_zero_there(folder: Path) -> None:
    one, two = pair()
    for step in range(4):
        for optimizer in (one, two):
            give_gradients(params_of(optimizer), step)
        if step % 2:
            params_of(one)[0].grad[:4] = 0  # the rows of process 0
            if dist.get_rank() == 0:
                params_of(two)[0].grad = None
        for optimizer in (one, two):
            optimizer.step()
    assert_close(content(one), content(two))


@on_two_processes
def a_gradient_missing_on_all_processes_leaves_its_parameter_alone(folder: Path) -> None:
    one, two = pair()
    for optimizer in (one, two):
        for step in range(4):
            give_gradients(params_of(optimizer), step, skip=(1, step % 2))
            optimizer.step()
        give_gradients(params_of(optimizer), 0, skip=tuple(range(6)))
        optimizer.step()
    assert_close(content(one), content(two))
    assert params_of(two)[1] not in two.state
    assert two.state[params_of(two)[0]]["step"] == 2


@on_two_processes
def a_process_without_any_gradient_does_not_hold_up_the_others(folder: Path) -> None:
    optimizer = pair()[1]
    give_gradients(params_of(optimizer), 0)
    if dist.get_rank() == 1:
        for param in params_of(optimizer):
            param.grad = None
    optimizer.step()
    assert {state["step"].item() for state in optimizer.state.values()} == {1}
    assert_same_on_all(content(optimizer))


@on_two_processes
def a_partial_gradient_is_summed_and_a_plain_one_refused(folder: Path) -> None:
    from torch.distributed.tensor import Partial

    mesh = init_device_mesh("cpu", (WORLD,))
    params = [nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])) for _ in range(2)]
    for param, placement in zip(params, (Partial(), Replicate()), strict=True):
        share = 1 / WORLD if placement.is_partial() else 1.0
        param.grad = DTensor.from_local(torch.full((4, 3), share), mesh, [placement], run_check=False)
    optimizers = [HRNN([param], meta=META) for param in params]
    for optimizer in optimizers:
        optimizer.step()
    assert_equal(*map(content, optimizers))
    params[0]._grad = None
    params[0].grad = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
    summed = nn.Parameter(DTensor.from_local(torch.ones(4, 3), mesh, [Partial()], run_check=False))
    summed.grad = DTensor.from_local(torch.ones(4, 3), mesh, [Partial()], run_check=False)
    with pytest.raises(ValueError, match="is a DTensor of partial sums"):
        HRNN([summed], meta=META).step()


@on_two_processes
def a_whole_state_is_spread_over_sharded_parameters_and_back(folder: Path) -> None:
    one, two = pair()
    for optimizer in (one, two):
        train(optimizer, 2)
    spread, gathered = pair()[1], pair()[0]
    for source, target in ((one, spread), (two, gathered)):
        target.load_state_dict(source.state_dict())
        for left, right in zip(params_of(source), params_of(target), strict=True):
            for name, value in source.state[left].items():
                assert torch.equal(whole(value), whole(target.state[right][name]))
    assert isinstance(spread.state[params_of(spread)[0]]["hidden"], DTensor)


@on_two_processes
def parameters_of_equal_shards_take_turns(folder: Path) -> None:
    """The first process holds two rows of each, though of four, of three and of two."""
    mesh = init_device_mesh("cpu", (WORLD,))
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(rows, 64, generator=generator) for rows in (4, 3, 2)]
    one = HRNN([nn.Parameter(value.clone()) for value in values], meta=META)
    sharded = [nn.Parameter(distribute_tensor(value.clone(), mesh, [Shard(0)])) for value in values[:2]]
    two = HRNN([*sharded, nn.Parameter(values[2].clone())], meta=META)
    for step in range(9):
        for optimizer in (one, two):
            give_gradients(params_of(optimizer), step, skip=tuple({0, 1, 2} - {step % 3}))
            optimizer.step()
    assert_close(content(one), content(two))


@on_two_processes
def a_state_is_spread_over_another_mesh_along_another_dimension(folder: Path) -> None:
    line, square = init_device_mesh("cpu", (WORLD,)), init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("a", "b"))
    value = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))

    def of(mesh: Any, placements: list[Any], state_format: str) -> HRNN:
        param = nn.Parameter(distribute_tensor(value.clone(), mesh, placements))
        return HRNN([param], meta=META, state_format=state_format)

    for state_format in FORMATS:
        whole_one = HRNN([nn.Parameter(value.clone())], meta=META, state_format=state_format)
        train(whole_one, 2)
        layouts = [(line, [Shard(0)]), (line, [Shard(1)]), (line, [Replicate()]), (square, [Replicate(), Shard(0)])]
        source = whole_one
        for mesh, placements in layouts:
            target = of(mesh, placements, state_format)
            target.load_state_dict(source.state_dict())
            for name, right in whole_one.state[params_of(whole_one)[0]].items():
                found = target.state[params_of(target)[0]][name]
                assert found.dtype == right.dtype
                found = found.to(torch.float32) if found.dtype == torch.int16 else found  # which gloo does not send
                assert torch.equal(whole(found), right.to(found.dtype)), (name, placements)
            source = target
        gathered = HRNN([nn.Parameter(value.clone())], meta=META, state_format=state_format)
        gathered.load_state_dict(source.state_dict())
        for name, right in whole_one.state[params_of(whole_one)[0]].items():
            assert torch.equal(gathered.state[params_of(gathered)[0]][name], right)


@on_two_processes
def a_whole_state_saved_in_eval_mode_is_spread(folder: Path) -> None:
    one, two = pair(meta=ATTENTION)
    train(one, 2)
    train(two, 2)
    one.eval()
    two.load_state_dict(one.state_dict())
    for param, other in zip(params_of(two), params_of(one), strict=True):
        assert torch.equal(whole(two.state[param]["attended"]), one.state[other]["attended"])
    for optimizer in (one, two):
        optimizer.train()
    for param, other in zip(params_of(two), params_of(one), strict=True):
        assert torch.equal(whole(param), whole(other))


def layout_options(layout: str) -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict=layout == "flat")


def save_run(model: nn.Module, optimizer: HRNN, folder: Path, layout: str) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=layout_options(layout)),
    }
    save(state, checkpoint_id=folder / layout)


def load_run(model: nn.Module, optimizer: HRNN, folder: Path, layout: str) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=layout_options(layout)),
    }
    load(state, checkpoint_id=folder / layout)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=layout_options(layout))


@on_two_processes
def a_checkpoint_of_one_process_is_resumed_on_two(folder: Path) -> None:
    expected = torch.load(folder / "one.pt", weights_only=True)
    for layout in ("nested", "flat"):
        model = shard(build(seed=9))
        optimizer = HRNN(model.parameters(), meta=META)
        load_run(model, optimizer, folder / "one", layout)
        assert_equal(content(optimizer), expected)
        train(optimizer, range(3, 5))


@on_two_processes
def a_checkpoint_of_two_processes_is_resumed_on_two(folder: Path) -> None:
    for layout in ("nested", "flat"):
        model = shard(build())
        optimizer = HRNN(model.parameters(), meta=META)
        train(optimizer, 3)
        save_run(model, optimizer, folder / "two", layout)
        torch.save(content(optimizer), folder / f"two-{dist.get_rank()}.pt")
        other = shard(build(seed=9))
        resumed = HRNN(other.parameters(), meta=META)
        load_run(other, resumed, folder / "two", layout)
        for either in (optimizer, resumed):
            train(either, range(3, 6))
        assert_equal(content(optimizer), content(resumed))


@on_two_processes
def a_checkpoint_of_two_processes_is_resumed_on_one_and_then_on_two(folder: Path) -> None:
    if dist.get_rank() == 0:
        subprocess.run([sys.executable, "-W", "ignore", __file__, "alone", str(folder)], check=True)
    dist.barrier()
    for layout in ("nested", "flat"):
        model = shard(build(seed=9))
        optimizer = HRNN(model.parameters(), meta=META)
        load_run(model, optimizer, folder / "passed on", layout)
        assert_equal(content(optimizer), torch.load(folder / "two-0.pt", weights_only=True))
        train(optimizer, range(3, 5))


def pass_on(folder: Path) -> None:
    """Load on one process what two have saved, and save it again."""
    for layout in ("nested", "flat"):
        model = build(seed=9)
        optimizer = HRNN(model.parameters(), meta=META)
        load_run(model, optimizer, folder / "two", layout)
        assert_equal(content(optimizer), torch.load(folder / "two-0.pt", weights_only=True))
        save_run(model, optimizer, folder / "passed on", layout)
        train(optimizer, range(3, 5))


def main(rank: int, folder: Path) -> None:
    """Go through all checks; the first that fails is the last, since the other process may wait for this one."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=TIMEOUT / 2))
    outcomes: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        try:
            check(folder)
            outcomes[name] = None
        except pytest.skip.Exception as skip:
            outcomes[name] = f"skipped: {skip}"
        except BaseException:
            outcomes[name] = traceback.format_exc()
            break
    (folder / f"outcomes-{rank}.json").write_text(json.dumps(outcomes))
    if all(outcome is None or outcome.startswith("skipped: ") for outcome in outcomes.values()):
        dist.barrier()
        dist.destroy_process_group()


# The tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run_processes: Callable[..., None]) -> Path:
    """What the two processes leave, with a checkpoint of this one process for them to find."""
    folder = tmp_path_factory.mktemp("distributed")
    model = build()
    optimizer = HRNN(model.parameters(), meta=META)
    train(optimizer, 3)
    for layout in ("nested", "flat"):
        save_run(model, optimizer, folder / "one", layout)
    torch.save(content(optimizer), folder / "one.pt")
    run_processes(__file__, [(str(rank), str(folder)) for rank in range(WORLD)], [{}] * WORLD, folder, TIMEOUT)
    return folder


@pytest.mark.parametrize("check", CHECKS)
def test_on_two_processes(check: str, folder: Path, failures_of: Callable[[str, Path, int], list[str]]) -> None:
    failures = failures_of(check, folder, WORLD)
    assert not failures, "\n".join(failures)


def test_parameters_of_one_process_never_communicate() -> None:
    with counted() as sizes:
        train(HRNN(build().parameters(), meta=META), 2)
    assert sizes == []


if __name__ == "__main__":
    if sys.argv[1] == "alone":
        pass_on(Path(sys.argv[2]))
    else:
        main(int(sys.argv[1]), Path(sys.argv[2]))
