"""Public subspaces before clipping, in float64 against single examples projected by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dptrain.torch as dpt
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism
from dptrain.optim.compression import projected
from dptrain.torch import projections
from dptrain.torch.projections import Mask, Subspace, at_random, first_axes, largest, principal, whole
from dptrain.torch.public import mean_gradient, single_gradients
from dptrain.torch.subspace import Restricted

from . import oracle

SIZE, CLIP = 9, 0.3
METHODS = ("auto", "ghost", "bk-mix-opt", "per-example-vmap", "per-example-loop")


class Tied(nn.Module):
    """A convolution, a weight that is used twice, and a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.twice = nn.Linear(12, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = torch.tanh(self.conv(x)).flatten(1)
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.fixture
def setting():
    torch.manual_seed(0)
    model = Tied().double()
    batch = torch.randn(SIZE, 1, 4, 4, dtype=torch.float64), torch.randint(4, (SIZE,))
    public = torch.randn(20, 1, 4, 4, dtype=torch.float64), torch.randint(4, (20,))
    return model, batch, public


def kinds(model, public):
    """Projections of every kind, from public examples or a key."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    mean = mean_gradient(model, loss_fn, [public])
    return {
        "mask": largest(mean, 0.2),
        "global mask": largest(mean, 0.2, of_all=True),
        "random": at_random(parameters, 0.2, Key.from_seed(0)),
        "subspace": principal(single_gradients(model, loss_fn, [public]), 3, Key.from_seed(0)),
        "whole": whole(parameters),
    }


def by_hand(model, batch, projection, clip_norm=CLIP):
    """(sum of clipped projected gradients, norms [B]), one example at a time."""
    parameters = dict(model.named_parameters())
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    norms = []
    for b in range(len(batch[1])):
        loss = loss_fn(model, (batch[0][b : b + 1], batch[1][b : b + 1])).sum()
        grads = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        kept = {n: projection[n](g) for n, g in grads.items()}
        norms.append(sum(g.square().sum() for g in kept.values()).sqrt())
        for n, g in kept.items():
            total[n] += g * min(1.0, clip_norm / float(norms[-1]))
    return total, torch.stack(norms)


@pytest.mark.parametrize("method", METHODS)
def test_clipped_are_the_projected_gradients(setting, method):
    model, batch, public = setting
    restricted = Restricted(loss_fn, whole(dict(model.named_parameters())))
    clipped = dpt.clipped_grad(model, restricted, clip_norm=CLIP, method=method)
    for name, projection in kinds(model, public).items():
        if name == "subspace":  # another kind, and so another plan
            restricted = Restricted(loss_fn, projection)
            clipped = dpt.clipped_grad(model, restricted, clip_norm=CLIP, method=method)
        restricted.projections = projection
        out = clipped(batch)
        expected, norms = by_hand(model, batch, projection)
        torch.testing.assert_close(out.norms, norms, rtol=1e-6, atol=0)
        assert oracle.relative_error(out.grads, expected) < 1e-6, name
        torch.testing.assert_close(out.losses, loss_fn(model, batch).detach(), rtol=1e-12, atol=1e-12)


def test_projections_change_without_another_plan(setting, monkeypatch):
    model, batch, _ = setting
    parameters = dict(model.named_parameters())
    restricted = Restricted(loss_fn, whole(parameters))
    clipped = dpt.clipped_grad(model, restricted, clip_norm=CLIP)
    clipped(batch)
    monkeypatch.setattr(clipped, "_probe", lambda *_: pytest.fail("it was probed again"))
    before = None
    for seed in range(3):
        restricted.projections = at_random(parameters, 0.3, Key.from_seed(seed))
        out = clipped(batch)
        assert oracle.relative_error(out.grads, by_hand(model, batch, restricted.projections)[0]) < 1e-6
        assert before is None or not torch.equal(out.grads["head.weight"], before)
        before = out.grads["head.weight"]
    assert len(clipped.plans) == 1


@pytest.mark.parametrize("kind", ["mask", "subspace"])
def test_neighbouring_data_sets_differ_by_the_clip_norm_at_most_and_reach_it(setting, kind):
    """In the projected sum, for each example removed: norms before the projection would be larger."""
    model, batch, public = setting
    projection = kinds(model, public)[kind]
    restricted = Restricted(loss_fn, projection)
    _, norms = by_hand(model, batch, projection)
    bound = 0.9 * float(norms.min())  # all are clipped
    clipped = dpt.clipped_grad(model, restricted, clip_norm=bound)
    everything = clipped(batch, torch.ones(SIZE, dtype=torch.bool)).grads
    for b in range(SIZE):
        mask = torch.arange(SIZE) != b
        without = clipped(batch, mask).grads
        moved = sum((everything[n] - without[n]).square().sum() for n in everything) ** 0.5
        assert float(moved) <= bound * (1 + 1e-9)
        assert float(moved) >= bound * (1 - 1e-4), "clipping is spent on what is thrown away"


@pytest.mark.parametrize("kind", ["mask", "subspace"])
def test_noise_lies_in_the_subspace_with_the_variance_of_the_mechanism(setting, kind):
    model, batch, public = setting
    projection = kinds(model, public)[kind]
    clipped = dpt.clipped_grad(model, Restricted(loss_fn, projection), clip_norm=CLIP)
    mechanism = Mechanism.constant(
        noise_multiplier=2.0, clip_norm=CLIP, sample_rate=0.5, steps=1, expected_batch_size=4.0
    )
    total = clipped(batch)
    drawn = []
    for seed in range(60):
        gradient = projected(dpt.privatize(total, mechanism, Key.from_seed(seed)), projection)
        noise = {n: g - total.grads[n] / 4.0 for n, g in gradient.grads.items()}
        for n, z in noise.items():
            torch.testing.assert_close(projection[n](z), z)  # nothing outside
        drawn.append(torch.cat([_coordinates(projection[n], z) for n, z in noise.items()]))
    found = torch.stack(drawn)
    assert found.shape[1] == sum(p.size for p in projection.values())
    spread = float(found.square().mean() ** 0.5)
    assert spread == pytest.approx(2.0 * CLIP / 4.0, rel=0.06)


def _coordinates(projection, z):
    """Of a vector in the subspace, in an orthonormal basis of it."""
    if isinstance(projection, Mask):
        assert not z[~projection.kept].any()
        return z[projection.kept]
    return projection.basis.mT @ z.flatten()


def test_projections_are_orthogonal(setting):
    model, _, public = setting
    for projection in kinds(model, public).values():
        for name, p in model.named_parameters():
            x, y = torch.randn_like(p), torch.randn_like(p)
            once = projection[name](x)
            torch.testing.assert_close(projection[name](once), once)
            torch.testing.assert_close((once * y).sum(), (x * projection[name](y)).sum())
            assert torch.equal(projection[name].attached(p), p), "the value is the parameter's, bit for bit"


def test_the_principal_subspace_holds_more_of_the_gradients_than_any_other(setting):
    """By the Eckart-Young theorem its best has the norm of the leading singular values."""
    model, _, public = setting
    each = single_gradients(model, loss_fn, [public])
    reference = torch.func.vmap(
        torch.func.grad(
            lambda p, x, y: F.cross_entropy(torch.func.functional_call(model, p, (x[None],)), y[None])
        ),
        in_dims=(None, 0, 0),
    )({n: p.detach() for n, p in model.named_parameters()}, *public)
    for name, found in principal(each, 4, Key.from_seed(0), iterations=8).items():
        torch.testing.assert_close(each[name], reference[name])
        matrix = each[name].flatten(1)
        best = torch.linalg.svdvals(matrix)[:4].square().sum()
        assert float((matrix @ found.basis).square().sum()) == pytest.approx(float(best), rel=1e-3)
    mean = mean_gradient(model, loss_fn, [tuple(t[:7] for t in public), tuple(t[7:] for t in public)])
    for name, g in mean.items():
        torch.testing.assert_close(g, each[name].mean(0))


def test_so_many_are_kept_and_the_largest():
    torch.manual_seed(0)
    values = {"a": torch.randn(50), "b": 10 * torch.randn(5, 10), "c": torch.randn(3)}
    per_tensor = largest(values, 0.1)
    assert [m.size for m in per_tensor.values()] == [5, 5, 1]
    for name, mask in per_tensor.items():
        assert values[name].abs()[mask.kept].min() >= values[name].abs()[~mask.kept].max()
    together = largest(values, 0.1, of_all=True)
    assert sum(m.size for m in together.values()) == 10 and together["b"].size > together["a"].size
    kept = torch.cat([values[n][m.kept].abs() for n, m in together.items()])
    assert kept.min() >= torch.cat([values[n][~m.kept].abs() for n, m in together.items()]).max()
    one, same, other = (at_random(values, 0.1, Key.from_seed(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(one[n].kept, same[n].kept) and one[n].size == per_tensor[n].size for n in values)
    assert any(not torch.equal(one[n].kept, other[n].kept) for n in values)


def test_random_masks_keep_every_coordinate_equally_often():
    like = {"w": torch.zeros(20)}
    counts = sum(at_random(like, 0.25, Key.from_seed(s))["w"].kept.double() for s in range(400))
    assert counts.sum() == 400 * 5
    # each is binomial(400, 1/4): chi-square of 19 degrees of freedom (scaled by 15/20 for a fixed size)
    assert float(((counts - 100) ** 2 / 75).sum()) < 45
    assert all(
        a != b
        for a, b in pairwise(
            map(tuple, (at_random(like, 0.25, Key.from_seed(s))["w"].kept.tolist() for s in range(3)))
        )
    )


@pytest.mark.parametrize("keep", [0, -1.0, 1.5, float("nan"), "much"])
def test_a_share_out_of_range_is_refused(keep):
    with pytest.raises((TypeError, ValueError), match="keep"):
        projections.how_many(10, keep)


def test_what_is_no_projection_is_refused(setting):
    model, batch, _ = setting
    with pytest.raises(TypeError, match="bool tensor"):
        Mask(torch.ones(3))
    with pytest.raises(TypeError, match="matrix"):
        Subspace(torch.ones(3))
    with pytest.raises(ValueError, match="orthonormal"):
        Subspace(torch.ones(3, 2))
    strange = Restricted(loss_fn, {"neck": Mask(torch.ones(3, dtype=torch.bool))})
    with pytest.raises(dpt.Refused, match="neck"):
        strange(model, batch)
    with pytest.raises(ValueError, match="no public examples"):
        mean_gradient(model, loss_fn, [])
    assert first_axes({"w": torch.zeros(2, 2)}, 3)["w"].size == 3


def test_a_model_that_gives_no_gradients_of_single_examples_is_refused(setting):
    model, _, public = setting

    def branching(model, batch):
        losses = loss_fn(model, batch)
        return losses if float(losses.detach().sum()) > 0 else -losses

    with pytest.raises(dpt.Refused, match="use a mask of their mean gradient"):
        single_gradients(model, branching, [public])
