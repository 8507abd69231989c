"""The families of Wichrowska et al. 2017 (section 5 and the published code), and its set of 101 tasks.

Formulas, and the settings of `paper_tasks`, those meta-trained on, are the original's; a parameter is called x here
where the formula has one tensor. `off_by_default` has further ones the original ships, in sizes of ours and with labels
that are right. Data are drawn anew for every copy, where the original fixes them per task.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lopt.meta.tasks.base import Data, LogOf, Noisy, Params, Random, Rescaled, Sparse, Sum, Task

EPS = 1e-6
L2 = 1e-3  # of a classifier's penalty
RANDOM_LABELS = 0.01  # share of those of clouds, scikit-learn's default
SAMPLES = 1000  # of a classifier's data set
TEACHER_LAYERS, TEACHER_WIDTH = 6, 20


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[count, .., in], [count, in, out], [count, out] -> [count, .., out]."""
    flat = x.flatten(1, -2)
    y = flat @ weight if bias is None else torch.baddbmm(bias[:, None], flat, weight)
    return y.view(*x.shape[:-1], -1)


class Linear(Task):
    """Base of the problems in Wx - y with W [count, n, n] and y [count, n, 1] standard normal."""

    def __init__(self, n: int) -> None:
        self.shapes = ((n, 1),)

    def instance(self, count: int, random: Random) -> Data:
        n = self.shapes[0][0]
        return {"w": random.normal(count, n, n), "y": random.normal(count, n, 1)}

    def residual(self, params: Params, data: Data) -> Tensor:
        """[count, n]."""
        return (data["w"] @ params[0] - data["y"])[..., 0]


class Quadratic(Linear):
    """||Wx - y||^2 / 2."""

    def loss(self, params: Params, data: Data) -> Tensor:
        return 0.5 * self.residual(params, data).square().sum(-1)


class Norm(Linear):
    """(sum (|Wx - y| + 1e-6)^p)^(1/p)."""

    def __init__(self, n: int, power: float) -> None:
        super().__init__(n)
        self.power = power

    def loss(self, params: Params, data: Data) -> Tensor:
        return ((self.residual(params, data).abs() + EPS) ** self.power).sum(-1) ** (1 / self.power)


