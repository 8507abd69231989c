"""Small networks on data drawn by random teachers: what meta-training learns the most from.

Every copy has a data set, a teacher and a start of its own. Sizes are such that a task has 50 to 4,000 parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lopt.meta.tasks.base import Data, Params, Random
from lopt.meta.tasks.paper import Batches, affine

Activation = Callable[[Tensor], Tensor]

NORM_EPS = 1e-5


def batch_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Over all samples: [count, m, c], [count, c], [count, c] -> [count, m, c]."""
    return _normed_maps(x.transpose(0, 1).flatten(1), scale, shift).view(x.shape[1], *scale.shape).transpose(0, 1)


def _normed_maps(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Over all samples and positions: [m, count c, ..], [count, c], [count, c] -> [m, count c, ..]."""
    return F.batch_norm(x, None, None, scale.flatten(), shift.flatten(), training=True, eps=NORM_EPS)


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Over the last dimension: [count, m, c], [count, c], [count, c] -> [count, m, c]."""
    return torch.addcmul(shift[:, None], _standardised(x), scale[:, None])


def _standardised(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the last dimension, so short that products with a constant matrix are the fastest."""
    width = x.shape[-1]
    mean = x.new_full((width, width), 1 / width)
    centered = x - x @ mean
    return centered * torch.rsqrt(centered.square() @ mean + NORM_EPS)


class Network(Batches):
    """Base: a data set of `samples` vectors, a network's output, cross-entropy over classes or squared error.

    Args:
        features: entries of a sample.
        outputs: classes, or values to regress.
        samples: in the data set.
        batch: samples of a minibatch.
        noise: share of wrong labels (classes), or standard deviation of the targets' noise (regression).
        regression: squared error on standardised values rather than cross-entropy.
        modes: patterns of each class, around which its samples lie; 0: samples lie anywhere, and a random network tells
            their classes.
        gain: the start's standard deviation is drawn log-uniformly up to this factor around the usual.
    """

    weight = 1.5

    def __init__(
        self,
        features: int = 12,
        outputs: int = 4,
        *,
        samples: int = 192,
        batch: int = 32,
        noise: float = 0.0,
        regression: bool = False,
        modes: int = 0,
        gain: float = 1.5,
    ) -> None:
        self.features, self.outputs, self.samples, self.batch = features, outputs, samples, batch
        self.noise, self.regression, self.modes, self.gain = noise, regression, modes, gain
        self.shapes = tuple(self.layout())

    @property
    def fan_in(self) -> tuple[int, ...]:
        return tuple(math.prod(shape[:-1]) for shape in self.shapes)

    def layout(self) -> list[tuple[int, ...]]:
        """Shapes of the parameter tensors, outputs last; a vector is a bias, or a normalisation's scale if `start` says
        so."""
        raise NotImplementedError

    def output(self, params: Params, x: Tensor) -> Tensor:
        """[count, m, outputs] of samples [count, m, ..]."""
        raise NotImplementedError

    def samples_of(self, count: int, random: Random) -> Tensor:
        """[count, samples, features]: normal, of unequal variances, along random directions."""
        decay = random.uniform(count, 1, 1, high=1.0)
        spectrum = torch.arange(1, self.features + 1, device=random.device) ** -decay
        mixing = random.normal(count, self.features, self.features) / math.sqrt(self.features)
        x = (random.normal(count, self.samples, self.features) * spectrum) @ mixing
        return x * random.log_uniform(count, 1, 1, low=0.5, high=2.0) / x.std((1, 2), keepdim=True)

    def patterns_of(self, count: int, random: Random) -> tuple[Tensor, Tensor]:
        """[count, samples, features] and the class that each sample's pattern belongs to, [count, samples].

        As in small images, no feature is negative before all are standardised together, many are zero, and they vary
        along a quarter as many directions, the same for all patterns.
        """
        rank, patterns, m = max(2, self.features // 4), self.modes * self.outputs, self.samples
        pattern = random.integers(count, m, high=patterns)
        spread = random.log_uniform(count, 1, 1, low=0.3, high=0.8)
        copies = torch.arange(count, device=pattern.device)[:, None]
        latent = random.normal(count, patterns, rank)[copies, pattern] + spread * random.normal(count, m, rank)
        directions = random.normal(count, rank, self.features) / math.sqrt(rank)
        x = latent @ directions + random.normal(count, 1, self.features) + 0.1 * random.normal(count, m, self.features)
        x = torch.relu(x)
        return (x - x.mean((1, 2), keepdim=True)) / x.std((1, 2), keepdim=True), pattern % self.outputs

    def inputs(self, count: int, random: Random) -> tuple[Tensor, Tensor | None]:
        """[count, samples, ..] and their classes, [count, samples]; None: `teach` tells them."""
        return self.patterns_of(count, random) if self.modes else (self.samples_of(count, random), None)

    def teach(self, count: int, random: Random, x: Tensor) -> Tensor:
        """[count, samples, outputs], standardised outputs of a random network with one hidden layer."""
        flat, width = x.flatten(2), 16
        hidden = flat @ random.normal(count, flat.shape[-1], width) / math.sqrt(flat.shape[-1]) * 2
        y = torch.tanh(hidden + random.normal(count, 1, width)) @ random.normal(count, width, self.outputs)
        return (y - y.mean(1, keepdim=True)) / y.std(1, keepdim=True)

    def instance(self, count: int, random: Random) -> Data:
        x, labels = self.inputs(count, random)
        if self.regression:
            y = self.teach(count, random, x)
            return {"x": x, "y": y + self.noise * random.normal(*y.shape) if self.noise else y}
        if labels is None:
            labels = self.teach(count, random, x).argmax(-1)
        if self.noise:
            wrong = random.uniform(*labels.shape) < self.noise
            labels = torch.where(wrong, random.integers(*labels.shape, high=self.outputs), labels)
        return {"x": x, "y": labels}

    def start(self, count: int, random: Random, data: Data) -> list[Tensor]:
        """Matrices uniform with variance gain^2 / (3 fan in), as in torch.nn; vectors zero."""
        gain = random.log_uniform(count, low=1 / self.gain, high=self.gain)
        tensors = []
        for shape in self.shapes:
            if len(shape) < 2:
                tensors.append(torch.zeros(count, *shape, device=random.device))
                continue
            bound = 1 / math.sqrt(math.prod(shape[:-1]))
            value = random.uniform(count, *shape, low=-bound, high=bound)
            tensors.append(gain.view(-1, *[1] * len(shape)) * value)
        return tensors

    def loss(self, params: Params, data: Data) -> Tensor:
        output = self.output(params, data["x"])
        if self.regression:
            return (output - data["y"]).square().mean((-2, -1))
        classes_first = output.flatten(1, -2).mT.contiguous()  # normalised twice as fast as short rows
        chosen = torch.log_softmax(classes_first, 1).gather(1, data["y"].flatten(1)[:, None])
        return -chosen[:, 0].mean(1)


class Linear(Network):
    """Logistic or linear regression."""

    def layout(self) -> list[tuple[int, ...]]:
        return [(self.features, self.outputs), (self.outputs,)]

    def output(self, params: Params, x: Tensor) -> Tensor:
        return affine(x, *params)


class MLP(Network):
    """Fully connected network.

    Args:
        hidden: widths.
        activation: after each hidden layer.
        norm: None, batch_norm or layer_norm, before the activation; its scales start at 1.
        residual: add a hidden layer's input to its output where the widths agree.
        **options: of `Network`.
    """

    def __init__(
        self,
        hidden: tuple[int, ...] = (16,),
        activation: Activation = torch.relu,
        norm: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        *,
        residual: bool = False,
        features: int = 12,
        outputs: int = 4,
        samples: int = 192,
        batch: int = 32,
        noise: float = 0.0,
        regression: bool = False,
        modes: int = 0,
        gain: float = 1.5,
    ) -> None:
        self.hidden, self.activation, self.norm, self.residual = hidden, activation, norm, residual
        super().__init__(
            features, outputs, samples=samples, batch=batch, noise=noise, regression=regression, modes=modes, gain=gain
        )

    def layout(self) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        width = self.features
        for size in self.hidden:
            shapes += [(width, size), (size,)] + ([(size,)] if self.norm else [])
            width = size
        return [*shapes, (width, self.outputs), (self.outputs,)]

    def start(self, count: int, random: Random, data: Data) -> list[Tensor]:
        tensors = super().start(count, random, data)
        if self.norm:
            for scale in tensors[1:-2:3]:
                scale.fill_(1.0)
        return tensors

    def output(self, params: Params, x: Tensor) -> Tensor:
        per_layer = 3 if self.norm else 2
        for layer in range(len(self.hidden)):
            weight, *rest = params[per_layer * layer : per_layer * (layer + 1)]
            y = self.activation(self.norm(x @ weight, *rest) if self.norm else affine(x, weight, *rest))
            x = x + y if self.residual and x.shape == y.shape else y
        return affine(x, params[-2], params[-1])


class Autoencoder(MLP):
    """Reproduces its input through a bottleneck."""

    def __init__(
        self,
        hidden: tuple[int, ...] = (8, 3, 8),
        activation: Activation = torch.tanh,
        *,
        features: int = 12,
        samples: int = 192,
        batch: int = 32,
        modes: int = 0,
    ) -> None:
        super().__init__(
            hidden,
            activation,
            features=features,
            outputs=features,
            samples=samples,
            batch=batch,
            regression=True,
            modes=modes,
        )

    def instance(self, count: int, random: Random) -> Data:
        x, _ = self.inputs(count, random)
        return {"x": x, "y": x}


class Conv(Network):
    """3 x 3 convolutions, each with batch normalisation or a bias, mean over positions, linear classifier.

    Images are smooth patterns, one for each class, shifted and with noise.

    Args:
        channels: of each convolution; equal neighbours are joined by residual connections.
        size: height and width of the images.
        norm: batch normalisation.
        **options: of `Network`.
    """

    def __init__(
        self,
        channels: tuple[int, ...] = (6, 6),
        size: int = 5,
        activation: Activation = torch.relu,
        *,
        norm: bool = True,
        outputs: int = 4,
        samples: int = 96,
        batch: int = 16,
        noise: float = 0.0,
    ) -> None:
        self.channels, self.size, self.activation, self.norm = channels, size, activation, norm
        super().__init__(size * size, outputs, samples=samples, batch=batch, noise=noise)

    def layout(self) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        width = 1
        for size in self.channels:
            shapes += [(3, 3, width, size), (size,)] + ([(size,)] if self.norm else [])
            width = size
        return [*shapes, (width, self.outputs), (self.outputs,)]

    def start(self, count: int, random: Random, data: Data) -> list[Tensor]:
        tensors = super().start(count, random, data)
        if self.norm:
            for scale in tensors[1:-2:3]:
                scale.fill_(1.0)
        return tensors

    def instance(self, count: int, random: Random) -> Data:
        size, m = self.size, self.samples
        patterns = F.avg_pool2d(random.normal(count, self.outputs, 2 * size, 2 * size), 2) * 3
        labels = random.integers(count, m, high=self.outputs)
        x = patterns[torch.arange(count, device=labels.device)[:, None], labels]
        shift = int(random.scalar() * size)
        rolled = random.uniform(count, m, 1, 1) < 0.5
        x = torch.where(rolled, x.roll(shift, -1), x) + random.normal(count, m, size, size)
        if self.noise:
            wrong = random.uniform(count, m) < self.noise
            labels = torch.where(wrong, random.integers(count, m, high=self.outputs), labels)
        return {"x": x, "y": labels}

    def output(self, params: Params, x: Tensor) -> Tensor:
        count, x = len(x), x.transpose(0, 1)
        per_layer = 3 if self.norm else 2
        for layer in range(len(self.channels)):
            kernel, *rest = params[per_layer * layer : per_layer * (layer + 1)]
            y = convolve(x, kernel)
            y = self.activation(_normed_maps(y, *rest) if self.norm else y + rest[0].reshape(-1, 1, 1))
            x = x + y if x.shape == y.shape else y
        return affine(x.mean((-2, -1)).unflatten(1, (count, -1)).transpose(0, 1), params[-2], params[-1])


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """ "Same" convolution of each copy: [m, count c, h, w], [count, k, k, c, out] -> [m, count out, h, w]."""
    m, _, height, width = x.shape
    count, k, _, channels, outputs = kernel.shape
    if channels > 1:  # with a gradient by the input, PyTorch's grouped convolution is the faster one
        kernels = kernel.permute(0, 4, 3, 1, 2).reshape(count * outputs, channels, k, k)
        return F.conv2d(x, kernels, padding=k // 2, groups=count)
    padded = F.pad(x, (k // 2,) * 4)
    shifted = [padded[..., i : i + height, j : j + width] for i in range(k) for j in range(k)]
    columns = torch.stack(shifted, 2).view(m, count, k * k, height * width)
    return (kernel.view(count, k * k, outputs).mT @ columns).view(m, -1, height, width)


class Tokens(Network):
    """Base of networks on sequences of tokens; the label depends on all pairs of tokens through a random table."""

    def __init__(
        self,
        vocabulary: int = 8,
        length: int = 6,
        width: int = 8,
        *,
        outputs: int = 4,
        samples: int = 192,
        batch: int = 32,
        noise: float = 0.0,
    ) -> None:
        self.vocabulary, self.length, self.width = vocabulary, length, width
        super().__init__(vocabulary * length, outputs, samples=samples, batch=batch, noise=noise)

    @property
    def fan_in(self) -> tuple[int, ...]:
        return (self.width, *super().fan_in[1:])  # of torch.nn.Embedding's [vocabulary, width]

    def samples_of(self, count: int, random: Random) -> Tensor:
        """[count, samples, length], tokens."""
        return random.integers(count, self.samples, self.length, high=self.vocabulary)

    def teach(self, count: int, random: Random, x: Tensor) -> Tensor:
        copies = torch.arange(count, device=x.device).view(-1, 1, 1, 1)
        y = random.normal(count, self.vocabulary, self.vocabulary, self.outputs)[copies, x[..., None], x[..., None, :]]
        y = y.sum((2, 3))
        return (y - y.mean(1, keepdim=True)) / y.std(1, keepdim=True)

    def start(self, count: int, random: Random, data: Data) -> list[Tensor]:
        tensors = super().start(count, random, data)
        tensors[0] = random.normal(count, *self.shapes[0])  # embeddings, as in torch.nn
        return tensors

    def embed(self, embeddings: Tensor, x: Tensor) -> Tensor:
        """[count, vocabulary, width], [count, m, length] -> [count, m, length, width]."""
        return F.one_hot(x, self.vocabulary).to(embeddings).flatten(1, 2).matmul(embeddings).unflatten(1, x.shape[1:])


class Attention(Tokens):
    """One pre-norm transformer block with one head; layer normalisation without learned scales.

    Its matrices are a few numbers wide: attention is products and sums over short dimensions in front of the long ones.
    """

    def layout(self) -> list[tuple[int, ...]]:
        d = self.width
        return [
            (self.vocabulary, d),
            (self.length, d),
            (d, 3 * d),
            (d, d),
            (d, 2 * d),
            (2 * d,),
            (2 * d, d),
            (d,),
            (d, self.outputs),
            (self.outputs,),
        ]

    def output(self, params: Params, x: Tensor) -> Tensor:
        embeddings, positions, mix_in, mix_out, expand, expand_bias, contract, contract_bias, weight, bias = params
        d = self.width
        h = (self.embed(embeddings, x) + 0.3 * positions[:, None]).flatten(1, 2)
        mixed = (_standardised(h) @ mix_in).view(*x.shape, 3 * d)
        query, key, value = mixed.permute(3, 2, 0, 1).contiguous().chunk(3)  # [d, length, count, m]
        products = (query[:, :, None] * key[:, None]).sum(0)  # [length, length, count, m]
        shares = torch.softmax(products / math.sqrt(d), 1)
        seen = (shares * value[:, None]).sum(2).permute(2, 3, 1, 0).flatten(1, 2)
        h = h + seen @ mix_out
        h = h + affine(F.gelu(affine(_standardised(h), expand, expand_bias)), contract, contract_bias)
        return affine(_standardised(h).unflatten(1, x.shape[1:]).mean(2), weight, bias)


class Recurrent(Tokens):
    """Plain tanh recurrent network, read out at its end."""

    def layout(self) -> list[tuple[int, ...]]:
        d = self.width
        return [(self.vocabulary, d), (d, d), (d,), (d, self.outputs), (self.outputs,)]

    def output(self, params: Params, x: Tensor) -> Tensor:
        embeddings, recurrent, shift, weight, bias = params
        first, *others = (self.embed(embeddings, x) + shift[:, None, None]).unbind(2)
        h = torch.tanh(first)
        for own in others:
            h = torch.tanh(torch.baddbmm(own, h, recurrent))
        return affine(h, weight, bias)


class NextToken(Tokens):
    """Predicts a token from the two before it, drawn from a random table: sparse gradients in the embeddings."""

    def __init__(self, vocabulary: int = 12, width: int = 6, *, batch: int = 24, samples: int = 256) -> None:
        super().__init__(vocabulary, 2, width, outputs=vocabulary, samples=samples, batch=batch)

    def layout(self) -> list[tuple[int, ...]]:
        return [
            (self.vocabulary, self.width),
            (2 * self.width, 2 * self.width),
            (2 * self.width,),
            (2 * self.width, self.outputs),
            (self.outputs,),
        ]

    def output(self, params: Params, x: Tensor) -> Tensor:
        embeddings, weight, bias, out, out_bias = params
        return affine(torch.relu(affine(self.embed(embeddings, x).flatten(2), weight, bias)), out, out_bias)


def gru(x: Tensor, params: Params) -> list[Tensor]:
    """Hidden states [count, m, size] after each of the inputs [count, m, length, in]; torch.nn.GRU's equations.

    params: [count, in, 3 size], [count, 3 size], [count, size, 3 size], [count, 3 size].
    """
    weight, bias, recurrent, recurrent_bias = params
    size = recurrent.shape[1]
    h, states = x.new_zeros(*x.shape[:2], size), []
    for own in affine(x, weight, bias).unbind(2):
        own_gates, own_candidate = own.split([2 * size, size], -1)
        gates, fed = torch.baddbmm(recurrent_bias[:, None], h, recurrent).split([2 * size, size], -1)
        reset, update = torch.sigmoid(own_gates + gates).chunk(2, -1)
        candidate = torch.tanh(own_candidate + reset * fed)
        h = candidate + update * (h - candidate)
        states.append(h)
    return states


class GRU(Network):
    """Reads a sample in parts, one behind the other; a linear classifier of the last state.

    Args:
        length: parts of a sample. part: entries of each.
        size: of the hidden state.
        **options: of `Network`.
    """

    def __init__(
        self,
        length: int = 6,
        part: int = 4,
        size: int = 8,
        *,
        outputs: int = 4,
        samples: int = 192,
        batch: int = 32,
        noise: float = 0.0,
        modes: int = 0,
    ) -> None:
        self.length, self.part, self.size = length, part, size
        super().__init__(length * part, outputs, samples=samples, batch=batch, noise=noise, modes=modes)

    def layout(self) -> list[tuple[int, ...]]:
        d = self.size
        return [(self.part, 3 * d), (3 * d,), (d, 3 * d), (3 * d,), (d, self.outputs), (self.outputs,)]

    def output(self, params: Params, x: Tensor) -> Tensor:
        return affine(gru(x.unflatten(-1, (self.length, self.part)), params[:4])[-1], *params[4:])


class Language(Tokens):
    """A GRU that predicts every next token of sequences in which two tokens decide on the one behind them."""

    def __init__(
        self, vocabulary: int = 8, length: int = 8, width: int = 6, *, batch: int = 16, samples: int = 192
    ) -> None:
        super().__init__(vocabulary, length, width, outputs=vocabulary, samples=samples, batch=batch)

    def layout(self) -> list[tuple[int, ...]]:
        d = self.width
        return [(self.vocabulary, d), (d, 3 * d), (3 * d,), (d, 3 * d), (3 * d,), (d, self.outputs), (self.outputs,)]

    def instance(self, count: int, random: Random) -> Data:
        last, before = (2 * random.normal(count, self.vocabulary, self.vocabulary) for _ in range(2))
        tokens = [random.integers(count, self.samples, high=self.vocabulary) for _ in range(2)]
        copies = torch.arange(count, device=random.device)[:, None]
        for _ in range(self.length - 1):
            shares = torch.softmax(last[copies, tokens[-1]] + before[copies, tokens[-2]], -1).cumsum(-1)
            drawn = (shares < random.uniform(count, self.samples, 1)).sum(-1)
            tokens.append(drawn.clamp(max=self.vocabulary - 1))
        text = torch.stack(tokens, -1)
        return {"x": text[..., :-1], "y": text[..., 1:]}

    def output(self, params: Params, x: Tensor) -> Tensor:
        states = gru(self.embed(params[0], x), params[1:5])
        return affine(torch.stack(states, 2), *params[5:])
