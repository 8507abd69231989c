"""HRNNConfig: the paper's defaults, derived sizes, refused combinations."""

import dataclasses

import pytest

from lopt import HRNNConfig


def test_defaults_are_the_configuration_of_the_paper():
    config = HRNNConfig()
    assert config.level_sizes == (10, 20, 20)
    assert (config.timescales, config.relative_log_lr, config.global_input) == (4, "problem", "mean")
    assert config.gradient_shortcut
    assert config.gradient_products
    assert not config.attention
    assert config.num_features == 12
    assert config.tensor_input_size == 22


def test_tensor_gru_reads_hidden_state_alone_where_features_are_the_bare_averages():
    bare = HRNNConfig(gradient_products=False, log_ms_features=False, relative_log_lr=None)
    assert bare.num_features == bare.timescales
    assert bare.tensor_input_size == bare.hidden_size


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"level_sizes": ()}, ["level_sizes"]),
        ({"level_sizes": (10, 20, 20, 20)}, ["level_sizes"]),
        ({"level_sizes": (10, 0)}, ["level_sizes"]),
        ({"level_sizes": (10.0,)}, ["level_sizes"]),
        ({"timescales": 0}, ["timescales"]),
        ({"timescales": 1}, ["gradient_products", "timescales"]),
        ({"relative_log_lr": "layer"}, ["relative_log_lr"]),
        ({"global_input": "first"}, ["global_input"]),
        ({"attention": 1}, ["attention"]),
        ({"damping": "x"}, ["damping"]),
        ({"log_lr_min": None}, ["log_lr_min"]),
        ({"dynamic_output_scale": False}, ["relative_log_lr", "dynamic_output_scale"]),
        (
            {"dynamic_output_scale": False, "relative_log_lr": None, "extreme_indicator": True, "lr_shortcut": True},
            ["extreme_indicator", "lr_shortcut", "dynamic_output_scale"],
        ),
        ({"log_lr_min": 1.0, "log_lr_max": 0.0}, ["log_lr_min", "log_lr_max"]),
        ({"log_lr_min_steps": -1.0}, ["log_lr_min_steps"]),
        ({"log_lr_min_distance": -0.1}, ["log_lr_min_distance"]),
        ({"log_lr_min_distance": 0.1, "log_lr_min_distance_limit": -1.0}, ["log_lr_min_distance_limit"]),
        ({"log_lr_min_distance_limit": 1.0}, ["log_lr_min_distance_limit", "log_lr_min_distance > 0"]),
        ({"log_lr_max_ratio": 0.5}, ["log_lr_max_ratio"]),
        ({"ms_eps": -1e-12}, ["ms_eps"]),
        ({"damping": 1.5}, ["damping"]),
        ({"damping_decay": 1.0}, ["damping_decay"]),
        ({"dynamic_output_scale": False, "relative_log_lr": None, "damping": 0.5}, ["damping", "dynamic_output_scale"]),
        ({"ms_eps": 0.0, "rms_eps": 0.0}, ["ms_eps", "rms_eps"]),
        ({"init_lr_range": (1e-2, 1e-6)}, ["init_lr_range"]),
    ],
)
def test_invalid_options_are_refused_by_name(options, fields):
    with pytest.raises(ValueError) as refusal:
        HRNNConfig(**options)
    for field in fields:
        assert field in str(refusal.value)


def test_json_round_trip_keeps_every_option():
    config = HRNNConfig(level_sizes=(4, 5), timescales=2, attention=True, relative_log_lr="tensor", ms_eps=1e-20)
    again = HRNNConfig.from_json(config.to_json())
    assert again == config
    assert isinstance(again.level_sizes, tuple)


@pytest.mark.parametrize("text", ["", "[1]", '{"levels": 3}', '{"level_sizes": 3}', '{"timescales": "4"}'])
def test_foreign_json_is_refused(text):
    with pytest.raises(ValueError, match="HRNNConfig|timescales|level_sizes"):
        HRNNConfig.from_json(text)


def test_config_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        HRNNConfig().timescales = 3
