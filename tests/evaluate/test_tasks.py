"""Tasks: their networks are torch.nn's, copies do not see each other, evaluation uses the training part alone."""

import math

import pytest
import torch
import torch.nn.functional as F

from lopt.evaluate import families, large, problems, suites, tasks, validation
from lopt.evaluate.training import _loss_and_gradient, _views

pytestmark = pytest.mark.usefixtures("one_thread")


def test_there_are_enough_tasks_of_500_to_20000_parameters():
    assert len(tasks.TASKS) >= 12
    assert all(500 <= suites.task(name).count <= 20_000 for name in [*tasks.TASKS, *families.NETWORKS])
    assert all(75_000 <= suites.task(name).count <= 1_200_000 for name in (*large.TASKS, *validation.LARGE))


# Of data, starts and shapes; on a data set whose values no release of scikit-learn or rounding of a sum changes.
DIGESTS = {
    "softmax": "a7708c1d639ea034",
    "mlp-relu": "b3a42394120e1772",
    "mlp-tanh": "ea0b0ad347ed884b",
    "mlp-gelu-norm": "4d158ae8e8eb9602",
    "deep-relu": "c8a74e02d1ae5ad7",
    "label-noise": "6f907b2f2ace9fbc",
    "conv": "b97add6e82d53bb5",
    "resnet": "340a47202036e382",
    "gru-rows": "443060b9656a83ed",
    "transformer": "fa31112456f2e445",
    "autoencoder": "dfbcb94504160fa5",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_tasks_are_those_of_stored_results(name):
    assert suites.task(name).digest == DIGESTS[name]


def test_names_of_tasks_are_unique_and_families_are_made_of_them():
    parts = (tasks.TASKS, large.TASKS, validation.TASKS, families.NETWORKS, problems.PROBLEMS)
    assert len(suites.TASKS) == sum(map(len, parts))
    assert set(families.NETWORKS) < set(families.TASKS) < set(suites.TASKS)


@pytest.mark.parametrize("name", suites.TASKS)
def test_copies_are_independent_and_an_episode_has_a_positive_loss(name):
    task = suites.task(name)
    seeds = [0, 1, 0]
    theta = torch.stack([task.start(seed) for seed in seeds])
    index = torch.stack([task.order(seed, 2)[1] for seed in seeds])
    loss, grad = _loss_and_gradient(task, theta, index)
    assert (loss > 0).all() and loss.isfinite().all()
    alone = [_loss_and_gradient(task, theta[copy : copy + 1], index[copy : copy + 1]) for copy in range(3)]
    # Products of other batch sizes are summed in another order: some roundings of float32.
    torch.testing.assert_close(loss, torch.cat([own for own, _ in alone]), rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, torch.cat([own for _, own in alone]), rtol=1e-4, atol=1e-5 * grad.abs().max())
    assert torch.equal(loss[0], loss[2]) and not torch.equal(loss[0], loss[1])
    final, test, _ = task.evaluate(_views(task, theta[:1]))
    assert final > 0
    assert (test is None) == (name in problems.PROBLEMS)


def test_order_visits_every_training_sample_once_per_epoch_and_no_test_sample():
    task = suites.task("wine-mlp")
    epoch = task.train // task.batch
    first, second = task.order(3, 2 * epoch).split(epoch)
    for part in (first, second):
        assert len(part.unique()) == epoch * task.batch
    assert not torch.equal(first, second)
    assert task.order(0, 1000).max() < task.train
    assert torch.equal(task.order(3, 40)[:7], task.order(3, 7))


def test_validation_shares_no_data_with_other_suites_and_its_classes_can_be_told_apart():
    others = {suites.task(name).x.numpy().tobytes() for name in (*tasks.TASKS, *large.TASKS, *families.NETWORKS)}
    assert all(suites.task(name).x.numpy().tobytes() not in others for name in validation.TASKS)
    data = tasks.data_set("patches")
    assert data.x.shape == (1797, 64) and data.y.unique().tolist() == list(range(10))
    centres = torch.stack([data.x[data.y == label].mean(0) for label in range(10)])
    nearest = torch.cdist(data.x, centres).argmin(1)
    assert (nearest == data.y).double().mean() > 0.99


def test_wrong_labels_are_a_fifth_of_the_training_labels_and_no_test_label():
    clean, noisy = suites.task("mlp-relu"), suites.task("label-noise")
    changed = clean.y != noisy.y
    assert changed[: clean.train].double().mean().item() == pytest.approx(0.2 * 0.9, abs=0.03)
    assert not changed[clean.train :].any()


def test_features_are_standardised_by_the_training_part():
    data = tasks.data_set("breast_cancer")
    torch.testing.assert_close(data.x[: data.train].mean(0), torch.zeros(30), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.x[: data.train].std(0), torch.ones(30), atol=1e-5, rtol=0)
    assert data.x[data.train :].mean().abs() > 1e-4


def test_convolution_is_torchs():
    x, kernel = torch.randn(1, 4, 8, 8, 3), torch.randn(5, 3, 3, 3)
    ours = tasks.convolve(x, kernel.permute(0, 2, 3, 1).reshape(1, 5, 27))
    theirs = F.conv2d(x[0].permute(0, 3, 1, 2), kernel, padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours[0], theirs)
    torch.testing.assert_close(tasks.pool(x)[0], F.avg_pool2d(x[0].permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1))


MODULES = {
    F.elu: torch.nn.ELU,
    F.gelu: torch.nn.GELU,
    torch.sigmoid: torch.nn.Sigmoid,
    torch.tanh: torch.nn.Tanh,
    torch.relu: torch.nn.ReLU,
}


def in_torch(network: tasks.MLP | tasks.Conv) -> torch.nn.Sequential:
    """The same network of torch.nn's layers, for flat 8 x 8 images."""
    *hidden, last = [start.shape for start in network.starts[::2]]
    activation, layers = MODULES[network.activation], []
    for place, (outputs, fan_in) in enumerate(hidden):
        if isinstance(network, tasks.MLP):
            layers += [torch.nn.Linear(fan_in, outputs), activation()]
        else:
            layers += [torch.nn.Conv2d(fan_in // 9, outputs, 3, padding=1), activation()]
            layers += [torch.nn.AvgPool2d(2)] if place < 2 else []
    if isinstance(network, tasks.Conv):
        layers = [torch.nn.Unflatten(1, (1, 8, 8)), *layers, torch.nn.Flatten()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(*reversed(last)))


def torchs_layout(network: tasks.MLP | tasks.Conv, values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Parameters or gradients as torch.nn has them: channels before positions."""
    weights, biases = values[::2], values[1::2]
    if isinstance(network, tasks.Conv):
        kernels = [weight.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2) for weight in weights[:-1]]
        by_channel = weights[-1].unflatten(1, (-1, len(kernels[-1]))).transpose(1, 2).flatten(1)
        weights = [*kernels, by_channel]
    return [value for pair in zip(weights, biases, strict=True) for value in pair]


@pytest.mark.parametrize("name", [*families.NETWORKS, "conv", "mlp-tanh", "deep-relu"])
def test_networks_of_the_families_are_torchs(name):
    task = suites.task(name)
    model, theta = in_torch(task.network).double(), task.start(0).double()
    params = [part.requires_grad_() for part in _views(task, theta[None])]
    own = torchs_layout(task.network, [param[0].detach() for param in params])
    model.load_state_dict(dict(zip(model.state_dict(), own, strict=True)))
    x, y = task.x[:6].double(), task.y[:6]
    loss, expected = task.loss(params, (x[None], y[None])), F.cross_entropy(model(x), y)
    torch.testing.assert_close(loss[0], expected)
    expected.backward()
    grads = torchs_layout(task.network, [grad[0] for grad in torch.autograd.grad(loss.sum(), params)])
    for ours, param in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(ours, param.grad)


def test_batch_norm_takes_its_statistics_from_the_first_samples():
    x, scale, shift = torch.randn(6, 4, 4, 3), torch.rand(3), torch.randn(3)
    ours = tasks.batch_norm(x[None], scale[None], shift[None], 4)[0]
    channels_first = x.permute(0, 3, 1, 2)
    fit = channels_first[:4].transpose(0, 1).flatten(1)
    theirs = F.batch_norm(channels_first, fit.mean(1), fit.var(1, correction=0), scale, shift)
    torch.testing.assert_close(ours, theirs.permute(0, 2, 3, 1))


def torchs_block(own: list[torch.Tensor]) -> torch.nn.TransformerEncoderLayer:
    """torch.nn's block of width 8, two heads, with the parameters [1, *shape] of one of `tasks.Blocks`."""
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True).eval()
    names = ["norm1", "self_attn.in_proj_", "self_attn.out_proj.", "norm2", "linear1", "linear2"]
    state = {}
    for name, weight, bias in zip(names, own[::2], own[1::2], strict=True):
        name = name if name[-1] in "._" else f"{name}."
        state |= {f"{name}weight": weight[0], f"{name}bias": bias[0]}
    layer.load_state_dict(state)
    return layer


def test_transformer_block_is_torchs():
    torch.manual_seed(0)
    network = tasks.Transformer(8, 2, 1, 3)
    params = [torch.randn(1, *start.shape) * 0.3 for start in network.starts]
    layer = torchs_block(params[3:-4])
    x = torch.randn(1, 2, 64)
    image = x[0].view(2, 8, 8)
    patches = F.unfold(image[:, None], 2, stride=2).transpose(1, 2)  # [2, 16, 4]
    h = layer(F.linear(patches, params[0][0], params[1][0]) + params[2][0])
    h = F.layer_norm(h, (8,), params[-4][0], params[-3][0]).mean(1)
    with torch.no_grad():
        torch.testing.assert_close(network(params, x, 2)[0], F.linear(h, params[-2][0], params[-1][0]))


def test_causal_transformer_blocks_are_torchs():
    torch.manual_seed(0)
    network = tasks.TextTransformer(7, 5, 8, 2, 2)
    params = [torch.randn(1, *start.shape) * 0.3 for start in network.starts]
    x = torch.randint(7, (1, 3, 5))
    h = F.embedding(x[0], params[0][0]) + params[1][0]
    for own in (params[2:14], params[14:26]):
        h = torchs_block(own)(h, torch.nn.Transformer.generate_square_subsequent_mask(5), is_causal=True)
    expected = F.linear(F.layer_norm(h, (8,), params[26][0], params[27][0]), params[28][0], params[29][0])
    torch.testing.assert_close(network(params, x, 3)[0], expected)


def test_grus_are_torchs():
    torch.manual_seed(0)
    for network, x in (
        (tasks.RowsGRU(6, 3), torch.randn(1, 4, 64)),
        (tasks.TextGRU(7, 5, 6), torch.randint(7, (1, 4, 9))),
    ):
        params = [torch.randn(1, *start.shape) * 0.3 for start in network.starts]
        *table, weight, bias, recurrent, recurrent_bias, out, out_bias = (param[0] for param in params)
        inputs = F.embedding(x[0], *table) if table else x[0].view(4, 8, 8)
        layer = torch.nn.GRU(inputs.shape[-1], 6, batch_first=True)
        # torch.nn.GRU's gates come in the same order.
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        layer.load_state_dict(dict(zip(names, (weight, recurrent, bias, recurrent_bias), strict=True)))
        with torch.no_grad():
            states = layer(inputs)[0]
            expected = F.linear(states if table else states[:, -1], out, out_bias)
            torch.testing.assert_close(network(params, x, 4)[0], expected)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_optimizers_see_the_fan_in_that_torchs_layers_have(name):
    network = suites.task(name).network
    inputs = [math.prod(start.shape[1:]) for start in network.starts if len(start.shape) > 1]
    if isinstance(network, tasks.MLP | tasks.Conv) and not getattr(network, "normed", False):
        model = in_torch(network)
        assert inputs == [math.prod(param.shape[1:]) for param in model.parameters() if param.dim() > 1]
    elif isinstance(network, tasks.ResNet):
        assert inputs == [9, *[9 * 12] * 4, 12]
    elif isinstance(network, tasks.RowsGRU):
        assert inputs == [8, 24, 24]
    elif isinstance(network, tasks.TextGRU):
        assert inputs == [16, 16, 32, 32]  # torch.nn.Embedding's [44, 16] first
    elif isinstance(network, tasks.Transformer):
        assert inputs == [4, 16, *[16, 16, 16, 32] * 2, 16]
    else:
        assert inputs == [64, 48, 48]


def test_an_mlp_starts_as_torchs_layers_do():
    starts = tasks.MLP(64, 32, 10).starts
    layers = [torch.nn.Linear(64, 32), torch.nn.Linear(32, 10)]
    params = [param for layer in layers for param in layer.parameters()]
    for start, param in zip(starts, params, strict=True):
        assert math.prod(start.shape) == param.numel()
        assert start.bound >= param.abs().max() > 0.6 * start.bound
