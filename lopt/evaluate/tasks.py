"""Tasks on real data, none of them used in meta-training: its tasks are all synthetic.

The data ship inside scikit-learn and Python. Every task has a fixed split, 80 % for training; features and targets are
standardised by their means and deviations over the training part. A network is a function of its parameters with a
leading dimension of independent copies; parameters start as torch.nn's layers of the same kind do.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import math
import string
import typing
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lopt.meta.tasks import networks, paper

Params = Sequence[Tensor]  # one [count, *shape] per parameter tensor
Activation = Callable[[Tensor], Tensor]

SOURCES = {"code": dataclasses, "typing": typing}
TEST_SHARE = 0.2
NORM_EPS = 1e-5


class Start(NamedTuple):
    """How one parameter tensor starts: `value` plus a uniform number in [-bound, bound)."""

    shape: tuple[int, ...]  # torch.nn's, outputs first; a kernel's other dimensions are one
    bound: float = 0.0
    value: float = 0.0


def linear(inputs: int, outputs: int, *, bias: bool = True) -> list[Start]:
    """As torch.nn.Linear."""
    bound = 1 / math.sqrt(inputs)
    return [Start((outputs, inputs), bound)] + ([Start((outputs,), bound)] if bias else [])


def norm(channels: int) -> list[Start]:
    """Scale and shift of a normalisation."""
    return [Start((channels,), value=1.0), Start((channels,))]


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[count, .., in], [count, out, in], [count, out] -> [count, .., out]."""
    return paper.affine(x, weight.mT, bias)


class Network:
    """Base of the networks: `starts` lists the parameter tensors, a call maps samples to outputs.

    Attributes:
        uses: of each parameter in a sample, about: positions of an image or a sequence.
    """

    starts: list[Start]
    uses = 1

    def __call__(self, params: Params, x: Tensor, fit: int) -> Tensor:
        """Outputs [count, m, ..] of samples [count, m, ..]; batch statistics are those of the first `fit` samples."""
        raise NotImplementedError


