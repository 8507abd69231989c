"""MetaParams: counts, distributions, files, and the original's names."""

import json
import math
import struct

import numpy as np
import pytest
import safetensors.torch
import torch

from lopt import HRNNConfig, MetaParams, metaparams

CONFIGS = {
    "paper": HRNNConfig(),
    "attention": HRNNConfig(attention=True),
    "two_levels": HRNNConfig(level_sizes=(10, 20)),
    "one_level": HRNNConfig(level_sizes=(10,)),
    "bare": HRNNConfig(
        gradient_products=False,
        log_ms_features=False,
        relative_log_lr=None,
        dynamic_output_scale=False,
        learnable_decay=False,
        gradient_shortcut=False,
        timescales=1,
    ),
}


def equal(left: MetaParams, right: MetaParams) -> bool:
    return (
        left.config == right.config and list(left) == list(right) and all(torch.equal(left[k], right[k]) for k in left)
    )


@pytest.mark.parametrize(
    ("name", "count"), [("paper", 8349), ("attention", 8363), ("two_levels", 3979), ("one_level", 749)]
)
def test_number_of_metaparams_is_that_of_the_original(name, count):
    assert MetaParams.init(CONFIGS[name]).count == count


def test_init_draws_the_distributions_of_the_original():
    # A wide architecture, so that a sample standard deviation is within 5 of its own standard errors of the true one.
    config = HRNNConfig(level_sizes=(200, 100, 100), timescales=100, zero_init_lr_weights=False)
    meta = MetaParams.init(config, seed=3)

    def spread(name: str) -> tuple[float, float]:
        return meta[name].std().item(), 5 / math.sqrt(2 * meta[name].numel())

    for name in (
        "level0.gates.weight",
        "level0.from_level1.weight",
        "level1.candidate.weight",
        "level2.gates.weight",
        "direction.weight",
        "scale_decay.weight",
        "log_lr.weight",
    ):
        std, error = spread(name)
        assert std / (0.5 / math.sqrt(meta[name].shape[0])) == pytest.approx(1, abs=error), name
    std, error = spread("direction.shortcut")
    assert std / (0.1 / math.sqrt(100)) == pytest.approx(1, abs=error)
    assert meta["direction.shortcut"].mean().item() == pytest.approx(1 / 100, abs=5 * 0.01 / math.sqrt(100))
    for level, size in enumerate(config.level_sizes):
        init = meta[f"level{level}.init"]
        assert init.abs().max() <= 1
        assert init.std().item() == pytest.approx(1 / math.sqrt(3), rel=5 / math.sqrt(size))
    assert torch.all(meta["level0.gates.bias"] == 2.2)
    assert torch.all(meta["level2.candidate.bias"] == 0)
    assert meta["scale_decay.bias"].item() == pytest.approx(3.2)
    assert meta["grad_decay.bias"].item() == pytest.approx(2.2)
    assert meta["log_lr.momentum"].item() == pytest.approx(3.2)
    assert meta["log_step.offset"].item() == -1


def test_init_starts_lr_weights_at_zero_and_attention_at_the_direction():
    meta = MetaParams.init(CONFIGS["attention"], seed=1)
    assert torch.all(meta["log_lr.weight"] == 0)
    assert torch.equal(meta["attention.weight"], meta["direction.weight"])
    assert not torch.equal(meta["attention.shortcut"], meta["direction.shortcut"])


def test_init_depends_on_its_seed_alone():
    state = torch.get_rng_state()
    assert equal(MetaParams.init(seed=5), MetaParams.init(seed=5))
    assert not equal(MetaParams.init(seed=5), MetaParams.init(seed=6))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.device("meta"):
        assert equal(MetaParams.init(seed=5), MetaParams.init(seed=5))


