"""The elementary functions of csrc/simd.h: the error bounds that its head states, for every instruction set here."""

import numpy as np
import pytest

from lopt import native

pytestmark = pytest.mark.skipif(native.absent() is not None, reason=str(native.absent()))


def apply(name: str, x: np.ndarray) -> np.ndarray:
    x, y = np.ascontiguousarray(x, np.float32), np.empty(len(x), np.float32)
    native.load().map(name, x.ctypes.data, y.ctypes.data, len(x))
    return y


def ulps(y: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Error in units in the last place of the exact value, normal numbers."""
    return np.abs(y.astype(np.float64) - exact) / np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)


def both_signs(magnitudes: np.ndarray) -> np.ndarray:
    return np.concatenate([-magnitudes, magnitudes]).astype(np.float32)


def test_exp2_is_within_three_ulps(isa):
    x = np.linspace(-125.9, 127.9, 200_001).astype(np.float32)
    assert ulps(apply("exp2", x), np.exp2(x.astype(np.float64))).max() <= 3


def test_exp2_saturates_and_never_makes_nan_of_a_number(isa):
    y = apply("exp2", np.array([-1e30, -200, 200, 1e30, -np.inf, np.inf], np.float32))
    assert not np.isnan(y).any()
    assert np.all(y[[0, 1, 4]] <= 2.0**-126 * (1 + 3 * 2.0**-23))
    assert np.all(y[[2, 3, 5]] >= 2.0**127)


def test_log_is_within_two_ulps_or_its_absolute_bound_near_one(isa):
    x = np.concatenate([np.geomspace(2e-38, 2e38, 200_001), np.linspace(0.3, 3, 100_001)]).astype(np.float32)
    exact = np.log(x.astype(np.float64))
    y = apply("log", x)
    near = np.abs(exact) < 1
    assert ulps(y[~near], exact[~near]).max() <= 2
    assert np.abs(y[near] - exact[near]).max() <= 1.2e-7


def test_rsqrt_is_within_two_ulps(isa):
    x = np.geomspace(1e-36, 1e36, 200_001).astype(np.float32)
    assert ulps(apply("rsqrt", x), 1 / np.sqrt(x.astype(np.float64))).max() <= 2


def test_ratio_is_within_one_ulp(isa):
    x = both_signs(np.geomspace(1e-36, 1e36, 200_001))
    assert ulps(apply("reciprocal", x), 1 / x.astype(np.float64)).max() <= 1


def test_asinh_is_odd_and_within_five_ulps(isa):
    x = both_signs(np.concatenate([np.geomspace(1e-30, 1e17, 200_001), np.linspace(0.01, 4, 100_001)]))
    y = apply("asinh", x)
    assert ulps(y, np.arcsinh(x.astype(np.float64))).max() <= 5
    half = len(x) // 2
    np.testing.assert_array_equal(y[:half], -y[half:])


def test_bf16_rounds_to_nearest_even_and_keeps_special_values(isa):
    values = np.random.default_rng(0).standard_normal(100_003).astype(np.float32)
    ties = (np.arange(0x3F80_0000, 0x3F90_0000, 0x8000, dtype=np.uint32)).view(np.float32)
    x = np.concatenate([values, ties, np.float32([0, -0.0, np.inf, -np.inf])])
    bits = x.view(np.uint32).astype(np.uint64)
    expected = (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)
    np.testing.assert_array_equal(apply("bf16", x).view(np.uint32), expected.view(np.uint32))
    assert np.isnan(apply("bf16", np.float32([np.nan]))).all()


def test_f16_rounds_like_ieee_and_keeps_special_values(isa):
    generator = np.random.default_rng(0)
    x = (generator.standard_normal(100_003) * 10.0 ** generator.uniform(-4, 4, 100_003)).astype(np.float32)
    x = np.concatenate([x, np.float32([0, -0.0, 65504, 65519, np.inf, -np.inf])])
    normal = (np.abs(x) >= 2.0**-14) | (x == 0)  # subnormal halves may be flushed
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(apply("f16", x)[normal], expected[normal])
    assert np.isnan(apply("f16", np.float32([np.nan]))).all()


def test_tails_of_every_length_are_written_whole_and_nothing_behind_them(isa):
    for n in (1, 3, 15, 16, 17, 33):
        x, y = np.linspace(1, 2, n).astype(np.float32), np.full(n + 16, -7, np.float32)
        native.load().map("log", x.ctypes.data, y.ctypes.data, n)
        np.testing.assert_allclose(y[:n], np.log(x), atol=1.2e-7)
        assert np.all(y[n:] == -7)


def test_an_unknown_function_is_refused():
    with pytest.raises(ValueError, match="no function 'sin'"):
        apply("sin", np.zeros(1))