def _shifted(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    shape = (len(x), *[1] * (x.dim() - 2), -1)
    return torch.addcmul(shift.view(shape), x, scale.view(shape))


def batch_norm(x: Tensor, scale: Tensor, shift: Tensor, fit: int) -> Tensor:
    """Over the first `fit` samples and all positions: [count, m, .., c], [count, c], [count, c]."""
    axes = tuple(range(1, x.dim() - 1))
    mean = x[:, :fit].mean(axes, keepdim=True)
    variance = (x[:, :fit] - mean).square().mean(axes, keepdim=True)
    return _shifted((x - mean) * torch.rsqrt(variance + NORM_EPS), scale, shift)


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Over the last dimension: [count, .., c], [count, c], [count, c]."""
    return _shifted(F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), scale, shift)


class MLP(Network):
    """Fully connected layers.

    Args:
        widths: inputs, hidden layers, outputs; two of them are a linear model.
        activation: after each hidden layer. normed: layer normalisation before it.
    """

    def __init__(self, *widths: int, activation: Activation = torch.relu, normed: bool = False) -> None:
        self.activation, self.normed = activation, normed
        *hidden, last = zip(widths, widths[1:], strict=False)
        self.starts = []
        for inputs, outputs in hidden:
            self.starts += linear(inputs, outputs) + (norm(outputs) if normed else [])
        self.starts += linear(*last)

    def __call__(self, params: Params, x: Tensor, fit: int) -> Tensor:
        each = 4 if self.normed else 2
        for begin in range(0, len(params) - 2, each):
            weight, bias, *scale_shift = params[begin : begin + each]
            x = affine(x, weight, bias)
            x = self.activation(layer_norm(x, *scale_shift) if self.normed else x)
        return affine(x, *params[-2:])


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """3 x 3 "same" convolution of channels-last images, [count, m, h, w, c] with [count, out, 9 c]."""
    height, width = x.shape[2:4]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    columns = [padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return affine(torch.cat(columns, -1), kernel)


def pool(x: Tensor) -> Tensor:
    """Mean over 2 x 2 positions: [count, m, h, w, c] -> [count, m, h/2, w/2, c]."""
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))


class Conv(Network):
    """Convolutions with biases on 8 x 8 images, and a linear classifier; images are pooled after the first two of them.

    Args:
        widths: channels of each convolution, and classes.
        activation: after each convolution, before pooling.
    """

    uses = 24

    def __init__(self, *widths: int, activation: Activation = torch.relu) -> None:
        *channels, classes = widths
        self.activation, self.pooled = activation, min(2, len(channels))
        pairs = zip((1, *channels), channels, strict=False)
        kernels = [start for inputs, outputs in pairs for start in linear(9 * inputs, outputs)]
        self.starts = kernels + linear((8 >> self.pooled) ** 2 * channels[-1], classes)

    def __call__(self, params: Params, x: Tensor, fit: int) -> Tensor:
        x = x.unflatten(-1, (8, 8, 1))
        for place in range(len(params) // 2 - 1):
            kernel, bias = params[2 * place : 2 * place + 2]
            x = self.activation(convolve(x, kernel) + bias.view(len(bias), 1, 1, 1, -1))
            x = pool(x) if place < self.pooled else x
        return affine(x.flatten(2), *params[-2:])


class ResNet(Network):
    """Pre-activation residual blocks with batch normalisation on 8 x 8 images, mean over positions, linear classifier.

    Args:
        width: channels. blocks: of two convolutions each; images are pooled 2 x 2 before each.
    """

    uses = 12

    def __init__(self, width: int, blocks: int, classes: int) -> None:
        self.blocks = blocks

        def kernel(inputs: int) -> list[Start]:
            bound = math.sqrt(3 * 2 / (9 * inputs))  # variance 2 / fan in: He et al. 2015
            return [Start((width, 9 * inputs), bound)]

        block = norm(width) + kernel(width)
        self.starts = kernel(1) + block * 2 * blocks + norm(width) + linear(width, classes)

    def __call__(self, params: Params, x: Tensor, fit: int) -> Tensor:
        x = convolve(x.unflatten(-1, (8, 8, 1)), params[0])
        for block in range(self.blocks):
            x = y = pool(x)
            for half in range(2):
                scale, shift, kernel = params[(begin := 1 + 6 * block + 3 * half) : begin + 3]
                y = convolve(torch.relu(batch_norm(y, scale, shift, fit)), kernel)
            x = x + y
        x = torch.relu(batch_norm(x, params[-4], params[-3], fit))
        return affine(x.mean((2, 3)), *params[-2:])


def _gru_starts(inputs: int, size: int) -> list[Start]:
    bound = 1 / math.sqrt(size)
    shapes = ((3 * size, inputs), (3 * size,), (3 * size, size), (3 * size,))
    return [Start(shape, bound) for shape in shapes]


def gru(x: Tensor, params: Params) -> list[Tensor]:
    """Hidden states [count, m, size] after each of the inputs [count, m, length, in]; torch.nn.GRU's parameters."""
    weight, bias, recurrent, recurrent_bias = params
    return networks.gru(x, (weight.mT, bias, recurrent.mT, recurrent_bias))


class RowsGRU(Network):
    """A GRU that reads the 8 rows of an image, and a linear classifier of its last state."""

    uses = 8

    def __init__(self, size: int, classes: int) -> None:
        self.starts = _gru_starts(8, size) + linear(size, classes)

    def __call__(self, params: Params, x: Tensor, fit: int) -> Tensor:
        return affine(gru(x.unflatten(-1, (8, 8)), params[:4])[-1], *params[4:])


def _embedding(characters: int, width: int) -> Start:
    return Start((characters, width), math.sqrt(3.0))  # variance 1, as torch.nn.Embedding


def _embed(x: Tensor, table: Tensor) -> Tensor:
    """[count, m, length], [count, characters, width] -> [count, m, length, width]."""
    return paper.affine(F.one_hot(x, table.shape[1]).to(table), table)


class TextGRU(Network):
    """Predicts each next character of a text: embedding, GRU, linear; [count, m, length] -> [.., characters]."""

    uses = 16

    def __init__(self, characters: int, embedding: int, size: int) -> None:
        self.starts = [_embedding(characters, embedding)] + _gru_starts(embedding, size) + linear(size, characters)

    def __call__(self, params: Params, x: Tensor, fit: int) -> Tensor:
        return affine(torch.stack(gru(_embed(x, params[0]), params[1:5]), 2), *params[5:])


class Blocks:
    """Pre-norm transformer blocks: attention, and two layers with a GELU between them, of twice the width.

    Args:
        width: of the tokens. heads: that divide it. count: of blocks.
        causal: whether a token sees none behind it.
    """

    def __init__(self, width: int, heads: int, count: int, *, causal: bool = False) -> None:
        self.heads, self.causal = heads, causal
        block = norm(width) + linear(width, 3 * width) + linear(width, width)
        block += norm(width) + linear(width, 2 * width) + linear(2 * width, width)
        self.each, self.starts = len(block), block * count

    def __call__(self, params: Params, h: Tensor) -> Tensor:
        """[count, m, tokens, width] -> the same; `params` are those of `starts`."""
        for begin in range(0, len(params), self.each):
            own = params[begin : begin + self.each]
            read = affine(layer_norm(h, *own[:2]), *own[2:4]).unflatten(-1, (3, self.heads, -1))
            query, key, value = read.movedim(-3, 0).transpose(-3, -2)  # [count, m, heads, tokens, width / heads] each
            scores = query @ key.mT / math.sqrt(query.shape[-1])
            if self.causal:
                scores = scores + torch.full(scores.shape[-2:], -math.inf).triu(1)
            seen = torch.softmax(scores, -1) @ value
            h = h + affine(seen.transpose(-3, -2).flatten(-2), *own[4:6])
            h = h + affine(F.gelu(affine(layer_norm(h, *own[6:8]), *own[8:10])), *own[10:12])
        return h


def _positions(tokens: int, width: int) -> Start:
    return Start((tokens, width), 0.02 * math.sqrt(3.0))


class Transformer(Network):
    """Pre-norm transformer on the 2 x 2 patches of an 8 x 8 image, mean over tokens, linear classifier."""

    uses = 20

    def __init__(self, width: int, heads: int, blocks: int, classes: int) -> None:
        self.blocks = Blocks(width, heads, blocks)
        self.starts = linear(4, width) + [_positions(16, width)] + self.blocks.starts
        self.starts += norm(width) + linear(width, classes)

    def __call__(self, params: Params, x: Tensor, fit: int) -> Tensor:
        patches = x.unflatten(-1, (4, 2, 4, 2)).transpose(3, 4).flatten(4).flatten(2, 3)  # [count, m, 16, 4]
        h = affine(patches, *params[:2]) + params[2][:, None]
        return affine(layer_norm(self.blocks(params[3:-4], h), *params[-4:-2]).mean(2), *params[-2:])


class TextTransformer(Network):
    """Predicts each next character of a text of `length` characters: embedding, causal blocks, linear."""

    def __init__(self, characters: int, length: int, width: int, heads: int, blocks: int) -> None:
        self.uses = length
        self.blocks = Blocks(width, heads, blocks, causal=True)
        self.starts = [_embedding(characters, width), _positions(length, width)] + self.blocks.starts
        self.starts += norm(width) + linear(width, characters)

    def __call__(self, params: Params, x: Tensor, fit: int) -> Tensor:
        h = _embed(x, params[0]) + params[1][:, None]
        return affine(layer_norm(self.blocks(params[2:-4], h), *params[-4:-2]), *params[-2:])


class DataSet(NamedTuple):
    """Standardised samples and targets; the first `train` of them are for training."""

    x: Tensor  # [m, ..]
    y: Tensor  # [m, ..], integers for classes, floats to regress
    train: int


def _split(x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor, int]:
    order = np.random.default_rng(0).permutation(len(x))
    return torch.from_numpy(x[order]), torch.from_numpy(y[order]), len(x) - round(TEST_SHARE * len(x))


def _standardised(values: Tensor, train: int, *, by_feature: bool) -> Tensor:
    values = values.double()
    fit = values[:train]
    mean, deviation = (fit.mean(0), fit.std(0)) if by_feature else (fit.mean(), fit.std())
    return ((values - mean) / (deviation + 1e-12)).float()


@functools.cache
def data_set(name: str) -> DataSet:
    """Raises ImportError without scikit-learn."""
    from sklearn import datasets  # type: ignore[import-untyped]

    if name == "flower":
        return _flower(datasets.load_sample_image("flower.jpg"))
    if name == "text":
        names = ("breast_cancer", "california_housing", "diabetes", "digits", "iris", "wine_data")
        return _prose([datasets._base.load_descr(f"{name}.rst") for name in names])
    if name in SOURCES:
        return _text(inspect.getsource(SOURCES[name])[:60_000], " \n" + string.printable[:94], 64, 64)
    if name == "patches":
        return _patches(datasets.load_sample_image("china.jpg"))
    bunch = getattr(datasets, f"load_{name}")()
    x, y, train = _split(bunch.data, bunch.target)
    x = _standardised(x, train, by_feature=name != "digits")
    y = _standardised(y[:, None], train, by_feature=True) if name == "diabetes" else y.long()
    return DataSet(x, y, train)


def _flower(image: np.ndarray) -> DataSet:
    """Colours of a photograph's pixels by position; [m, 32] features: sines and cosines of random waves."""
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float()[None]
    small = F.adaptive_avg_pool2d(pixels, (32, 48))[0].permute(1, 2, 0).reshape(-1, 3)
    rows, columns = np.meshgrid(np.linspace(-1, 1, 32), np.linspace(-1.5, 1.5, 48), indexing="ij")
    waves = np.random.default_rng(0).normal(size=(2, 16)) * 3
    phase = np.stack([rows.ravel(), columns.ravel()], -1) @ waves
    x, y, train = _split(np.concatenate([np.sin(phase), np.cos(phase)], -1), small.numpy())
    return DataSet(x.float(), _standardised(y, train, by_feature=False), train)


def _patches(image: np.ndarray, count: int = 1797, classes: int = 10) -> DataSet:
    """8 x 8 patches of a photograph in grey that are not all of one brightness; their classes are clusters of them."""
    from sklearn.cluster import KMeans  # type: ignore[import-untyped]
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped,unused-ignore]

    grey = F.avg_pool2d(torch.from_numpy(image.copy()).double().mean(-1)[None], 2)[0].numpy()
    rng, sizes = np.random.default_rng(0), np.array(grey.shape) - 8
    rows, columns = (rng.integers(0, size, 4000) for size in sizes)
    x = np.stack([grey[row : row + 8, column : column + 8].ravel() for row, column in zip(rows, columns, strict=True)])
    x = x[x.std(1) > 8][:count]
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    train = len(x) - round(TEST_SHARE * len(x))
    with threadpool_limits(1):  # sums of several threads differ in their last bits, and results are kept by data
        y = torch.from_numpy(KMeans(classes, random_state=0, n_init=3).fit_predict(x)).long()
        x = (x - x[:train].mean()) / x[:train].std()
    return DataSet(torch.from_numpy(x).float(), y, train)