class Constants:
    """Tensors of a task, copied once to each device: a copy in every step would wait for it."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}

    def like(self, other: Tensor) -> tuple[Tensor, ...]:
        """Them, with the device and the dtype of another tensor."""
        key = other.device, other.dtype
        if key not in self._copies:
            self._copies[key] = tuple(tensor.to(other) for tensor in self._tensors)
        return self._copies[key]


class Bowl(Task):
    """||Ax||^2 / 2 in two dimensions, A = diag(sqrt(condition), 1) times a rotation."""

    shapes = ((2, 1),)

    def __init__(self, condition: float, angle: float = 0.0) -> None:
        cos, sin, root = math.cos(angle), math.sin(angle), math.sqrt(condition)
        self.constants = Constants(torch.tensor([[root * cos, -root * sin], [sin, cos]]))

    def loss(self, params: Params, data: Data) -> Tensor:
        (matrix,) = self.constants.like(params[0])
        return 0.5 * (matrix @ params[0]).square().sum((-2, -1))


class Function2D(Task):
    """A test function of x and y that starts uniformly in a box.

    Args:
        function: [count], [count] -> [count].
        box: ((low, high) of x, (low, high) of y), or None to start standard normal.
    """

    shapes = ((2,),)
    weight = 0.25

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor], box: tuple[tuple[float, float], tuple[float, float]] | None
    ) -> None:
        self.function, self.box = function, box

    def start(self, count: int, random: Random, data: Data) -> list[Tensor]:
        if self.box is None:
            return super().start(count, random, data)
        return [torch.stack([random.uniform(count, low=low, high=high) for low, high in self.box], -1)]

    def loss(self, params: Params, data: Data) -> Tensor:
        return self.function(*params[0].unbind(-1))


def rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def log_sum_exp(x: Tensor, y: Tensor) -> Tensor:
    return torch.logsumexp(torch.stack([x + 3 * y - 0.1, x - 3 * y - 0.1, -x - 0.1, torch.zeros_like(x)]), 0)


def ackley(x: Tensor, y: Tensor) -> Tensor:
    waves = torch.cos(2 * math.pi * x) + torch.cos(2 * math.pi * y)
    return -20 * torch.exp(-0.2 * torch.sqrt(0.5 * (x**2 + y**2))) - torch.exp(0.5 * waves) + math.e + 20


def beale(x: Tensor, y: Tensor) -> Tensor:
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def booth(x: Tensor, y: Tensor) -> Tensor:
    return (x + 2 * y - 7) ** 2 + (2 * x + y - 5) ** 2


def styblinski_tang(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (x**4 - 16 * x**2 + 5 * x + y**4 - 16 * y**2 + 5 * y) + 80


def matyas(x: Tensor, y: Tensor) -> Tensor:
    return 0.26 * (x**2 + y**2) - 0.48 * x * y


def branin(x: Tensor, y: Tensor) -> Tensor:
    valley = y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6
    return valley**2 + 10 * (1 - 1 / (8 * math.pi)) * torch.cos(x) + 10


def michalewicz(x: Tensor, y: Tensor) -> Tensor:
    return 2 - (torch.sin(x) * torch.sin(x**2 / math.pi) ** 10 + torch.sin(y) * torch.sin(2 * y**2 / math.pi) ** 10)


def saddle(x: Tensor, y: Tensor) -> Tensor:
    return x**2 - y**2


FUNCTIONS_2D = {
    "rosenbrock": (rosenbrock, ((-5.0, 10.0), (-5.0, 10.0))),
    "logsumexp": (log_sum_exp, None),
    "ackley": (ackley, ((-32.768, 32.768), (-32.768, 32.768))),
    "beale": (beale, ((-4.5, 4.5), (-4.5, 4.5))),
    "booth": (booth, ((-10.0, 10.0), (-10.0, 10.0))),
    "styblinski_tang": (styblinski_tang, ((-5.0, 5.0), (-5.0, 5.0))),
    "matyas": (matyas, ((-10.0, 10.0), (-10.0, 10.0))),
    "branin": (branin, ((-5.0, 10.0), (0.0, 15.0))),
    "michalewicz": (michalewicz, ((0.0, math.pi), (0.0, math.pi))),
}


class MatMul(Task):
    """How well k products multiply n x n matrices: least squares over all n^4 pairs of one-hot matrices."""

    def __init__(self, n: int, k: int) -> None:
        if not n * n <= k <= n**3:
            raise ValueError(f"MatMul({n}, {k}): k must be in n^2..n^3 = {n * n}..{n**3}")
        self.shapes = ((n * n, k), (n * n, k))
        one_hot = torch.eye(n * n).view(n * n, n, n)
        left, right = one_hot.repeat_interleave(n * n, 0), one_hot.repeat(n * n, 1, 1)
        self.constants = Constants(*(m.reshape(n**4, n * n) for m in (left, right, left @ right)))

    def start(self, count: int, random: Random, data: Data) -> list[Tensor]:
        return [F.normalize(param, dim=-2) for param in super().start(count, random, data)]

    def loss(self, params: Params, data: Data) -> Tensor:
        left, right, target = self.constants.like(params[0])
        p = (left @ params[0]) * (right @ params[1])
        solution = torch.linalg.solve_ex(p.mT @ p, p.mT @ target).result
        return (p @ solution - target).square().sum((-2, -1))


class Batches(Task):
    """Base of tasks with a data set {"x": [count, m, ..], "y": [count, m]} and minibatches without replacement.

    An order of the m samples is cut into consecutive slices and drawn anew when the next slice would pass its end.

    Args:
        batch: samples of a minibatch; None: all.
    """

    batch: int | None = None

    def minibatch(self, data: Data, count: int, random: Random) -> Data:
        m = data["x"].shape[1]
        if self.batch is None or self.batch >= m:
            return data
        if data.get("position", m) + self.batch > m:
            data["order"], data["position"] = random.permutation(count, m), 0
        rows = data["order"][:, data["position"] : data["position"] + self.batch]
        data["position"] += self.batch
        index = torch.arange(count, device=rows.device)[:, None]
        return {**data, "x": data["x"][index, rows], "y": data["y"][index, rows]}


class Classifier(Batches):
    """Two classes, one logit: mean sigmoid cross-entropy and a penalty. Of the two outputs only the first is used."""

    def __init__(self, shapes: tuple[tuple[int, ...], ...], batch: int | None) -> None:
        self.shapes, self.batch = shapes, batch

    def start(self, count: int, random: Random, data: Data) -> list[Tensor]:
        return [1.2 / math.sqrt(shape[0]) * random.normal(count, *shape) for shape in self.shapes]

    def logits(self, params: Params, x: Tensor) -> Tensor:
        """[count, m, 2]."""
        raise NotImplementedError

    def loss(self, params: Params, data: Data) -> Tensor:
        logits = self.logits(params, data["x"])[..., 0]
        entropy = F.binary_cross_entropy_with_logits(logits, data["y"].to(logits), reduction="none").mean(-1)
        penalty = torch.stack([param.square().flatten(1).sum(-1) for param in params]).mean(0)
        return entropy + L2 * penalty


class Softmax(Classifier):
    """Linear classifier of two clouds, each two normal clusters at corners of a cube with half-width `separation`; a
    hundredth of the labels are drawn at random."""

    def __init__(self, features: int, separation: float = 1.0, batch: int | None = None) -> None:
        super().__init__(((features, 2), (2,)), batch)
        self.separation = separation

    def instance(self, count: int, random: Random) -> Data:
        n = self.shapes[0][0]
        corner = random.integers(count, SAMPLES, high=4)
        centers = self.separation * (2 * random.integers(count, 4, n, high=2) - 1)
        spread = 2 * random.uniform(count, 4, n, n) - 1  # each cluster has a covariance of its own
        noise = random.normal(count, SAMPLES, n)
        x = torch.zeros_like(noise)
        for cluster in range(4):
            x += (corner == cluster)[..., None] * (noise @ spread[:, cluster] + centers[:, cluster, None])
        drawn = random.integers(count, SAMPLES, high=2)
        labels = torch.where(random.uniform(count, SAMPLES) < RANDOM_LABELS, drawn, corner % 2)
        return {"x": x, "y": labels.float()}

    def logits(self, params: Params, x: Tensor) -> Tensor:
        return affine(x, *params)


class FullyConnected(Classifier):
    """Sigmoid network that learns the labels of a random ReLU network."""

    def __init__(self, features: int, hidden: tuple[int, ...], batch: int | None = None) -> None:
        widths = (features, *hidden, 2)
        shapes: list[tuple[int, ...]] = []
        for fan_in, fan_out in zip(widths, widths[1:], strict=False):
            shapes += [(fan_in, fan_out), (fan_out,)]
        super().__init__(tuple(shapes), batch)

    def instance(self, count: int, random: Random) -> Data:
        features = self.shapes[0][0]
        x = random.normal(count, SAMPLES, features)
        y = x
        for _ in range(TEACHER_LAYERS):
            weight = math.sqrt(2 / features) * random.normal(count, y.shape[-1], TEACHER_WIDTH)
            y = torch.relu(y @ weight)
        return {"x": x, "y": (y[..., 0] > 0).float()}

    def logits(self, params: Params, x: Tensor) -> Tensor:
        for layer in range(0, len(params) - 2, 2):
            x = torch.sigmoid(affine(x, params[layer], params[layer + 1]))
        return affine(x, params[-2], params[-1])


class SparseSoftmax(Classifier):
    """Sums of embeddings of the ids in a row (0 or 1), then a linear classifier of their parity.

    Args:
        one_hot: look embeddings up by a matrix product.
    """

    def __init__(self, features: int = 5, ids: int = 5, batch: int | None = None, *, one_hot: bool = False) -> None:
        super().__init__(((2, features), (features, 2), (2,)), batch)
        self.ids, self.one_hot = ids, one_hot

    def instance(self, count: int, random: Random) -> Data:
        x = random.integers(count, SAMPLES, self.ids, high=2)
        return {"x": x, "y": (x.sum(-1) % 2).float()}

    def logits(self, params: Params, x: Tensor) -> Tensor:
        embeddings, weight, bias = params
        if self.one_hot:
            chosen = F.one_hot(x.long(), embeddings.shape[1]).to(embeddings) @ embeddings[:, None]
        else:
            copies = torch.arange(len(embeddings), device=x.device).view(-1, 1, 1)
            chosen = embeddings[copies, x.long()]
        return affine(chosen.sum(-2), weight, bias)


class ConvNet(Classifier):
    """Convolutions without bias, stride 1 and "same" padding, then a linear classifier of random images.

    Args:
        image: height, width, channels; channels are last.
        filters: height, width, output channels of each convolution.
        activation: after each convolution.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        filters: tuple[tuple[int, int, int], ...],
        batch: int | None = None,
        activation: Callable[[Tensor], Tensor] = torch.relu,
    ) -> None:
        height, width, channels = self.image = image
        self.activation = activation
        shapes: list[tuple[int, ...]] = []
        for rows, columns, out in filters:
            shapes.append((rows, columns, channels, out))
            channels = out
        super().__init__((*shapes, (height * width * channels, 2), (2,)), batch)

    def instance(self, count: int, random: Random) -> Data:
        x = random.normal(count, SAMPLES, *self.image)
        flat = x.flatten(2)
        return {"x": x, "y": (flat @ random.normal(count, flat.shape[-1], 1))[..., 0].sign().clamp(0)}

    def start(self, count: int, random: Random, data: Data) -> list[Tensor]:
        return [0.01 * random.normal(count, *shape) for shape in self.shapes]

    def logits(self, params: Params, x: Tensor) -> Tensor:
        count, m = x.shape[:2]
        maps = x.permute(1, 0, 4, 2, 3).flatten(1, 2)  # [m, count * channels, height, width]: one group per copy
        for weight in params[:-2]:
            kernel = weight.permute(0, 4, 3, 1, 2).flatten(0, 1)
            maps = self.activation(F.conv2d(maps, kernel, padding="same", groups=count))
        flat = maps.unflatten(1, (count, -1)).permute(1, 0, 3, 4, 2).reshape(count, m, -1)
        return affine(flat, params[-2], params[-1])


