"""Tasks against the objectives and gradients recorded from the original code, and the wrappers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lopt import HRNNConfig
from lopt.meta.recipe import RECIPES
from lopt.meta.tasks import LogOf, Noisy, Random, Rescaled, Sparse, Sum, Task, networks, paper
from lopt.meta.tasks.base import try_out
from lopt.meta.unroll import Mix

RECORDED = np.load(Path(__file__).parents[1] / "recordings" / "problems.npz")
TASKS = {
    **{name: paper.Function2D(*line) for name, line in paper.FUNCTIONS_2D.items()},
    "saddle": paper.Function2D(paper.saddle, None),
    "bowl": paper.Bowl(5.0, math.pi / 4),
    "convnet": paper.ConvNet((4, 4, 2), ((3, 3, 3),), activation=torch.sigmoid),
    "dependency_chain": paper.DependencyChain(6),
    "fully_connected": paper.FullyConnected(5, (4, 3)),
    "log_quadratic": LogOf(paper.Quadratic(5)),
    "matmul_2_5": paper.MatMul(2, 5),
    "matmul_2_7": paper.MatMul(2, 7),
    "matmul_3_19": paper.MatMul(3, 19),
    "min_max_well": paper.MinMaxWell(6),
    **{f"norm_{power:g}": paper.Norm(4, power) for power in (1.0, 1.5, 2.0, 3.0)},
    "onehot_sparse_softmax": paper.SparseSoftmax(one_hot=True),
    "outward_snake": paper.OutwardSnake(6),
    "projection_quadratic": paper.ProjectionQuadratic(6),
    "quadratic": paper.Quadratic(5),
    "rescale_norm": Rescaled(paper.Norm(4, 2.5), 0.123),
    "softmax_regression": paper.Softmax(4),
    "sparse_softmax": paper.SparseSoftmax(),
    "sum_of_quadratics": paper.SumOfQuadratics(6),
    "sum_task": Sum(paper.Quadratic(3), paper.Function2D(*paper.FUNCTIONS_2D["rosenbrock"]), paper.Norm(4, 3.0)),
}


def recorded(key: str) -> torch.Tensor:
    return torch.from_numpy(RECORDED[key]).double()


def three(values: torch.Tensor) -> torch.Tensor:
    return values.expand(3, *values.shape)


def recorded_data(name: str) -> object:
    """The instance of a recording, once for each of its three points."""
    if f"{name}/dataset" in RECORDED:
        x, y = (recorded(f"data/{RECORDED[f'{name}/dataset']}/{part}") for part in "xy")
        return {"x": three(x), "y": three(y)}
    if f"{name}/const/w" in RECORDED:
        return {part: three(recorded(f"{name}/const/{part}")) for part in "wy"}
    subs = [
        {part: three(recorded(f"{name}/sub{k}/{part}")) for part in "wy"} if f"{name}/sub{k}/w" in RECORDED else {}
        for k in range(3)
    ]
    return {
        "sum_task": subs,
        "log_quadratic": subs[0],
        "rescale_norm": {"task": subs[0], "scale": 0.123, "loss_scale": 1.0},
    }.get(name, {})


@pytest.mark.parametrize("name", RECORDED["names"].tolist())
def test_objective_and_gradient_equal_the_recorded_ones(name):
    task = TASKS[name]
    params = [
        torch.stack([recorded(f"{name}/{j}/param/{i}") for j in range(3)]).requires_grad_()
        for i in range(len(task.shapes))
    ]
    assert [param.shape[1:] for param in params] == list(task.shapes)
    losses = task.loss(params, recorded_data(name))
    grads = torch.autograd.grad(losses.sum(), params)
    for j in range(3):
        assert losses[j].item() == pytest.approx(recorded(f"{name}/{j}/obj").item(), rel=1e-5)
        for i, grad in enumerate(grads):
            expected = recorded(f"{name}/{j}/grad/{i}")
            assert (grad[j] - expected).abs().max() <= 1e-5 * expected.abs().max(), (name, j, i)


def test_paper_set_has_its_101_tasks_and_each_runs():
    families = {**paper.paper_tasks(), **paper.off_by_default()}
    assert sum(len(tasks) for tasks in paper.paper_tasks().values()) == 101
    random = Random(torch.Generator().manual_seed(0))
    for family, tasks in families.items():
        for task in tasks:
            if max(task.sizes) > 1000:
                continue  # the large quadratics: the same class
            data = task.instance(2, random)
            params = [param.requires_grad_() for param in task.start(2, random, data)]
            assert [tuple(param.shape) for param in params] == [(2, *shape) for shape in task.shapes]
            loss = task.loss(params, task.minibatch(data, 2, random))
            assert loss.shape == (2,), family
            assert loss.isfinite().all(), family
            grads = task.corrupt(list(torch.autograd.grad(loss.sum(), params)), random)
            assert [grad.shape for grad in grads] == [param.shape for param in params]


NETWORKS = [
    networks.Linear(),
    networks.Linear(modes=2),
    networks.MLP(noise=0.3),
    networks.MLP((8,), regression=True, modes=2),
    networks.MLP((8, 8), torch.tanh, networks.batch_norm, residual=True),
    networks.MLP((8,), norm=networks.layer_norm, regression=True, noise=0.1),
    networks.Autoencoder(),
    networks.Autoencoder((8, 3, 8), modes=3),
    networks.Conv(noise=0.1),
    networks.Conv((4, 6), norm=False),
    networks.Attention(),
    networks.Recurrent(),
    networks.NextToken(),
    networks.GRU(noise=0.1),
    networks.GRU(modes=2),
    networks.Language(),
]


@pytest.mark.parametrize("task", NETWORKS, ids=lambda task: type(task).__name__)
def test_network_learns_each_copy_alone_and_is_learnable(task: Task):
    random = Random(torch.Generator().manual_seed(0))
    data = task.instance(3, random)
    params = [param.requires_grad_() for param in task.start(3, random, data)]
    first = task.loss(params, data)
    grads = torch.autograd.grad(first[1], params, retain_graph=True)
    assert all(grad[0].abs().max() == 0 == grad[2].abs().max() for grad in grads)
    assert all(grad[1].abs().max() > 0 for grad in grads)
    # Side by side, as meta-training has them.
    parts = torch.cat([param.flatten(1) for param in params], -1).split(task.sizes, -1)
    views = [part.view(3, *shape) for part, shape in zip(parts, task.shapes, strict=True)]
    torch.testing.assert_close(task.loss(views, data), first)
    optimizer = torch.optim.Adam(params, lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        task.loss(params, task.minibatch(data, 3, random)).sum().backward()
        optimizer.step()
    assert (task.loss(params, data) < 0.9 * first).all()


def test_samples_lie_around_patterns_of_their_class():
    task = networks.Linear(32, 3, samples=256, modes=2)
    x, labels = task.patterns_of(4, Random(torch.Generator().manual_seed(0)))
    torch.testing.assert_close(x.mean((1, 2)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std((1, 2)), torch.ones(4))
    lowest = x.amin((1, 2), keepdim=True)
    assert 0.2 < (x == lowest).float().mean() < 0.7  # features that were zero
    assert labels.unique().tolist() == [0, 1, 2]
    between = torch.cdist(x, x) + 1e9 * torch.eye(256)
    nearest = labels.gather(1, between.argmin(-1))
    assert (nearest == labels).float().mean() > 0.8  # a third by chance


def test_batch_norm_and_convolution_equal_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    scale, shift = torch.randn(2, 5, generator=generator), torch.randn(2, 5, generator=generator)
    for channels in (1, 3):
        x = torch.randn(4, 2, channels, 5, 6, generator=generator)
        kernel = torch.randn(2, 3, 3, channels, 5, generator=generator)
        ours = networks.convolve(x.flatten(1, 2), kernel).unflatten(1, (2, 5))
        for copy in range(2):
            expected = torch.nn.functional.conv2d(x[:, copy], kernel[copy].permute(3, 2, 0, 1), padding=1)
            torch.testing.assert_close(ours[:, copy], expected, rtol=1e-4, atol=1e-5)
    samples = torch.randn(2, 7, 5, generator=generator)
    normed = networks.batch_norm(samples, scale, shift)
    for copy in range(2):
        expected = torch.nn.functional.batch_norm(samples[copy], None, None, scale[copy], shift[copy], training=True)
        torch.testing.assert_close(normed[copy], expected, rtol=1e-4, atol=1e-5)


def test_gru_is_torchs():
    torch.manual_seed(0)
    theirs = torch.nn.GRU(8, 5, batch_first=True)
    x = torch.randn(3, 7, 8)
    params = [theirs.weight_ih_l0.T, theirs.bias_ih_l0, theirs.weight_hh_l0.T, theirs.bias_hh_l0]
    ours = torch.stack(networks.gru(x[None], [param[None] for param in params]), 2)
    torch.testing.assert_close(ours[0], theirs(x)[0])


def test_minibatches_go_through_the_data_set_in_new_orders():
    random = Random(torch.Generator().manual_seed(0))
    task = networks.Linear(samples=12, batch=5)
    data = task.instance(2, random)
    data["x"] = torch.arange(12.0).expand(2, 12)
    drawn = [task.minibatch(data, 2, random)["x"].sort(-1).values for _ in range(6)]
    for first, second in zip(drawn[::2], drawn[1::2], strict=True):
        for copy in range(2):
            assert len({*first[copy].tolist(), *second[copy].tolist()}) == 10
    assert not torch.equal(drawn[0], drawn[2])


def test_repeated_copies_share_their_world_and_others_do_not():
    random = Random(torch.Generator().manual_seed(0), repeat=2)
    task = Noisy(networks.MLP(noise=0.2), 0.5)
    data = task.instance(4, random)
    params = task.start(4, random, data)
    batch = task.minibatch(data, 4, random)
    grads = task.corrupt([torch.zeros_like(param) for param in params], random)
    for values in (data["x"], data["y"], batch["x"], *grads, *(param for param in params if param.abs().max() > 0)):
        torch.testing.assert_close(values[:2], values[2:], rtol=0, atol=0)
        assert not torch.equal(values[0], values[1])


def test_scalars_are_corrupted_in_a_mix_too():
    class Scalar(Task):
        shapes = ((), (2,))

        def loss(self, params, data):
            return params[0].square() + params[1].square().sum(-1)

    random = Random(torch.Generator().manual_seed(0))
    mix = Mix([Noisy(Scalar(), 0.1), paper.Quadratic(3)], HRNNConfig())
    out = mix.corrupt(torch.zeros(5, mix.segments.total), random)
    assert out.shape == (5, 6) and (out[:, :3] != 0).all() and (out[:, 3:] == 0).all()


def test_wrappers_compose_and_rescale_both_parameters_and_loss():
    random = Random(torch.Generator().manual_seed(0))
    inner = paper.Quadratic(4)
    task = Sparse(Noisy(Rescaled(inner, (0.1, 10.0), (1e-4, 1e4)), 0.1), 0.75)
    data = task.instance(64, random)
    (param,) = task.start(64, random, data)
    scale, loss_scale = data["scale"], data["loss_scale"]
    torch.testing.assert_close(
        task.loss([param], data),
        loss_scale * inner.loss([param / scale[:, None, None]], data["task"]),
        rtol=1e-4,
        atol=0,
    )
    assert loss_scale.log10().std() > 1.5
    (grad,) = task.corrupt([torch.zeros_like(param)], random)
    share = (grad == 0).float().mean().item()
    assert 0.62 < share < 0.88  # .75 of 256 entries, five standard deviations
    assert 0.06 < grad[grad != 0].std() < 0.15


@pytest.mark.parametrize("name", RECIPES)
def test_every_task_of_a_recipe_passes_the_trial_of_users_tasks(name):
    mixes = {stage.mixes.__qualname__: stage.mixes for stage in RECIPES[name].stages}
    for mix in mixes.values():
        for task in (task for tasks in mix() for task in tasks):
            try_out(task)