def _prose(texts: Sequence[str]) -> DataSet:
    """English prose, lower case."""
    text = " ".join(" ".join(texts).lower().split())
    return _text(text, " abcdefghijklmnopqrstuvwxyz0123456789.,:()-_", 16, 8)


def _text(text: str, characters: str, length: int, stride: int) -> DataSet:
    """A text, other characters than those left out: the targets are the next ones. The last fifth is for testing."""
    table = {character: index for index, character in enumerate(characters)}
    codes = torch.tensor([table[character] for character in text if character in table])
    windows = codes.unfold(0, length + 1, stride)
    return DataSet(windows[:, :-1].clone(), windows[:, 1:].clone(), len(windows) - round(TEST_SHARE * len(windows)))


class Task:
    """A network to be trained on a data set.

    Args:
        data: a name for `data_set`.
        network: the network.
        batch: samples of a minibatch.
        wrong: share of training labels replaced by random ones.
        reproduce: the targets are the inputs.
    """

    batched = True  # whether a step sees a minibatch, not everything

    def __init__(
        self, data: str, network: Network, *, batch: int = 32, wrong: float = 0.0, reproduce: bool = False
    ) -> None:
        self.network, self.batch = network, batch
        self.x, self.y, self.train = data_set(data)
        if reproduce:
            self.y = self.x
        if wrong:
            rng = np.random.default_rng(1)
            mask = torch.from_numpy(rng.random(len(self.y)) < wrong)
            mask[self.train :] = False
            other = torch.from_numpy(rng.integers(int(self.y.max()) + 1, size=len(self.y)))
            self.y = torch.where(mask, other, self.y)
        self.classes = not self.y.is_floating_point()
        self.starts = network.starts
        self.shapes = [start.shape for start in self.starts]
        self.sizes = [math.prod(shape) for shape in self.shapes]

    @property
    def count(self) -> int:
        """Number of parameters."""
        return sum(self.sizes)

    @property
    def cost(self) -> int:
        """Of a step, in about the same unit for all tasks: multiplications."""
        return self.batch * self.count * self.network.uses

    @property
    def digest(self) -> str:
        """Of data, start and shapes, in short: results of others are not this task's."""
        content = [self.x.numpy().tobytes(), self.y.numpy().tobytes(), self.start(0).numpy().tobytes()]
        return hashlib.sha256(b"".join(content) + f"{self.train} {self.batch} {self.shapes}".encode()).hexdigest()[:16]

    def start(self, seed: int) -> Tensor:
        """[n], the parameters before the first step."""
        generator = torch.Generator().manual_seed(seed)
        parts = [
            start.value + start.bound * (2 * torch.rand(math.prod(start.shape), generator=generator) - 1)
            for start in self.starts
        ]
        return torch.cat(parts)

    def order(self, seed: int, steps: int) -> Tensor:
        """[steps, batch], samples of each step: all of them in a random order, then in another one."""
        generator = torch.Generator().manual_seed(seed + 1_000_003)
        size = min(self.batch, self.train)
        epoch = self.train // size
        orders = [torch.randperm(self.train, generator=generator)[: epoch * size] for _ in range(-(-steps // epoch))]
        return torch.cat(orders).view(-1, size)[:steps]

    def minibatch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Samples and targets of an index [count, batch]."""
        return self.x[index], self.y[index]

    def _losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """[count, m, ..] -> [count, m]."""
        if not self.classes:
            return (outputs - y).square().flatten(2).mean(-1)
        losses = F.cross_entropy(outputs.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)
        return losses.flatten(2).mean(-1) if losses.dim() > 2 else losses

    def loss(self, params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean loss of each copy on a minibatch, [count]; cross-entropy in nats, or mean squared error."""
        x, y = batch
        return self._losses(self.network(params, x, x.shape[1]), y).mean(-1)

    def evaluate(self, params: Params) -> tuple[float, float | None, float | None]:
        """Loss on all training samples, loss and accuracy (None in a regression) on the test samples, of one copy.

        Batch statistics are those of the training samples.
        """
        outputs = self.network(params, self.x[None], self.train)
        losses = self._losses(outputs, self.y[None])[0]
        right = (outputs[0].argmax(-1) == self.y)[self.train :].double().mean().item() if self.classes else None
        return losses[: self.train].double().mean().item(), losses[self.train :].double().mean().item(), right


TASKS: dict[str, Callable[[], Task]] = {
    "softmax": lambda: Task("digits", MLP(64, 10)),
    "mlp-relu": lambda: Task("digits", MLP(64, 32, 10)),
    "mlp-tanh": lambda: Task("digits", MLP(64, 32, 32, 10, activation=torch.tanh)),
    "mlp-gelu-norm": lambda: Task("digits", MLP(64, 48, 48, 10, activation=F.gelu, normed=True)),
    "deep-relu": lambda: Task("digits", MLP(64, *[16] * 8, 10)),
    "label-noise": lambda: Task("digits", MLP(64, 32, 10), wrong=0.2),
    "conv": lambda: Task("digits", Conv(8, 16, 10), batch=16),
    "resnet": lambda: Task("digits", ResNet(12, 2, 10), batch=16),
    "gru-rows": lambda: Task("digits", RowsGRU(24, 10)),
    "transformer": lambda: Task("digits", Transformer(16, 2, 2, 10), batch=16),
    "autoencoder": lambda: Task("digits", MLP(64, 32, 8, 32, 64, activation=torch.tanh), reproduce=True),
    "cancer-mlp": lambda: Task("breast_cancer", MLP(30, 16, 16, 2)),
    "wine-mlp": lambda: Task("wine", MLP(13, 24, 24, 3, activation=torch.sigmoid), batch=16),
    "diabetes-mlp": lambda: Task("diabetes", MLP(10, 32, 32, 1, activation=F.gelu)),
    "flower-pixels": lambda: Task("flower", MLP(32, 32, 32, 3)),
    "text-gru": lambda: Task("text", TextGRU(44, 16, 32), batch=8),
}