@pytest.mark.parametrize("name", CONFIGS)
def test_file_round_trip_is_exact(name, tmp_path):
    meta = MetaParams.init(CONFIGS[name], seed=2)
    meta.save(tmp_path / "meta.safetensors", card={"seed": "2"})
    assert equal(MetaParams.load(tmp_path / "meta.safetensors"), meta)
    assert [file.name for file in tmp_path.iterdir()] == ["meta.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "meta.safetensors"
    meta = MetaParams.init()
    meta.save(path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="str"):
        MetaParams.init(seed=1).save(path, card={"seed": 1})
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_truncated_and_foreign_files_are_refused_by_name(tmp_path):
    path = tmp_path / "meta.safetensors"
    MetaParams.init().save(path)
    whole = path.read_bytes()
    for content in (whole[:-5], whole[:100], b"", b"PK\x03\x04 something else", bytes(8)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"meta\.safetensors is not a readable safetensors file"):
            MetaParams.load(path)
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"meta\.safetensors holds no lopt meta-parameters"):
        MetaParams.load(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        MetaParams.load(tmp_path / "nowhere.safetensors")


def test_a_file_whose_tensors_do_not_fit_its_configuration_is_refused(tmp_path):
    path = tmp_path / "meta.safetensors"
    MetaParams.init().save(path)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    header["__metadata__"]["config"] = CONFIGS["two_levels"].to_json()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    with pytest.raises(ValueError, match=r"meta\.safetensors.*level2.*do not belong"):
        MetaParams.load(path)


@pytest.mark.parametrize("name", CONFIGS)
def test_flat_view_follows_the_layout_and_inverts(name):
    config = CONFIGS[name]
    meta = MetaParams.init(config)
    flat = meta.flat()
    assert flat.shape == (meta.count,)
    for key, (offset, shape) in MetaParams.layout(config).items():
        assert torch.equal(flat[offset : offset + math.prod(shape)].reshape(shape), meta[key])
    assert equal(MetaParams.from_flat(config, flat), meta)
    with pytest.raises(ValueError, match="flat vector"):
        MetaParams.from_flat(config, flat[1:])


@pytest.mark.parametrize("name", CONFIGS)
def test_tensorflow_names_round_trip(name):
    meta = MetaParams.init(CONFIGS[name], seed=4)
    arrays = meta.to_tf()
    assert arrays["update_weights"].shape == (10, 1)
    assert arrays["Level0_RNN/init_vector"].shape == (1, 10)
    assert equal(MetaParams.from_tf(arrays, meta.config), meta)
    assert equal(MetaParams.from_tf({f"LOL/{key}:0": value for key, value in arrays.items()}, meta.config), meta)


def test_tensorflow_arrays_that_do_not_fit_are_refused_by_name():
    arrays = MetaParams.init().to_tf()
    with pytest.raises(ValueError, match=r"Layer2_RNN/BiasGRUCell.*do not belong"):
        MetaParams.from_tf(arrays, CONFIGS["two_levels"])
    with pytest.raises(ValueError, match=r"'attention_weights' .*is missing"):
        MetaParams.from_tf(arrays, CONFIGS["attention"])
    with pytest.raises(ValueError, match=r"'update_weights' has shape \(11, 1\)"):
        MetaParams.from_tf({**arrays, "update_weights": np.zeros((11, 1), np.float32)}, HRNNConfig())
    name = next(name for name, array in arrays.items() if array.ndim == 2 and 1 < array.shape[0] != array.shape[1] > 1)
    with pytest.raises(ValueError, match=f"'{name}' has shape"):  # as many numbers, in another order
        MetaParams.from_tf({**arrays, name: arrays[name].T}, HRNNConfig())


def test_tensors_that_do_not_fit_are_refused_by_name():
    meta = dict(MetaParams.init())
    with pytest.raises(ValueError, match=r"log_lr\.bias.* missing"):
        MetaParams(HRNNConfig(), {k: v for k, v in meta.items() if k != "log_lr.bias"})
    with pytest.raises(ValueError, match=r"surplus.* do not belong"):
        MetaParams(HRNNConfig(), {**meta, "surplus": torch.zeros(())})
    with pytest.raises(ValueError, match=r"'direction\.weight' has shape \(9,\)"):
        MetaParams(HRNNConfig(), {**meta, "direction.weight": torch.zeros(9)})
    with pytest.raises(ValueError, match="share one floating dtype"):
        MetaParams(HRNNConfig(), {**meta, "direction.weight": torch.zeros(10, dtype=torch.float64)})


def test_resolve_takes_params_paths_and_names(tmp_path):
    meta = MetaParams.init(seed=9)
    assert MetaParams.resolve(meta) is meta
    meta.save(tmp_path / "mine.safetensors")
    assert equal(MetaParams.resolve(tmp_path / "mine.safetensors"), meta)
    assert equal(MetaParams.resolve(str(tmp_path / "mine.safetensors")), meta)
    for name in MetaParams.shipped():
        assert MetaParams.resolve(name).config.hidden_size == 10
    with pytest.raises(TypeError, match=r"got HRNNConfig; MetaParams.init\(config\) makes untrained ones"):
        MetaParams.resolve(HRNNConfig())
    with pytest.raises(TypeError, match="meta must be MetaParams, a path, a name or None, got int"):
        MetaParams.resolve(5)
    with pytest.raises(FileNotFoundError, match="'unheard-of' is neither a file nor the name of shipped weights"):
        MetaParams.resolve("unheard-of")


def test_shipped_weights_are_listed_by_number_and_one_of_them_is_the_default(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    kept = {name: MetaParams.init(seed=seed) for seed, name in enumerate(("hrnn-9", "hrnn-10", "hrnn-2"))}
    for name, meta in kept.items():
        meta.save(tmp_path / "weights" / f"{name}.safetensors")
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    assert [*MetaParams.shipped()] == ["hrnn-2", "hrnn-9", "hrnn-10"]
    for name in kept:
        monkeypatch.setattr(metaparams, "DEFAULT", name)
        assert equal(MetaParams.resolve(None), kept[name])
