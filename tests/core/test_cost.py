"""Costs against counting, and the two published rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.core import cost
from dptrain.core.cost import Cost, UseShape

SIZES = st.integers(1, 4096)


def test_costs_of_one_use():
    use = UseShape(positions=5, d_in=3, d_out=7, groups=2)
    assert cost.gram(use, examples=4) == Cost(4 * 2 * 2 * 25 * 10, 4 * 2 * 2 * 25 * 4)
    assert cost.materialise(use, examples=4) == Cost(4 * 2 * 5 * 2 * 21, 4 * 2 * 21 * 4)
    assert cost.contract(use, examples=4) == Cost(4 * 2 * 5 * 2 * 21, 2 * 21 * 4)
    assert cost.reuse(use, examples=4).flops == 4 * 4 * 2 * 21
    assert cost.gram(use) + cost.contract(use) == Cost(1000 + 420, 400 + 168)


@given(SIZES, SIZES, SIZES)
def test_the_rules_agree_with_the_costs(positions, d_in, d_out):
    use = UseShape(positions, d_in, d_out)
    gram, materialise = cost.gram(use), cost.materialise(use)
    assert cost.gram_saves_memory(use) == (gram.bytes <= materialise.bytes)
    assert cost.gram_saves_time(use) == (gram.flops < materialise.flops)


def test_known_layers():
    # A linear layer of a ViT-Base at 224 pixels, and an early convolution of a ResNet.
    assert cost.gram_saves_memory(UseShape(197, 768, 3072))
    assert not cost.gram_saves_memory(UseShape(56 * 56, 576, 64))


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="positions"):
        UseShape(0, 1, 1)
