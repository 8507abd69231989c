"""The original's TensorFlow variable names beside ours: one table."""

from __future__ import annotations

from lopt.config import HRNNConfig

_CELL = {
    "level0": "PerTensor/Layer0_RNN/BiasGRUCell",
    "level1": "PerTensor/Layer1_RNN/BiasGRUCell",
    "level2": "Layer2_RNN/BiasGRUCell",
}
_AFFINE = {
    **{f"{level}.{part}": f"{cell}/{part}/Affine" for level, cell in _CELL.items() for part in ("gates", "candidate")},
    "level0.from_level1": "PerTensor/Layer0_RNN/Param/Affine",
    "level0.from_level2": "PerTensor/Layer0_RNN/Global/Affine",
    "level1.from_level2": "PerTensor/Layer1_RNN/Affine",
}
VARIABLE_NAMES = {
    **{f"level{level}.init": f"Level{level}_RNN/init_vector" for level in range(3)},
    **{f"{name}.weight": f"{scope}/Matrix" for name, scope in _AFFINE.items()},
    **{f"{name}.bias": f"{scope}/Bias" for name, scope in _AFFINE.items()},
    "direction.weight": "update_weights",
    "direction.shortcut": "PerTensor/GradsToDelta/Matrix",
    "attention.weight": "attention_weights",
    "attention.shortcut": "PerTensor/GradsToAttnDelta/Matrix",
    "scale_decay.weight": "scl_decay_weights",
    "scale_decay.bias": "scl_decay_bias",
    "grad_decay.weight": "inp_decay_weights",
    "grad_decay.bias": "inp_decay_bias",
    "log_lr.weight": "learning_rate_weights",
    "log_lr.bias": "learning_rate_bias",
    "log_lr.momentum": "PerTensor/learning_rate_momentum_logit",
    "log_step.offset": "PerTensor/param_stepsize_offset",
}


def config_options(options: dict) -> dict:
    """Translate the constructor arguments of the original into the fields of `HRNNConfig`.

    Args:
        options: the original's argument names and values; those that only concern its training loop are passed over.

    Raises:
        ValueError: an argument is not one of the original's.
    """
    renamed = {
        "level_sizes": "level_sizes",
        "num_gradient_scales": "timescales",
        "use_attention": "attention",
        "use_gradient_shortcut": "gradient_shortcut",
        "use_grad_products": "gradient_products",
        "use_log_means_squared": "log_ms_features",
        "use_extreme_indicator": "extreme_indicator",
        "use_lr_shortcut": "lr_shortcut",
        "use_multiple_scale_decays": "multiple_scale_decays",
        "learnable_decay": "learnable_decay",
        "learnable_inp_decay": "learnable_grad_decay",
        "learnable_rnn_init": "learnable_init",
        "dynamic_output_scale": "dynamic_output_scale",
        "zero_init_lr_weights": "zero_init_lr_weights",
        "max_log_lr": "log_lr_max",
        "init_lr_range": "init_lr_range",
    }
    combined = {"use_relative_lr", "use_problem_lr_mean"}
    training_only = {
        "use_log_objective",
        "obj_train_max_multiplier",
        "use_second_derivatives",
        "use_numerator_epsilon",
        "random_seed",
        "cell_size",
        "num_cells",
        "cell_cls",
    }
    if unknown := sorted(set(options) - set(renamed) - combined - training_only):
        raise ValueError(f"{unknown} are not arguments of the original's HierarchicalRNN")
    fields = {ours: options[theirs] for theirs, ours in renamed.items() if theirs in options}
    if "log_lr_max" in fields:
        fields["log_lr_max"] = float(fields["log_lr_max"])
    if options.get("use_relative_lr", True):
        fields["relative_log_lr"] = "problem" if options.get("use_problem_lr_mean", True) else "tensor"
    else:
        fields["relative_log_lr"] = None
    # Products of neighbouring averages exist only where there are neighbours; the original drops them silently.
    if fields.get("timescales") == 1:
        fields["gradient_products"] = False
    return fields


def tf_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in which the original stores the meta-parameter `name` whose shape here is `shape`."""
    if name.endswith(".init"):
        return (1, *shape)
    if name in ("scale_decay.bias", "grad_decay.bias", "log_lr.bias"):
        return (1,)
    if len(shape) == 1 and not name.endswith(".bias"):
        return (*shape, 1)
    return shape


def config_of(options: dict) -> HRNNConfig:
    """The architecture that the original's constructor arguments stand for, its last-tensor global input included."""
    return HRNNConfig(**config_options(options), global_input="last")
