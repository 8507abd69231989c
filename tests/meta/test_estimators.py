"""The estimators against each other where theory says they agree."""

import itertools

import pytest
import torch
from torch import Tensor

from lopt import HRNNConfig, MetaParams
from lopt.meta.estimators import ES, PES, Estimator, TruncatedBPTT, chosen
from lopt.meta.tasks import Data, Params, Random, Task
from lopt.meta.unroll import Augment, Draw, Mix, Objective, World

CONFIG = HRNNConfig(level_sizes=(2, 2, 2), timescales=2)
FIXED = Augment(lr=(0.05, 0.05), lr_tensor=0.0, lr_param=0.0, loss_scale=(1.0, 1.0))
UNROLLS, STEPS = 3, 3


class Fixed(Task):
    """The same smooth problem in every row."""

    shapes = ((2,), (1,))

    def start(self, count: int, random: Random, data: Data) -> list[Tensor]:
        return [torch.tensor([1.0, -2.0]).expand(count, 2), torch.full((count, 1), 0.5)]

    def loss(self, params: Params, data: Data) -> Tensor:
        return (torch.tensor([1.0, 5.0]) * params[0].square()).sum(-1) + (params[0][:, 0] + params[1][:, 0]) ** 2 + 0.1


class Slope(Fixed):
    """Gradients that do not depend on the parameters."""

    def loss(self, params: Params, data: Data) -> Tensor:
        return 10 + params[0] @ torch.tensor([1.0, -3.0]) + params[1][:, 0]


def world(task: Task, rows: int, repeat: int, seed: int = 0) -> World:
    random = Random(torch.Generator().manual_seed(seed), repeat)
    return World(Mix([task], CONFIG), rows, random, Draw(UNROLLS * STEPS), FIXED, Objective(), staggered=False)


def meta() -> MetaParams:
    return MetaParams.init(CONFIG, seed=3)


def whole_gradient() -> Tensor:
    """Exact gradient of the mean meta-loss of all unrolls: one unroll of the whole episode."""
    return TruncatedBPTT(second_order=True)(meta(), world(Fixed(), 1, 1), UNROLLS * STEPS).grad


def samples(estimator: Estimator, unrolls: int, pairs: int, repeats: int) -> Tensor:
    """[repeats, M] independent estimates, each the mean over an episode's unrolls."""
    out = []
    for seed in range(repeats):
        own = world(Fixed(), 2 * pairs, 2, seed)
        out.append(torch.stack([estimator(meta(), own, STEPS).grad for _ in range(unrolls)]).mean(0))
    return torch.stack(out)


def mean_square_score(estimates: Tensor, truth: Tensor) -> float:
    """Mean over meta-parameters of ((mean estimate - truth) / standard error)^2: 1 for an unbiased estimator."""
    error = estimates.std(0) / len(estimates) ** 0.5
    return ((estimates.mean(0) - truth) / error).square().mean().item()


def test_first_and_second_order_agree_where_gradients_are_constant_and_only_there():
    for task, agree in ((Slope(), True), (Fixed(), False)):
        first, second = (
            TruncatedBPTT(second_order=order)(meta(), world(task, 2, 1), 6).grad for order in (False, True)
        )
        assert torch.allclose(first, second, rtol=1e-4, atol=1e-6 * second.abs().max()) == agree


def test_second_order_gradient_is_that_of_finite_differences():
    grad = whole_gradient()
    base = meta().flat()
    direction = torch.randn(len(base), generator=torch.Generator().manual_seed(0))
    step = 1e-2 / direction.norm()
    losses = [
        TruncatedBPTT()(
            MetaParams.from_flat(CONFIG, base + sign * step * direction), world(Fixed(), 1, 1), UNROLLS * STEPS
        ).loss
        for sign in (1, -1)
    ]
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx((grad @ direction).item(), rel=2e-2)


def test_es_on_one_unroll_is_unbiased():
    truth = TruncatedBPTT(second_order=True)(meta(), world(Fixed(), 1, 1), STEPS).grad
    estimates = samples(ES(0.003), 1, 256, 24)
    assert mean_square_score(estimates, truth) < 2


@pytest.mark.parametrize("reuse", [1, 2])
def test_pes_over_unrolls_is_unbiased(reuse):
    truth = whole_gradient()
    estimates = samples(PES(0.003, reuse), UNROLLS, 256, 24)
    # 24 repeats: each score is a t variable of 23 degrees of freedom, mean square 1.1; the mean over 100 dependent
    # meta-parameters stays below 2. The error that would be seen is stated by the bias of plain ES.
    assert mean_square_score(estimates, truth) < 2
    assert estimates.mean(0) @ truth / truth.norm() ** 2 == pytest.approx(1, abs=0.15)


def test_pes_of_some_meta_parameters_is_their_part_of_the_gradient():
    names = ("log_lr.*", "direction.weight")
    some, truth = chosen(CONFIG, names), whole_gradient()
    assert some.sum() == 2 + 1 + 1 + 2  # log_lr's weight, bias and momentum, the direction's weight of 2 hidden units
    estimates = samples(PES(0.003, only=names), UNROLLS, 256, 24)
    assert (estimates[:, ~some] == 0).all()
    assert mean_square_score(estimates[:, some], truth[some]) < 2
    with pytest.raises(ValueError, match=r"only='nonsense': no meta-parameter has this name; there are .*log_lr.bias"):
        samples(PES(0.003, only=("nonsense",)), 1, 2, 1)


def test_es_over_unrolls_is_biased():
    assert mean_square_score(samples(ES(0.003), UNROLLS, 256, 24), whole_gradient()) > 5


def test_pes_changes_its_noise_only_when_it_is_used_up():
    own, estimator = world(Fixed(), 4, 2), PES(0.01, reuse=2)
    noise = []
    for _ in range(2 * UNROLLS):
        estimator(meta(), own, STEPS)
        noise.append(own.noise)
    assert [a is b for a, b in itertools.pairwise(noise)] == [True, False, True, False, True]
    torch.testing.assert_close(own.perturbation[:, 0], noise[3] + noise[5])  # restarted with the fourth unroll


def test_pes_forgets_noise_at_a_restart():
    own = world(Fixed(), 4, 2)
    estimator = PES(0.01)
    norms = []
    for _ in range(UNROLLS + 1):
        estimator(meta(), own, STEPS)
        norms.append(own.perturbation.norm().item())
    assert norms[2] > 1.4 * norms[0]
    assert norms[3] < 1.2 * norms[0]


def test_rows_of_one_pair_differ_only_by_their_noise():
    own = world(Fixed(), 4, 2)
    PES(0.0 + 1e-30)(meta(), own, STEPS)
    torch.testing.assert_close(own.theta[:2], own.theta[2:], rtol=0, atol=0)
    with pytest.raises(ValueError, match="antithetic pairs need"):
        PES()(meta(), world(Fixed(), 4, 1), STEPS)
