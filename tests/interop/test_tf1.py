"""The reference against recordings of the original code."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lopt import HRNNConfig, backends, cli
from lopt.backends.reference import Segments, scaled_gradients
from lopt.interop import tf1
from lopt.interop.tf1_names import config_of

RECORDINGS = Path(__file__).parents[1] / "recordings"
TRAJECTORIES = sorted(path.stem for path in RECORDINGS.glob("traj_*.npz"))
META_GRADIENTS = sorted(path.stem for path in RECORDINGS.glob("metagrad_*.npz"))
BACKENDS = [name for name, reason in backends.available().items() if reason is None and name != "cuda"]


def test_recordings_cover_every_kind_of_feature():
    assert len(TRAJECTORIES) >= 8
    assert len(META_GRADIENTS) >= 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TRAJECTORIES)
def test_replayed_trajectory_equals_the_recording(name, backend):
    path = RECORDINGS / f"{name}.npz"
    recording = tf1.load_recording(path)
    try:
        replayed = tf1.replay(path, backend)
    except RuntimeError as error:
        # A kernel that does not cover a configuration says so before the first step.
        assert "cannot be used" in str(error)
        pytest.skip(str(error))
    errors = tf1.compare(recording, replayed)
    assert max(errors.values()) <= tf1.TOLERANCE, errors


@pytest.mark.parametrize("name", META_GRADIENTS)
def test_replayed_meta_gradients_equal_the_recording(name):
    path = RECORDINGS / f"{name}.npz"
    errors = tf1.compare(tf1.load_recording(path), tf1.replay_meta_gradient(path))
    assert max(errors.values()) <= tf1.TOLERANCE, errors


def test_comparison_sees_an_error_above_the_tolerance_and_a_missing_slot():
    path = RECORDINGS / "traj_e_one_level.npz"
    recording, replayed = tf1.load_recording(path), tf1.replay(path)
    spoilt = {**replayed, "param/2": replayed["param/2"] * np.float32(1 + 3 * tf1.TOLERANCE)}
    assert tf1.compare(recording, spoilt)["param"] > tf1.TOLERANCE
    del spoilt["param/2"]
    with pytest.raises(ValueError, match="param/2"):
        tf1.compare(recording, spoilt)


def test_replay_prints_every_slot_and_fails_on_a_spoilt_recording(tmp_path, capsys):
    path = RECORDINGS / "traj_e_one_level.npz"
    assert cli.main(["replay", str(path), str(RECORDINGS / "metagrad_d_two_levels_second.npz")]) == 0
    printed = capsys.readouterr().out
    assert "state/log_learning_rate" in printed
    assert "u1/dmeta/update_weights" in printed
    spoilt = tf1.load_recording(path)
    spoilt["state/0/ms1"] = spoilt["state/0/ms1"] * 1.01
    np.savez(tmp_path / "spoilt.npz", **spoilt)
    assert cli.main(["replay", str(tmp_path / "spoilt.npz")]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_foreign_and_missing_files_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        tf1.replay(tmp_path / "none.npz")
    np.savez(tmp_path / "foreign.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"foreign\.npz is no recording"):
        tf1.replay(tmp_path / "foreign.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"text\.npz is not a readable"):
        tf1.replay(tmp_path / "text.npz")
    with pytest.raises(ValueError, match="no recorded meta-gradient"):
        tf1.replay_meta_gradient(RECORDINGS / "traj_e_one_level.npz")
    with pytest.raises(ValueError, match="no recorded trajectory"):
        tf1.replay(RECORDINGS / "metagrad_a_second.npz")


def test_damaged_recordings_are_refused_by_what_is_wrong(tmp_path):
    whole = RECORDINGS / "traj_a_default.npz"
    damaged, arrays = tmp_path / "damaged.npz", dict(tf1.load_recording(whole))
    damaged.write_bytes(whole.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"damaged\.npz is not a readable"):
        tf1.load_recording(damaged)
    np.savez(damaged, **{**arrays, "config_json": np.array("{level_sizes")})
    with pytest.raises(ValueError, match="config_json that is no JSON"):
        tf1.load_recording(damaged)
    for missing, named in (("param0/1", "param0/1"), ("state0/0/ms1", "ms1")):
        np.savez(damaged, **{name: array for name, array in arrays.items() if name != missing})
        with pytest.raises(ValueError, match=f"no array '{named}'"):
            tf1.replay(damaged)


def test_every_recorded_unroll_is_repeated(tmp_path):
    arrays = tf1.load_recording(RECORDINGS / "metagrad_d_two_levels_second.npz")
    again = {name.replace("u1/", "u2/"): array for name, array in arrays.items() if name.startswith("u1/")}
    np.savez(tmp_path / "three.npz", **arrays, **again)
    recording = tf1.load_recording(tmp_path / "three.npz")
    errors = tf1.compare(recording, tf1.replay_meta_gradient(tmp_path / "three.npz"))
    assert errors["u1/metaobj"] < 1e-4 < errors["u2/metaobj"]  # it is not the one before


def test_replay_goes_on_from_the_middle_of_a_recording(tmp_path):
    recording = tf1.load_recording(RECORDINGS / "traj_a_default.npz")
    middle = dict(recording)
    for i in range(4):
        middle[f"param0/{i}"] = recording[f"param/{i}"][4]
        for key in [key for key in recording if key.startswith(f"state0/{i}/")]:
            middle[key] = recording[key.replace("state0", "state")][4]
    middle["global0"] = recording["global"][4]
    for key in [
        key for key in recording if key.startswith(("param/", "attend/", "grads/", "state/")) or key == "global"
    ]:
        middle[key] = recording[key][5:]
    middle["T"] = np.array(7)
    np.savez(tmp_path / "middle.npz", **middle)
    errors = tf1.compare(middle, tf1.replay(tmp_path / "middle.npz"))
    assert max(errors.values()) <= tf1.TOLERANCE, errors


def test_a_start_that_decays_cannot_represent_is_refused(tmp_path):
    recording = tf1.load_recording(RECORDINGS / "traj_a_default.npz")
    recording["state0/1/inp_decay"] = recording["state0/1/inp_decay"] + 0.5
    np.savez(tmp_path / "odd.npz", **recording)
    with pytest.raises(ValueError, match="tensor 1 starts with decays"):
        tf1.replay(tmp_path / "odd.npz")


def test_constructor_arguments_of_the_original_translate():
    config = config_of(
        {"level_sizes": [10, 30], "use_relative_lr": True, "use_problem_lr_mean": False, "max_log_lr": 5}
    )
    assert config == HRNNConfig(level_sizes=(10, 30), relative_log_lr="tensor", log_lr_max=5.0, global_input="last")
    with pytest.raises(ValueError, match="use_magic"):
        config_of({"use_magic": True})


def test_stable_asinh_equals_the_recorded_one_where_that_is_accurate():
    recorded = np.load(RECORDINGS / "unit_utils.npz")
    x, y = recorded["asinh/x"].astype(np.float64), recorded["asinh/y"].astype(np.float64)
    ours = torch.asinh(torch.from_numpy(recorded["asinh/x"])).double().numpy()
    assert np.isfinite(ours).all()
    # The original's log(x + sqrt(1 + x^2)) rounds a sum of size max(|x|, 1) to float32 before it takes the logarithm:
    # for negative x the sum is 1 / (2|x|), so the relative error is 2^-24 * 2 x^2, a few roundings of it. The logarithm
    # itself is rounded at its own size.
    with np.errstate(over="ignore"):
        error = 4 * 2.0**-24 * (1 + np.where(x < 0, 2 * x**2, 1) + np.abs(y))
    accurate = np.isfinite(y) & (error < 0.1)
    assert accurate.sum() > 60
    assert np.all(np.abs(ours - y)[accurate] <= error[accurate])


def test_rms_scaling_equals_the_recorded_one():
    recorded = np.load(RECORDINGS / "unit_utils.npz")
    config = HRNNConfig(timescales=1, gradient_products=False)
    for j in range(int(recorded["rms/count"])):
        grad, decay, ms = (torch.from_numpy(recorded[f"rms/{j}/{name}"][:, 0]) for name in ("grad", "decay", "ms"))
        _, new_ms, scaled = scaled_gradients(config, Segments([len(grad)]), grad, ms[None], ms[None], decay, decay)
        np.testing.assert_allclose(new_ms[0], recorded[f"rms/{j}/new_ms"][:, 0], rtol=1e-6)
        expected = recorded[f"rms/{j}/scaled"][:, 0]
        # The recorded asinh is the naive one: good to 1e-4 where its argument is above -100, its value above -5.3.
        good = np.isfinite(expected) & (expected > -5.3)
        assert good.any()
        np.testing.assert_allclose(scaled[0].numpy()[good], expected[good], atol=1e-4)
