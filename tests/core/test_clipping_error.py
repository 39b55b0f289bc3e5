"""The margin of clip factors: numbers that the derivation says."""

import pytest

from dptrain.core.clipping_error import BLOCKS, GRAM, LEVEL, LEVELS, margin, shortfall
from dptrain.core.precision import gamma


def test_the_margin_is_next_to_nothing():
    for elements in (1, 1000, 10**6, 10**8):
        assert 1e-6 < 1 - margin("float32", elements, 200, 1.0, BLOCKS) < 6e-6
        assert 1e-6 < 1 - margin("float32", elements, 200, 1.0, LEVELS) < 2e-5
        for route in (BLOCKS, LEVELS):
            assert 1e-15 < 1 - margin("float64", elements, 200, 1.0, route) < 1e-10


def test_longer_sums_err_more():
    assert shortfall("float32", 10**6, 1, LEVELS) == gamma(4 * LEVEL + 9, "float32")
    assert shortfall("float32", 10**4, 1, LEVELS) == gamma(3 * LEVEL + 9, "float32")
    assert shortfall("float32", 10**6, 1, BLOCKS) < shortfall("float32", 10**6, 1, LEVELS)
    assert shortfall("float32", 10**6, 1, GRAM) == gamma(8, "float32")
    assert shortfall("float64", 10**9, 1, BLOCKS) > shortfall("float64", 10**6, 1, BLOCKS)


def test_squares_that_vanish_count():
    assert margin("float32", 10**9, 1, 1e-12, BLOCKS) < margin("float32", 10**9, 1, 1.0, BLOCKS)
    with pytest.raises(ValueError, match="raise the clip norm"):
        margin("float32", 10**9, 1, 1e-16, BLOCKS)


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"route": "luck"}, {"elements": 0}])
def test_what_is_not_derived_is_refused(change):
    known = {"dtype": "float32", "elements": 10, "parts": 1, "clip_norm": 1.0, "route": BLOCKS}
    with pytest.raises(ValueError):
        margin(**(known | change))
