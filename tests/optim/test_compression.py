"""Compression of private gradients: what stays, what is remembered, and that nothing else enters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dptrain.torch as dpt
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism
from dptrain.optim.compression import ErrorFeedback, projected, top_k
from dptrain.optim.wire import Wire, index_bytes, wire
from dptrain.torch.projections import at_random, largest


@pytest.fixture
def clipped_sum():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    clipped = dpt.clipped_grad(model, lambda m, x: m(x).square().sum(1), clip_norm=1.0, method="per-example")
    return clipped(torch.randn(4, 6))


def released(clipped_sum, seed=0):
    mechanism = Mechanism.constant(
        noise_multiplier=1.0, clip_norm=1.0, sample_rate=0.5, steps=1, expected_batch_size=4.0
    )
    return dpt.privatize(clipped_sum, mechanism, Key.from_seed(seed))


def test_top_k_keeps_the_largest_of_the_noisy_gradient(clipped_sum):
    gradient = released(clipped_sum)
    sent = top_k(gradient, 0.2)
    assert isinstance(sent, dpt.PrivateGradient) and sent.spec is gradient.spec and not sent.spec.grid
    for name, g in sent.grads.items():
        expected = max(1, round(0.2 * g.numel()))
        assert int(g.count_nonzero()) == expected
        assert torch.equal(g[g != 0], gradient.grads[name][g != 0])
        assert g.abs()[g != 0].min() >= gradient.grads[name][g == 0].abs().max()
    together = top_k(gradient, 0.2, of_all=True)
    assert sum(int(g.count_nonzero()) for g in together.grads.values()) == round(
        0.2 * sum(g.numel() for g in gradient.grads.values())
    )


def test_what_is_left_out_comes_with_the_next_gradient(clipped_sum):
    gradients = [released(clipped_sum, seed) for seed in range(5)]
    feedback = ErrorFeedback(gradients[0].grads)
    sent = [feedback(g, lambda g: top_k(g, 0.1)) for g in gradients]
    for name, left in feedback.memory.items():
        total = sum(g.grads[name] for g in gradients)
        torch.testing.assert_close(sum(g.grads[name] for g in sent) + left, total)
        assert left.abs().sum() > 0
        assert int(sent[-1].grads[name].count_nonzero()) == max(1, round(0.1 * left.numel()))
    again = ErrorFeedback(gradients[0].grads)
    for name, left in again.memory.items():
        left.copy_(feedback.memory[name])  # as a checkpoint restores it
    one, other = (f(gradients[0], lambda g: top_k(g, 0.1)) for f in (feedback, again))
    assert all(torch.equal(one.grads[n], other.grads[n]) for n in one.grads)


@pytest.mark.parametrize("compress", [
    lambda g: top_k(g, 0.1),
    lambda g: projected(g, {}),
    lambda g: ErrorFeedback({})(g, lambda g: g),
])  # fmt: skip
def test_only_private_gradients_enter(clipped_sum, compress):
    for other in (clipped_sum, clipped_sum.grads, {"w": torch.zeros(2)}):
        with pytest.raises(TypeError, match="takes a PrivateGradient"):
            compress(other)


def test_projections_and_memories_of_other_parameters_are_refused(clipped_sum):
    gradient = released(clipped_sum)
    with pytest.raises(ValueError, match="other parameters"):
        projected(gradient, at_random({"w": torch.zeros(3)}, 0.5, Key.from_seed(0)))
    with pytest.raises(ValueError, match="other parameters"):
        ErrorFeedback({"w": torch.zeros(3)})(gradient, lambda g: g)


def test_bytes_of_a_step():
    shapes = {"w": (10, 20), "b": (10,), "scale": ()}
    assert wire(shapes, None, known=True) == Wire(844, 844, 844)
    assert wire(shapes, 20, known=True) == Wire(80, 80, 844)
    assert wire(shapes, 20, known=False) == Wire(844, 160, 844), "who adds up needs all, indices come along"
    assert wire(shapes, 20, known=True, remembers=True) == Wire(844, 80, 844)
    assert [index_bytes(n) for n in (2**32, 2**32 + 1)] == [4, 8]
    kept = largest({n: torch.randn(s) for n, s in shapes.items()}, 0.1)
    assert [m.size for m in kept.values()] == [20, 1, 1]
