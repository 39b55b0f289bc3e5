"""Attacks on the promise "exact or refused": each was once accepted and wrong."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dptrain.torch as dpt
from dptrain.core import methods

from . import oracle

METHODS = ["per-example", "ghost", "bk-ghost", "bk-mix-opt", "auto"]


def squares(model, batch):
    return model(batch["x"]).reshape(len(batch["x"]), -1).square().sum(1)


class Model(nn.Module):
    """``forward`` from a function of (self, x); parameters by keyword."""

    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value.double()) if torch.is_tensor(value) else value)

    def forward(self, x):
        return self.function(self, x)


def rows(size: int = 4, width: int = 5):
    torch.manual_seed(3)
    return {"x": torch.randn(size, width, dtype=torch.float64)}


def exact_or_refused(model, batch, method, loss=squares, **kwargs) -> bool:
    """True if exact, False if refused; anything else fails."""
    _, norms = oracle.clipped_sum(model, loss, batch, 1.0)
    bound = float(norms.median())
    expected, norms = oracle.clipped_sum(model, loss, batch, bound)
    try:
        out = dpt.clipped_grad(model, loss, clip_norm=bound, method=method, **kwargs)(batch)
    except dpt.Refused:
        return False
    torch.testing.assert_close(out.norms, norms, rtol=1e-9, atol=1e-12)
    assert oracle.relative_error(out.grads, expected) < 1e-9
    return True


torch.manual_seed(0)
W5, W4, TABLE = torch.randn(5), torch.randn(4, 4), torch.randn(9)

SILENT = {
    "a parameter cast by its peer": Model(lambda s, x: (x * s.w).sum(1, keepdim=True) * s.w.type_as(x), w=W5),
    "a parameter moved by its peer": Model(lambda s, x: x * s.w.to(x) + s.w.view_as(s.w), w=W5),
    "data as affine weight": Model(
        lambda s, x: F.layer_norm(x, (5,), s.w * x.detach().abs().sum().sign(), s.b), w=W5, b=W5
    ),
    "data as convolution bias": Model(
        lambda s, x: F.conv1d(x[:, None], s.w, s.b * x.new_ones(2)),
        w=torch.randn(2, 1, 3),
        b=torch.randn(2),
    ),
    "complex parameters": Model(
        lambda s, x: (
            torch.view_as_real(torch.fft.rfft(x) * torch.view_as_complex(s.w)) + x.sum(1)[:, None, None] * s.w
        ),
        w=torch.randn(3, 2),
    ),
    "a permuted view that is no transpose": Model(
        lambda s, x: torch.cat(
            [x[:, :4] @ s.w.T, x[:, :4] @ s.w.view(2, 2, 4).transpose(0, 1).reshape(4, 4).T], 1
        ),
        w=W4,
    ),
    "overlapping slices": Model(lambda s, x: x * s.w[:5] + x * s.w[3:8], w=TABLE),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SILENT)
def test_silent_errors(name, method):
    exact_or_refused(SILENT[name], rows(6), method)


@pytest.mark.parametrize("method", METHODS)
def test_slices_that_overlap_at_the_real_size_only(method):
    """The gradient depends on the batch size, though no loss does: the reference is this very batch."""

    def forward(s, x):
        mine = s.w[: x.shape[0]].sum()
        return torch.tanh(x) * (mine - mine.detach()) + x * s.w[3:].sum()

    model = Model(forward, w=TABLE)
    batch = rows(6)
    losses = squares(model, batch)
    norms = torch.stack([torch.autograd.grad(loss, model.w, retain_graph=True)[0].norm() for loss in losses])
    out = dpt.clipped_grad(model, squares, clip_norm=1e6, method=method)(batch)
    torch.testing.assert_close(out.norms, norms, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["a parameter cast by its peer", "data as convolution bias"])
def test_common_idioms_are_exact_and_not_refused(name):
    assert exact_or_refused(SILENT[name], rows(6), "auto")


@pytest.mark.parametrize("method", METHODS)
def test_negative_indices_are_the_same_rows(method):
    def loss(model, batch):
        return model.weight[batch["x"]].squeeze(-1).sum(1) * batch["y"]

    ids = torch.tensor([[-1, 3], [0, 1], [2, 2], [1, 3]])
    batch = {"x": ids, "y": torch.rand(4, dtype=torch.float64) + 5}
    assert exact_or_refused(nn.Embedding(4, 1).double(), batch, method, loss)


def test_a_layer_picked_at_random_is_refused_or_bounded():
    """The plan checks which leaf each use has, not only its shape."""

    def forward(self, x):
        for _ in range(3):
            x = x + torch.tanh(random.choice(self.layers)(x))
        return x

    refused = 0
    for seed in range(6):
        random.seed(seed)
        torch.manual_seed(seed)
        layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4)).double()
        model = Model(forward, layers=layers)
        alone = torch.tensor([True, False, False, False])
        try:
            out = dpt.clipped_grad(model, squares, clip_norm=1.0, allow_unused=True)(rows(), alone)
        except dpt.Refused:
            refused += 1
            continue
        total = torch.cat([g.flatten() for g in out.grads.values()])
        assert float(total.norm()) <= 1 + 1e-9
    assert refused


def test_norms_of_large_leaves_are_not_understated():
    """Float32 sums of squares of 33 million numbers: a naive one is too low."""
    from dptrain.torch.bookkeeping import squared_norm

    gradient = torch.full((1, 4096 * 8192), 1.3)
    got = float(squared_norm(gradient).sqrt())
    want = 1.3 * (4096 * 8192) ** 0.5
    assert abs(got / want - 1) < 1e-6


NARROW = {
    "scale": lambda s, x: (x.bfloat16() * s.w.to(torch.bfloat16)).float(),
    "linear": lambda s, x: F.linear(x.bfloat16(), s.w.to(torch.bfloat16).unsqueeze(0)).float(),
}


@pytest.mark.parametrize("method", ["auto", "bk-ghost", "ghost"])
@pytest.mark.parametrize("use", NARROW)
def test_sums_are_not_rounded_to_a_narrow_type(use, method):
    """Hundreds of examples push the same way: rounding their sum to bfloat16 hides or doubles one."""

    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(64))

        def forward(self, x):
            return NARROW[use](self, x)

    clipped = dpt.clipped_grad(Narrow(), lambda m, b: m(b).sum(1), clip_norm=1.0, method=method)
    x = torch.ones(420, 64)
    x[0, 0] = 2.0
    previous = None
    for count in (400, 401, 402, 403):
        out = clipped(x, torch.arange(420) < count).grads["w"]
        if previous is not None:
            assert float((out - previous).norm()) <= 1 + 1e-5
        previous = out


def test_data_hidden_in_numpy_is_refused():
    model = Model(lambda s, x: torch.from_numpy(x.detach().numpy() * 1.0) * s.k, k=W5)

    def loss(model, batch):
        x = batch["x"]
        return (model(x) * (x * 0 + 1).nan_to_num(1.0)).tanh().sum(1)

    with pytest.raises(dpt.Refused, match="numpy"):
        dpt.clipped_grad(model, loss, clip_norm=1.0)(rows())


def test_data_written_into_a_frozen_parameter_is_refused():
    def forward(self, x):
        h = self.layer(x)
        nearest = torch.cdist(h.detach(), self.code).argmin(1)
        with torch.no_grad():
            self.code.mul_(0.9).index_add_(0, nearest, 0.1 * h.detach())
        return h - self.code[nearest].detach()

    model = Model(forward, layer=nn.Linear(5, 3).double(), code=torch.randn(4, 3))
    model.code.requires_grad_(False)
    with pytest.raises(dpt.Refused, match="writes to the model's parameters"):
        dpt.clipped_grad(model, squares, clip_norm=1.0)(rows())


def test_long_sequences_do_not_break_the_error_bound():
    model = nn.Linear(2, 2)
    x = torch.randn(3, 4200, 2)

    def loss(model, batch):
        return model(batch).square().mean((1, 2))

    exact = dpt.clipped_grad(model, loss, clip_norm=1.0, method="per-example")(x)
    ghost = dpt.clipped_grad(model, loss, clip_norm=1.0, method="ghost")(x)
    torch.testing.assert_close(ghost.norms, exact.norms, rtol=1e-2, atol=0)
    torch.testing.assert_close(ghost.grads["weight"], exact.grads["weight"], rtol=2e-2, atol=1e-5)


def test_gradient_hooks_on_parameters_are_refused():
    model = nn.Linear(5, 3).double()
    model.weight.register_hook(lambda g: g * 0.5)
    with pytest.raises(dpt.Refused, match="gradient hook"):
        dpt.clipped_grad(model, squares, clip_norm=1.0)(rows())


def test_a_masked_row_with_its_own_randomness_poisons_nothing():
    class Drop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return F.dropout(self.layer(x), 0.06)

    def loss(model, batch):
        return model(batch).square().sum(1).sqrt()  # its gradient at zero is not finite

    mask = torch.zeros(96, dtype=torch.bool)
    mask[0] = True
    for seed in range(12):
        torch.manual_seed(seed)
        model, x = Drop(), torch.randn(96, 2)
        for method in ("ghost", "bk-mix-opt", "auto"):
            out = dpt.clipped_grad(model, loss, clip_norm=1.0, method=method)(x, mask)
            assert all(g.isfinite().all() for g in out.grads.values())


def test_vanishing_clip_norms_are_refused():
    with pytest.raises(ValueError, match="at least 1e-09"):
        dpt.clipped_grad(nn.Linear(5, 3), squares, clip_norm=1e-25)


@pytest.mark.parametrize("capacity", [6, 48, 60])
def test_routing_with_a_capacity_that_calm_rows_do_not_fill(capacity):
    def forward(self, x):
        share = self.router(x).softmax(-1)
        chosen = F.one_hot(share.argmax(-1), 2)
        place = (chosen.cumsum(0) * chosen).sum(1)
        out = torch.einsum("bd,edk->bek", x, self.experts)
        return (out * (share * chosen).unsqueeze(-1)).sum(1) * (place <= capacity).unsqueeze(-1)

    torch.manual_seed(0)
    model = Model(forward, router=nn.Linear(5, 2).double(), experts=torch.randn(2, 5, 3))
    with pytest.raises(dpt.Refused, match="mix"):
        dpt.clipped_grad(model, squares, clip_norm=1.0)(rows(8 if capacity == 6 else 64))


def test_thresholds_that_only_loud_rows_cross():
    def forward(self, x):
        h = self.layer(x)
        return h * (0.1 if bool((x.abs() > 50).any()) else 1.0)

    model = Model(forward, layer=nn.Linear(5, 3).double())
    with pytest.raises(dpt.Refused, match="mix"):
        dpt.clipped_grad(model, squares, clip_norm=1.0)(rows(8))


def test_derivatives_within_the_forward_pass_are_refused():
    def forward(self, x):
        x = x.detach().requires_grad_(True)
        energy = self.layer(x).square().sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]

    model = Model(forward, layer=nn.Linear(5, 3).double())
    with pytest.raises(dpt.Refused, match="differentiates within"):
        dpt.clipped_grad(model, squares, clip_norm=1.0)(rows())


@pytest.mark.parametrize("size", [1, 4])
def test_a_batch_of_one_repeated_row_of_tokens_is_no_obstacle(size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 3)).double()
    ids = torch.tensor([[1, 2, 3, 4, 5]]).repeat(size, 1)
    batch = {"x": ids, "y": torch.zeros(size, dtype=torch.int64)}

    def loss(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    assert exact_or_refused(model, batch, "auto", loss)


def test_the_rehearsal_refuses_what_a_rule_gets_wrong(monkeypatch):
    from dptrain.torch.uses.linear import Linear

    right = Linear.example_gradients
    monkeypatch.setattr(Linear, "example_gradients", lambda *a: 0.9 * right(*a))
    with pytest.raises(dpt.Refused, match="ordinary autograd"):
        dpt.clipped_grad(nn.Linear(5, 3).double(), squares, clip_norm=1.0, method="per-example")(rows())


@pytest.mark.parametrize("method", ["ghost", "mixed-ghost", "fast-gradient", "bk-ghost", "auto"])
def test_a_narrow_value_beside_ordinary_ones_is_counted_once(method):
    """Its per-example gradients are kept, so a second backward pass must leave it alone."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(6, 6), nn.Parameter(torch.ones(6))

        def forward(self, x):
            return (self.layer(x).bfloat16() * self.scale.to(torch.bfloat16)).float()

    def loss(model, batch):
        return model(batch["x"]).square().sum(1)

    torch.manual_seed(0)
    model, batch = Mixed(), {"x": torch.randn(5, 6)}
    out = dpt.clipped_grad(model, loss, clip_norm=2.0, method=method)(batch)
    expected, norms = oracle.clipped_sum(model, loss, batch, 2.0)
    torch.testing.assert_close(out.norms.double(), norms, rtol=1e-2, atol=0)
    for name, want in expected.items():
        torch.testing.assert_close(out.grads[name], want, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("method", METHODS)
def test_clipping_inside_autocast_is_not_lowered(method):
    """Around the call, where many put it: only the forward pass is the model's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 3))
    batch = (torch.randn(6, 5, 40), torch.randint(3, (6,)))

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]).float().mean(1), batch[1], reduction="none")

    clipped = dpt.clipped_grad(model, loss_fn, clip_norm=0.1, method=method)
    for b in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = clipped(batch, torch.arange(6) == b)
        norm = sum(g.double().square().sum() for g in out.grads.values()).sqrt()
        assert 0.0995 < norm <= 0.1


class Clamped(torch.autograd.Function):
    """A straight-through estimator, as binary networks have it: its derivative is not linear."""

    @staticmethod
    def forward(ctx, weight):
        return weight.sign()

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-1, 1)


@pytest.mark.parametrize("method", METHODS)
def test_pull_backs_that_are_not_linear_keep_the_bound(method):
    model = Model(lambda s, x: 30.0 * x @ Clamped.apply(s.w), w=torch.randn(5, 5).double())
    data = rows(3)
    clipped = dpt.clipped_grad(model, squares, clip_norm=1.0, method=method)
    for b in range(3):
        out = clipped(data, torch.arange(3) == b)
        assert sum(g.square().sum() for g in out.grads.values()).sqrt() <= 1.0
    expected, _ = oracle.clipped_sum(model, squares, data, 1.0)
    assert oracle.relative_error(clipped(data).grads, expected) < 1e-9


def test_hooks_on_values_made_of_parameters_are_refused():
    def forward(s, x):
        w = s.w * 2
        w.register_hook(lambda g: g.clamp(-1, 1))
        return x @ w

    with pytest.raises(dpt.Refused, match="hook"):
        dpt.clipped_grad(Model(forward, w=torch.randn(5, 5).double()), squares, clip_norm=1.0)(rows(3))


def test_hooks_that_clip_the_gradient_of_the_batch_are_refused():
    def forward(s, x):
        h = x @ s.w
        if h.requires_grad:
            h.register_hook(lambda g: g * (1e3 / g.norm()).clamp(max=1))
        return h.tanh()

    with pytest.raises(dpt.Refused, match="mix"):
        dpt.clipped_grad(Model(forward, w=torch.randn(5, 5).double()), squares, clip_norm=1.0)(rows(3))


class Together(nn.Module):
    """Autograd hands the gradient of ``w + v`` on to both as one tensor, and that of ``r.sum()`` expanded."""

    def __init__(self):
        super().__init__()
        self.w, self.v = (nn.Parameter(torch.randn(3, 4)) for _ in range(2))
        self.r = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return (x @ (self.w + self.v).T).square().sum(1) + x[:, 0] * self.r.sum()


@pytest.mark.parametrize("method", [row.name for row in methods.TABLE])
def test_physical_batches_of_parameters_that_are_added_are_counted_once(method):
    """In place, what came to ``w`` came to ``v`` as well: all examples but the first ones counted twice."""
    torch.manual_seed(0)
    model, batch = Together(), torch.randn(9, 4)
    clipped = dpt.clipped_grad(model, lambda m, b: m(b), clip_norm=1.0, method=method)
    total = clipped(batch[:3])
    for part in (batch[3:6], batch[6:]):
        total = clipped(part, None, total)
    whole = clipped(batch).grads
    for name, g in total.grads.items():
        torch.testing.assert_close(g, whole[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [*METHODS, "per-example-vmap", "per-example-loop"])
def test_a_batch_that_asks_for_gradients_keeps_no_graph(method):
    """What is handed out holds no memory of the step, and can be turned into numbers."""
    model, batch = Model(lambda m, x: x * m.scale, scale=torch.ones(5)), rows()
    batch["x"].requires_grad_()
    out = dpt.clipped_grad(model, squares, clip_norm=1.0, method=method)(batch)
    handed_out = [out.losses, out.norms, *out.grads.values()]
    assert not any(tensor.requires_grad for tensor in handed_out)