class DependencyChain(Task):
    """sum_i x_0^2 + x_i^2 / (x_{i-1}^2 + 1e-6): parameters come to rest one after the other."""

    def __init__(self, n: int) -> None:
        self.shapes = ((n + 1,),)

    def loss(self, params: Params, data: Data) -> Tensor:
        squares = params[0].square()
        return (squares[:, :1] + squares[:, 1:] / (squares[:, :-1] + EPS)).sum(-1)


class MinMaxWell(Task):
    """max x^2 + 1 / min x^2 - 2: all gradients but two are zero."""

    def __init__(self, n: int) -> None:
        self.shapes = ((n,),)

    def loss(self, params: Params, data: Data) -> Tensor:
        squares = params[0].square()
        return squares.amax(-1) + 1 / squares.amin(-1) - 2 + 1e-12


class Probed(Batches):
    """Base of the problems on probes, [count, m, n]: random bits, or normal vectors and their negatives."""

    samples = 100

    def __init__(self, n: int, batch: int | None = None) -> None:
        self.shapes, self.batch = ((1, n),), batch

    def instance(self, count: int, random: Random) -> Data:
        half = random.normal(count, self.samples // 2, self.shapes[0][-1])
        return {"x": torch.cat([half, -half], 1), "y": half.new_zeros(count, self.samples)}


class OutwardSnake(Probed):
    """A winding valley to infinity."""

    def __init__(self, n: int, batch: int | None = None) -> None:
        super().__init__(n, batch)
        self.shapes = ((n,),)

    def instance(self, count: int, random: Random) -> Data:
        bits = random.integers(count, self.samples, self.shapes[0][0], high=2).float()
        return {"x": bits, "y": bits.new_zeros(count, self.samples)}

    def loss(self, params: Params, data: Data) -> Tensor:
        x, bits = params[0], data["x"]
        radius = torch.linalg.vector_norm(x, dim=-1)
        off = x[:, 1:] - torch.cos(x[:, :-1]) * math.pi
        return (bits[..., 0] / (radius[:, None] + 1e-6)).sum(-1) + (off[:, None] * bits[..., 1:]).square().sum((-2, -1))


class ProjectionQuadratic(Probed):
    """sum (x * probe)^2."""

    def loss(self, params: Params, data: Data) -> Tensor:
        return (params[0] * data["x"]).square().sum((-2, -1))


class SumOfQuadratics(Probed):
    """sum (x - probe)^2 less its value at 0, over symmetric probes."""

    def loss(self, params: Params, data: Data) -> Tensor:
        probes = data["x"]
        return (params[0] - probes).square().sum((-2, -1)) - probes.square().sum((-2, -1)) + 1e-12


def _function(name: str) -> Task:
    return Function2D(*FUNCTIONS_2D[name])


def _bowls() -> list[Task]:
    return [Bowl(0.1), Bowl(1.0), Bowl(5.0), Bowl(5.0, math.pi / 4)]


def _softmax() -> list[Task]:
    return [
        Softmax(features, separation, batch)
        for features, separation, batch in [(10, 2.0, 100), (100, 1.0, 50), (200, 1.5, 20), (256, 1.5, 100)]
    ]


def _nets() -> list[Task]:
    hidden = [
        (8, (8, 5)),
        (12, (8, 5, 3)),
        (5, (4, 4, 4, 4)),
        (11, (4, 5, 6)),
        (9, (8,)),
        (7, (8, 5)),
        (8, (32, 64)),
        (12, (16, 8, 3)),
        (5, (8, 8, 8, 8)),
        (11, (10, 12, 12)),
        (9, (32,)),
        (7, (32, 64)),
    ]
    batches = [10, 200, 100, 64, 128, 16] * 2
    return [FullyConnected(features, widths, batch) for (features, widths), batch in zip(hidden, batches, strict=True)]


def _log_children() -> list[Task]:
    return [*(Quadratic(n) for n in (20, 50, 100)), *(Bowl(condition) for condition in (0.1, 1.0, 5.0))]


def _sums() -> list[list[Task]]:
    quadratics: list[Task] = [Quadratic(n) for n in (11, 3, 9, 7, 5, 13, 12)]
    nine = [_function(name) for name in FUNCTIONS_2D]
    return [
        quadratics,
        [Norm(18, 3), Quadratic(25), _function("rosenbrock")],
        nine,
        [*nine, Quadratic(5), Quadratic(13)],
        [Quadratic(11), Quadratic(3)],
        [_function(name) for name in ("rosenbrock", "logsumexp", "ackley")],
    ]


def paper_tasks() -> dict[str, list[Task]]:
    """The 101 tasks of the original's meta-training set, by family."""
    sums = _sums()
    return {
        "quadratic_noisy": [Noisy(Quadratic(n), std) for n, std in [(20, 0.5), (25, 0.0), (50, 1.0), (100, 2.0)]],
        "quadratic_large": [Quadratic(n) for n in (784, 1024, 2048)],
        "bowl": _bowls(),
        "bowl_noisy": [Noisy(task, 0.1) for task in _bowls()],
        "softmax": _softmax(),
        "softmax_noisy": [Noisy(task, std) for task, std in zip(_softmax(), (0.5, 0.1, 0.1, 0.5), strict=True)],
        "function_2d": [_function(name) for name in FUNCTIONS_2D],
        "function_2d_noisy": [Noisy(_function(name), 1.0) for name in FUNCTIONS_2D],
        "fully_connected": _nets(),
        "matmul": [MatMul(n, k) for n, low, high in [(2, 5, 8), (3, 19, 24)] for k in range(low, high + 1)],
        "log": [LogOf(task) for task in _log_children()],
        "rescale": [
            *(Rescaled(Norm(18, p), s) for p, s in [(2.5, 0.123), (1.5, 8), (2.0, 50), (3.0, 200), (1.0, 1000)]),
            *(Rescaled(Quadratic(n), s) for n, s in [(20, 0.1), (25, 10.0), (50, 350.0), (100, 132.0)]),
        ],
        "norm": [Norm(n, p) for n, p in [(27, 1.0), (25, 2.0), (22, 3.0)]],
        "norm_noisy": [Noisy(Norm(n, p), 0.1) for n, p in [(19, 1.0), (26, 2.0), (23, 3.0)]],
        "sum": [Sum(*tasks) for tasks in sums],
        "sum_noisy": [Sum(*tasks) for tasks in (sums[0], sums[3])],  # the original ignores their children's noise
        "sparse": [Sparse(task) for task in _log_children()],
        "sparse_fully_connected": [Sparse(task) for task in _nets()[:3]],
    }


def off_by_default() -> dict[str, list[Task]]:
    """Further tasks that the original has and does not meta-train on by default."""
    sizes = [3, 5, 8, 10, 15, 20, 25, 30, 40, 50]
    return {
        "quadratic": [Quadratic(n) for n in (20, 25, 50, 100)],
        "sparse_softmax": [SparseSoftmax(batch=10)],
        "one_hot_sparse_softmax": [SparseSoftmax(batch=10, one_hot=True)],
        "min_max_well": [MinMaxWell(n) for n in (20, 30, 50, 80, 100)],
        "sum_of_quadratics": [SumOfQuadratics(n, 10) for n in sizes],
        "projection_quadratic": [ProjectionQuadratic(n, 10) for n in sizes],
        "outward_snake": [OutwardSnake(n, 10) for n in sizes],
        "dependency_chain": [DependencyChain(n) for n in sizes],
    }
