"""The dtype policy."""

import numpy as np
import pytest

from dptrain.core.precision import TABLE, gamma, resolve, unit_roundoff


def test_norms_and_noise_never_fall_below_float32():
    for precision in TABLE:
        assert unit_roundoff(precision.accumulate) <= unit_roundoff("float32")
        assert precision.gram in ("float32", "float64")
        assert unit_roundoff(precision.gram) <= unit_roundoff(precision.compute)


def test_only_tf32_allows_tf32():
    assert [p.name for p in TABLE if p.tf32_matmul] == ["tf32"]
    assert (resolve("bf16").compute, resolve("fp64").accumulate) == ("bfloat16", "float64")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_unit_roundoff_is_half_the_machine_epsilon(dtype):
    assert unit_roundoff(dtype) == float(np.finfo(dtype).eps) / 2


def test_gamma_bounds_a_float32_inner_product():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 1000)).astype(np.float32)
    error = abs(float(np.dot(x, y)) - float(np.dot(x.astype(float), y.astype(float))))
    assert error <= gamma(1000, "float32") * float(np.abs(x * y).sum())
    assert gamma(0, "float32") == 0
    assert gamma(1, "bfloat16") == 2**-8 / (1 - 2**-8)


def test_meaningless_bounds_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match="too many"):
        gamma(256, "bfloat16")
    with pytest.raises(ValueError, match="choose one of: fp32"):
        resolve("fp8")
    with pytest.raises(ValueError, match="dtype"):
        gamma(1, "int8")
