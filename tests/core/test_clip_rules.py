"""The sensitivity that each clip rule promises is kept, and no smaller than needed."""

import math

import numpy as np
import pytest

from dptrain.core import clip_rules
from dptrain.core.clip_rules import Automatic, Flat, GroupWise, PerLayer, Quantile


def clip(rule, blocks):
    """What `rule` makes of one example's gradient, given as blocks."""
    whole = math.sqrt(sum(float(b @ b) for b in blocks))
    match rule:
        case Flat():
            return [b * min(1.0, rule.clip_norm / whole) for b in blocks]
        case Automatic():
            return [b * rule.clip_norm / (whole + rule.stability) for b in blocks]
        case _:
            limits = zip(blocks, rule.clip_norms, strict=True)
            return [b * min(1.0, c / np.linalg.norm(b)) for b, c in limits]


RULES = [Flat(1.3), Automatic(0.4), PerLayer((3.0, 0.1, 4.0)), GroupWise((1.0, 2.0, 2.0), ("a", "b", ""))]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_sensitivity_bounds_every_gradient_and_is_tight(rule):
    rng = np.random.default_rng(0)
    worst = 0.0
    for scale in 10.0 ** rng.uniform(-3, 6, size=200):
        blocks = [rng.normal(size=5) * scale for _ in range(3)]
        norm = float(np.linalg.norm(np.concatenate(clip(rule, blocks))))
        assert norm <= rule.sensitivity * (1 + 1e-12)
        worst = max(worst, norm)
    assert worst > 0.999 * rule.sensitivity


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_round_trip(rule):
    assert clip_rules.from_dict(clip_rules.to_dict(rule)) == rule


@pytest.mark.parametrize(
    "make",
    [
        lambda: Flat(0),
        lambda: Flat(math.nan),
        lambda: Automatic(1.0, 0),
        lambda: PerLayer(()),
        lambda: PerLayer((1.0, -1.0)),
        lambda: GroupWise(1.0, ("",)),
        lambda: GroupWise((1.0,), ("?",)),
        lambda: GroupWise((1.0, 1.0), ("a",)),
        lambda: Quantile(1.0, 1e-300).noise_on_gradients(1.0),
        lambda: clip_rules.from_dict({"rule": "none"}),
        lambda: clip_rules.from_dict({"rule": "flat", "clip_norm": 1.0, "more": 2}),
    ],
)
def test_bad_rules_are_refused(make):
    with pytest.raises(ValueError):
        make()
