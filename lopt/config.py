"""The architecture of one learned optimizer: sizes and features, validated.

`HRNNConfig` names every option of the hierarchical-RNN optimizer of Wichrowska et al. 2017, "Learned Optimizers that
Scale and Generalize". Its defaults are the configuration of the paper.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Literal

DIRECTION_EPS = 1e-16  # inside the root that normalises a direction by its root mean square over the tensor
GRADIENT_LIMIT = 1e18  # a larger gradient counts as non-finite: its mean square would overflow float32
SEEN = 1e30  # one over the least scaled gradient average that counts as a gradient, with damping
FIXED_GRAD_DECAY = 0.89  # decay of the shortest gradient average when it is not learned
FIXED_SCALE_DECAY = 0.93  # decay of the mean squares when it is not learned
EXTREME_LOG_LR = math.log(1e-6)  # below this the extreme indicator falls
SHORTCUT_LOG_LR = math.log(1e-3)  # the lr shortcut is measured from here

RelativeLogLr = Literal["problem", "tensor"] | None
GlobalInput = Literal["mean", "last"]


@dataclasses.dataclass(frozen=True)
class HRNNConfig:
    """Sizes and features of one hierarchical-RNN optimizer.

    Args:
        level_sizes: hidden units of the per-parameter, per-tensor and global GRU; one to three of them.
        timescales: moving averages of the gradient kept per parameter; each spans twice the one before.
        attention: take the gradient at a second point than the parameters, which the optimizer also learns to place.
        gradient_shortcut: add a linear map of the scaled gradient averages to the direction.
        gradient_products: feed products of neighbouring scaled averages to the GRU. Needs two timescales.
        log_ms_features: feed the log mean squares, relative to their mean over the timescales.
        relative_log_lr: feed each log lr relative to its mean over the "problem" (all tensors) or its own "tensor".
        extreme_indicator: feed how far the log lr is outside of the usual range.
        lr_shortcut: feed the log lr relative to log(1e-3).
        multiple_scale_decays: give each timescale its own decay of the mean square, like that of the averages.
        learnable_decay: read both decays out of the hidden state; otherwise they are the constants .93 and .89.
        learnable_grad_decay: read the decay of the gradient averages out of the hidden state.
        learnable_init: the initial hidden states are meta-trained; otherwise they are fixed random numbers.
        dynamic_output_scale: normalise the direction and learn a log step length per parameter.
        zero_init_lr_weights: start with a log lr that does not depend on the hidden state.
        log_lr_min, log_lr_max: bounds of the log lr. The gradient passes the clip as if it were not there.
        log_lr_min_steps: after how many steps the lower bound begins to fall: it is log_lr_min - log(1 + t / this) / 2
            in a tensor's step t, counted from 0, for a learning rate that falls at most with the root of time. 0: it
            stays, as in the paper.
        log_lr_min_distance: nor is the learning rate below this share of d / sqrt(1 + t), where d is the largest
            distance that the tensor has had from where it started, root mean square over its parameters. That is a rate
            nobody has to tune: "DoG is SGD's Best Friend" (Ivgi, Hinder, Carmon 2023). 0: none, as in the paper.
        log_lr_min_distance_limit: a larger d counts as this. Without a limit, distance and bound drive each other up
            where no gradient holds parameters back: a vector added to the weights of all classes leaves a softmax as it
            was, and Adam-like steps add one. 0: none, as in the paper.
        log_lr_max_ratio: nor is a learning rate above this multiple of the geometric mean of its tensor's before the
            step, or above the lower bound if that is higher. 0: none, as in the paper.
        ms_eps: added to the squared average inside the moving mean square.
        rms_eps: added to the mean square under the root and in its logarithm.
        damping: a tensor whose gradient's root mean square is below this share of its own moving average takes steps
            shorter in proportion, and its learning rates rise slower by the same factor. A direction has the same
            length however small the gradient is, and what is learned of past gradients fades in tens of steps: where a
            loss has almost vanished, damping is what keeps it there. A parameter that has had no gradient but 0 stays:
            without damping it would follow the direction of its tensor's other parameters. 0: none, as in the paper.
        damping_decay: of that moving average.
        init_lr_range: the original drew initial learning rates log-uniformly in it; `lopt.meta` has `Augment.lr`.
        global_input: what the global GRU reads of the tensors' new states: their "mean" (the paper), or the "last"
            tensor's alone (what the original code does; the result then depends on the order of the tensors).

    Raises:
        ValueError: a value is out of range, or options exclude each other; the message names the fields.
    """

    level_sizes: tuple[int, ...] = (10, 20, 20)
    timescales: int = 4
    attention: bool = False
    gradient_shortcut: bool = True
    gradient_products: bool = True
    log_ms_features: bool = True
    relative_log_lr: RelativeLogLr = "problem"
    extreme_indicator: bool = False
    lr_shortcut: bool = False
    multiple_scale_decays: bool = False
    learnable_decay: bool = True
    learnable_grad_decay: bool = True
    learnable_init: bool = True
    dynamic_output_scale: bool = True
    zero_init_lr_weights: bool = True
    log_lr_min: float = -33.0
    log_lr_max: float = 33.0
    log_lr_min_steps: float = 0.0
    log_lr_min_distance: float = 0.0
    log_lr_min_distance_limit: float = 0.0
    log_lr_max_ratio: float = 0.0
    ms_eps: float = 1e-12
    rms_eps: float = 1e-16
    damping: float = 0.0
    damping_decay: float = 0.99
    init_lr_range: tuple[float, float] = (1e-6, 1e-2)
    global_input: GlobalInput = "mean"

    def __post_init__(self) -> None:
        object.__setattr__(self, "level_sizes", tuple(self.level_sizes))
        object.__setattr__(self, "init_lr_range", tuple(self.init_lr_range))
        sizes = self.level_sizes
        if not 1 <= len(sizes) <= 3 or any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError(
                f"level_sizes must be one to three positive integers, got {sizes}; the paper's: (10, 20, 20)"
            )
        if type(self.timescales) is not int or self.timescales < 1:
            raise ValueError(f"timescales must be an integer >= 1, got {self.timescales!r}")
        for field in dataclasses.fields(self):
            if field.type == "bool" and type(getattr(self, field.name)) is not bool:
                raise ValueError(f"{field.name} must be True or False, got {getattr(self, field.name)!r}")
            if field.type == "float" and type(getattr(self, field.name)) not in (int, float):
                raise ValueError(f"{field.name} must be a number, got {getattr(self, field.name)!r}")
        if self.relative_log_lr not in ("problem", "tensor", None):
            raise ValueError(f"relative_log_lr must be 'problem', 'tensor' or None, got {self.relative_log_lr!r}")
        if self.global_input not in ("mean", "last"):
            raise ValueError(f"global_input must be 'mean' or 'last', got {self.global_input!r}")
        if self.gradient_products and self.timescales == 1:
            raise ValueError(
                "gradient_products=True needs timescales >= 2: there is no neighbouring average to multiply"
            )
        if not self.dynamic_output_scale:
            reads_log_lr = [
                *("relative_log_lr", "extreme_indicator", "lr_shortcut"),
                *("log_lr_min_steps", "log_lr_min_distance", "log_lr_max_ratio", "damping"),
            ]
            reading = [f"{name}={getattr(self, name)!r}" for name in reads_log_lr if getattr(self, name)]
            if reading:
                raise ValueError(f"{', '.join(reading)} needs dynamic_output_scale=True: without it there is no log lr")
        if not (
            math.isfinite(self.log_lr_min) and math.isfinite(self.log_lr_max) and self.log_lr_min < self.log_lr_max
        ):
            raise ValueError(
                f"log_lr_min must be below log_lr_max, both finite, got {self.log_lr_min} and {self.log_lr_max}"
            )
        if not 0 <= self.log_lr_min_steps < math.inf:
            raise ValueError(
                f"log_lr_min_steps must be a number of steps, or 0 for a bound that stays, got {self.log_lr_min_steps}"
            )
        if not 0 <= self.log_lr_min_distance < math.inf:
            raise ValueError(
                f"log_lr_min_distance must be a share of the distance, or 0 for none, got {self.log_lr_min_distance}"
            )
        if not 0 <= self.log_lr_min_distance_limit < math.inf:
            raise ValueError(
                f"log_lr_min_distance_limit must be a distance, or 0 for none, got {self.log_lr_min_distance_limit}"
            )
        if self.log_lr_min_distance_limit and not self.log_lr_min_distance:
            raise ValueError(
                f"log_lr_min_distance_limit={self.log_lr_min_distance_limit} needs log_lr_min_distance > 0: without "
                "it no distance is measured"
            )
        if self.log_lr_max_ratio != 0 and not 1 <= self.log_lr_max_ratio < math.inf:
            raise ValueError(f"log_lr_max_ratio must be a number >= 1, or 0 for none, got {self.log_lr_max_ratio}")
        for name in ("ms_eps", "rms_eps"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.ms_eps == self.rms_eps == 0:
            raise ValueError("ms_eps and rms_eps cannot both be 0: a zero gradient would divide by zero")
        if not 0 <= self.damping <= 1:
            raise ValueError(f"damping must be in [0, 1], got {self.damping}")
        if not 0 <= self.damping_decay < 1:
            raise ValueError(f"damping_decay must be in [0, 1), got {self.damping_decay}")
        low_high = self.init_lr_range
        if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1] < math.inf:
            raise ValueError(f"init_lr_range must be two numbers 0 < low <= high, got {low_high}")

    @property
    def levels(self) -> int:
        """GRUs in the hierarchy: 1 parameter, 2 and tensor, 3 and global."""
        return len(self.level_sizes)

    @property
    def hidden_size(self) -> int:
        """Hidden units of the per-parameter GRU."""
        return self.level_sizes[0]

    @property
    def tensor_size(self) -> int:
        """Hidden units of the per-tensor GRU, 0 without one."""
        return self.level_sizes[1] if self.levels >= 2 else 0

    @property
    def global_size(self) -> int:
        """Hidden units of the global GRU, 0 without one."""
        return self.level_sizes[2] if self.levels >= 3 else 0

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the inputs of the per-parameter GRU, in their order."""
        scales = range(1, self.timescales + 1)
        names = [f"scaled_{s}" for s in scales]
        if self.gradient_products:
            names += [f"product_{s}_{s + 1}" for s in scales[:-1]]
        if self.log_ms_features:
            names += [f"log_ms_{s}" for s in scales]
        if self.relative_log_lr:
            names.append("relative_log_lr")
        if self.extreme_indicator:
            names.append("extreme_indicator")
        if self.lr_shortcut:
            names.append("lr_shortcut")
        return tuple(names)

    @property
    def num_features(self) -> int:
        """Inputs of the per-parameter GRU."""
        return len(self.features)

    @property
    def tensor_input_size(self) -> int:
        """Inputs of the per-tensor GRU: mean hidden state and, unless these are the bare averages, mean features."""
        plain = self.num_features == self.timescales
        return self.hidden_size + (0 if plain else self.num_features)

    @property
    def reads_grad_decay(self) -> bool:
        """Whether the decay of the gradient averages is read out of the hidden state."""
        return self.learnable_decay and self.learnable_grad_decay and self.timescales > 1

    def to_json(self) -> str:
        """The options as a JSON object."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> HRNNConfig:
        """The inverse of `to_json`.

        Raises:
            ValueError: the text is no JSON object of these options; the message names what is wrong.
        """
        try:
            values: dict[str, Any] = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a JSON object of HRNNConfig options: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"not a JSON object of HRNNConfig options: {text[:60]!r}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown HRNNConfig options {unknown}: written by a later version of lopt?")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"an HRNNConfig option has the wrong type: {error}") from None
