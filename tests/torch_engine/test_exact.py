"""Case x method against the float64 oracle: sums and norms, with hostile rows."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map

import dptrain.torch as dpt
from dptrain.core import methods

from . import oracle
from .cases import CASES, build

PRIVATE = [row.name for row in methods.TABLE if row.is_private]
TOLERANCE = 1e-9

every_case_and_method = pytest.mark.parametrize(
    ("case", "method"),
    [
        pytest.param(case, method, id=f"{case.name}-{method}")
        for case in CASES
        for method in PRIVATE
        if case.transforms or method != "per-example-vmap"
    ],
)


def poisoned(batch, row: int, value: float):
    """The batch with one example's floats set to ``value``; integers stay as they are."""

    def poison(t):
        if t.is_floating_point():
            t = t.clone()
            t[row] = value
        return t

    return tree_map(poison, batch)


def both(case, method, size=None):
    model, batch = build(case, size)
    return model, batch, lambda c: dpt.clipped_grad(model, case.loss, clip_norm=c, method=method)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@every_case_and_method
def test_equals_single_examples(case, method):
    """Sum and norms, everything clipped, nothing clipped, and half and half."""
    model, batch, make = both(case, method)
    _, norms = oracle.clipped_sum(model, case.loss, batch, 1.0)
    clipped = make(float(norms.median()))
    expected, norms = oracle.clipped_sum(model, case.loss, batch, clipped.clip_norm)
    out = clipped(batch)
    torch.testing.assert_close(out.norms, norms, rtol=TOLERANCE, atol=1e-12)
    assert oracle.relative_error(out.grads, expected) < TOLERANCE
    assert set(out.grads) == set(expected)
    for name, parameter in model.named_parameters():
        assert out.grads[name].shape == parameter.shape and parameter.grad is None
    again = clipped(batch, None, out)  # in place
    assert oracle.relative_error(again.grads, {name: 2 * g for name, g in expected.items()}) < TOLERANCE


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@every_case_and_method
def test_masked_nan_and_infinite_examples(case, method):
    """Masked rows hold NaN, one real example is infinite: only the others count."""
    model, batch, make = both(case, method, size=5)
    mask = torch.tensor([True, False, True, True, False])
    hostile = poisoned(poisoned(batch, 1, float("nan")), 2, float("inf"))
    floats = any(t.is_floating_point() for t in batch.values())
    keep = [True, False, not floats, True, False]
    expected, norms = oracle.clipped_sum(model, case.loss, batch, 0.7, keep)
    out = make(0.7)(hostile, mask)
    assert oracle.relative_error(out.grads, expected) < TOLERANCE
    assert all(g.isfinite().all() for g in out.grads.values())
    torch.testing.assert_close(out.norms[[0, 3]], norms[[0, 3]], rtol=TOLERANCE, atol=1e-12)
    assert (out.norms[~mask] == 0).all() and (out.losses[~mask] == 0).all()
