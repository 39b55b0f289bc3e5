"""The rules of privacy that concern one process, each with a test that its breach turns red."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dptrain.torch as dpt
from dptrain.core import methods
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism
from dptrain.torch.uses import gram
from dptrain.torch.uses.base import squared_norm

PRIVATE = [row.name for row in methods.TABLE if row.is_private]


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mechanism(**changes) -> Mechanism:
    options = {
        "noise_multiplier": 1.0,
        "clip_norm": 0.5,
        "sample_rate": 0.5,
        "steps": 3,
        "expected_batch_size": 10,
        "delta": 1e-5,
    }
    return Mechanism.constant(**(options | changes))


def setting(size: int = 6, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    ).to(dtype)
    return model, (5 * torch.randn(size, 2, 8, dtype=dtype), torch.randint(3, (size,)))


def total_norm(grads) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))


def test_rule_1_the_mechanism_is_the_only_source():
    """A sum clipped to another norm than the mechanism accounts for is not released."""
    model, batch = setting()
    clipped = dpt.clipped_grad(model, loss_fn, clip_norm=0.7)(batch)
    with pytest.raises(ValueError, match=r"accounts for 0\.5"):
        dpt.privatize(clipped, mechanism(), Key.from_entropy())


def test_rule_2_divides_by_the_public_batch_size():
    model, batch = setting()
    clipped = dpt.clipped_grad(model, loss_fn, clip_norm=0.5)
    silent = mechanism(noise_multiplier=0.0)
    key = Key.from_entropy()
    whole = clipped(batch)
    part = clipped(batch, torch.tensor([True] * 2 + [False] * 4))
    for out in (whole, part):
        gradient = dpt.privatize(out, silent, key)
        for name, g in gradient.grads.items():
            torch.testing.assert_close(g, out.grads[name] / 10)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("method", PRIVATE)
def test_rule_4_a_masked_row_contributes_nothing_whatever_it_holds(method):
    model, batch = setting()
    mask = torch.tensor([True, True, False, True, False, True])
    clipped = dpt.clipped_grad(model, loss_fn, clip_norm=0.5, method=method)
    expected = clipped(batch, mask)
    for value in (float("nan"), float("inf"), 1e30):
        x = batch[0].clone()
        x[~mask] = value
        out = clipped((x, batch[1]), mask)
        for name, g in out.grads.items():
            torch.testing.assert_close(g, expected.grads[name], rtol=1e-5, atol=1e-7)


def test_rule_4_an_empty_logical_batch_still_takes_a_noisy_step():
    model, batch = setting()
    out = dpt.clipped_grad(model, loss_fn, clip_norm=0.5)(batch, torch.zeros(6, dtype=torch.bool))
    assert total_norm(out.grads) == 0 and out.norms.eq(0).all()
    assert out.grads.keys() == dict(model.named_parameters()).keys()
    before = [p.detach().clone() for p in model.parameters()]
    gradient = dpt.privatize(out, mechanism(), Key.from_entropy())
    dpt.apply(torch.optim.SGD(model.parameters(), lr=1.0), model, gradient)
    assert all((p != q).any() for p, q in zip(model.parameters(), before))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("method", PRIVATE)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_rule_5_a_gradient_that_is_not_finite_contributes_zero(method, value):
    model, batch = setting()
    clipped = dpt.clipped_grad(model, loss_fn, clip_norm=0.5, method=method)
    others = torch.tensor([True, True, True, False, True, True])
    expected = clipped(batch, others)
    x = batch[0].clone()
    x[3] = value
    out = clipped((x, batch[1]))
    if value == 1e38:  # finite input whose gradient may or may not overflow: the bound holds
        with_zero = total_norm({n: out.grads[n] - expected.grads[n] for n in out.grads})
        assert with_zero <= 0.5 * (1 + 1e-6)
        return
    for name, g in out.grads.items():
        torch.testing.assert_close(g, expected.grads[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["auto", "ghost", "bk-ghost", "per-example"])
def test_rule_6_parameters_without_gradient_get_noise(method):
    """A parameter behind a product with zero has gradient zero for every example."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.on, self.off = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.on(x)

    model = Gated()
    batch = torch.randn(5, 4), torch.randint(3, (5,))
    clipped = dpt.clipped_grad(model, loss_fn, clip_norm=0.5, method=method, allow_unused=True)
    gradient = dpt.privatize(clipped(batch), mechanism(), Key.from_entropy())
    assert gradient.grads["off.weight"].std() > 0


@pytest.mark.parametrize("method", ["auto", "ghost", "bk-ghost", "per-example", "fast-gradient"])
@pytest.mark.parametrize("autocast", [False, True])
def test_rule_7_no_example_contributes_more_than_the_clip_norm(method, autocast):
    """Neighbouring batches differ by at most C, whatever the compute type."""
    model, batch = setting(8)

    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(batch[0])
        return F.cross_entropy(logits.float(), batch[1], reduction="none")

    clipped = dpt.clipped_grad(model, loss, clip_norm=0.5, method=method)
    whole = clipped(batch)
    assert (whole.norms > 0.5).any()
    for b in range(8):
        alone = torch.zeros(8, dtype=torch.bool)
        alone[b] = True
        part = total_norm(clipped(batch, alone).grads)
        assert part <= 0.5 * (1 + 1e-6)
        without = clipped(batch, ~alone)
        gap = total_norm({n: whole.grads[n] - without.grads[n] for n in whole.grads})
        assert gap <= 0.5 * (1 + 1e-5)


def test_rule_7_clip_factors_are_not_rounded_to_the_compute_type():
    from dptrain.torch.bookkeeping import clip_factors

    squared = torch.rand(10_000) * 100 + 1
    parts = clip_factors(squared, 0.5, 1000, 10).double() * squared.double().sqrt()
    assert (parts <= 0.5).all() and (parts > 0.5 * (1 - 2e-5)).all()


def test_rule_7_gram_norms_carry_their_error():
    """Where the terms cancel, the bound covers the error; a true norm is never understated."""
    torch.manual_seed(0)
    base = torch.randn(4, 1, 32, 16)
    noise = 1e-3 * torch.randn(4, 1, 32, 16)
    signs = torch.tensor([1.0, -1.0]).repeat(16).reshape(1, 1, 32, 1)
    rows = signs * base[:, :, :1] + noise
    cols = base[:, :, 1:2] + noise.flip(2)
    for dtype in (torch.float32, torch.bfloat16):
        r, c = rows.to(dtype), cols.to(dtype)
        squared, bound = gram.squared_norms(r, c)
        true = (r.double().mT @ c.double()).square().sum((1, 2, 3))
        assert squared.dtype == torch.float32
        assert ((squared.double() - true).abs() <= bound.double()).all()
        assert (bound > 0.01 * true).any(), "the example does not cancel enough to test anything"


@pytest.mark.parametrize("method", ["ghost", "bk-ghost"])
def test_rule_7_gram_norms_never_understate(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 3, bias=False))
    batch = torch.randn(64, 20, 12) + 1, torch.randint(3, (64,))

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]).mean(1), batch[1].to(batch[1].device), reduction="none")

    got = dpt.clipped_grad(model, loss, clip_norm=1.0, method=method)(batch).norms.double()
    exact = dpt.clipped_grad(model.double(), loss, clip_norm=1.0, method="per-example")
    want = exact((batch[0].double(), batch[1])).norms
    assert (got >= want).all() and (got <= want * 1.005).all()


def test_rule_7_doubtful_gram_norms_are_materialised():
    class Cancel(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16, bias=False)

        def forward(self, x):
            y = self.layer(x)
            sign = torch.tensor([1.0, -1.0]).repeat(16).unsqueeze(1)
            return (y * sign).sum(1)

    torch.manual_seed(0)
    model = Cancel()
    x = torch.randn(4, 1, 16).repeat(1, 32, 1) + 1e-3 * torch.randn(4, 32, 16)
    batch = x, torch.randint(16, (4,))
    exact = dpt.clipped_grad(model.double(), loss_fn, clip_norm=1.0, method="per-example")
    want = exact((x.double(), batch[1])).norms
    model.float()
    got = dpt.clipped_grad(model, loss_fn, clip_norm=1.0, method="bk-ghost")(batch).norms
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=0)


def test_rule_8_noise_is_drawn_once_with_the_right_variance_and_type():
    sums = {"weight": torch.zeros(400, 500), "half": torch.zeros(200_000)}
    clipped = dpt.ClippedSum(sums, torch.zeros(1), torch.zeros(1), 0.5)
    chosen = mechanism(noise_multiplier=3.0)
    gradient = dpt.privatize(clipped, chosen, Key.from_entropy())
    for g in gradient.grads.values():
        assert g.dtype == torch.float32
        # 200,000 draws: the sample deviation is within 1 % with probability above 1 - 1e-9
        assert abs(float(g.std()) / (3.0 * 0.5 / 10) - 1) < 0.01
        assert abs(float(g.mean())) < 0.15 * 6.2 / math.sqrt(200_000)
    a, b = gradient.grads["weight"].flatten(), gradient.grads["half"]
    assert abs(float((a * b).mean())) < 0.15**2 * 6.2 / math.sqrt(200_000)
    assert all(s.eq(0).all() for s in sums.values()), "the clipped sum itself was changed"


def test_rule_8_keys_decide_the_noise_with_all_their_bits():
    """Two keys that differ in one of 256 bits have nothing in common."""
    from dptrain.torch.noise import noisy_mean

    def draw(secret: int) -> torch.Tensor:
        key = Key(secret.to_bytes(32, "big"), reproducible=False)
        return noisy_mean({"w": torch.zeros(64)}, 1.0, 1.0, key)["w"]

    secret = int.from_bytes(bytes(range(32)), "big")
    assert torch.equal(draw(secret), draw(secret))
    for bit in range(256):
        assert not (draw(secret) == draw(secret ^ (1 << bit))).any()


def test_rule_8_low_precision_noise_is_refused():
    from dptrain.torch.noise import noisy_mean

    with pytest.raises(TypeError, match="bfloat16"):
        noisy_mean({"w": torch.zeros(3, dtype=torch.bfloat16)}, 1.0, 1.0, Key.from_entropy())


def test_rule_11_only_private_gradients_are_applied():
    model, batch = setting()
    out = dpt.clipped_grad(model, loss_fn, clip_norm=0.5)(batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for wrong in (out, out.grads, None):
        with pytest.raises(TypeError, match="PrivateGradient"):
            dpt.apply(optimizer, model, wrong)
    with pytest.raises(TypeError, match=r"only dptrain\.torch\.privatize"):
        dpt.PrivateGradient(out.grads, mechanism().step(0), False)
    with pytest.raises(TypeError, match="ClippedSum"):
        dpt.privatize(out.grads, mechanism(), Key.from_entropy())
    with pytest.raises(TypeError, match="Key"):
        dpt.privatize(out, mechanism(), 17)


def test_a_sum_that_was_not_clipped_cannot_be_made_private():
    model, batch = setting()
    out = dpt.clipped_grad(model, loss_fn, clip_norm=0.5, method="non-private")(batch)
    with pytest.raises(ValueError, match="not clipped"):
        dpt.privatize(out, mechanism(), Key.from_entropy())


def test_sums_accumulate_and_only_with_their_like():
    model, batch = setting()
    clipped = dpt.clipped_grad(model, loss_fn, clip_norm=0.5)
    whole = clipped(batch)
    first, second = (clipped(tuple(t[i] for t in batch)) for i in (slice(3), slice(3, 6)))
    for total in (first + second, first.add_(second)):
        for name, g in total.grads.items():
            torch.testing.assert_close(g, whole.grads[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(total.norms, whole.norms)
    other = dpt.clipped_grad(model, loss_fn, clip_norm=0.6)(batch)
    with pytest.raises(ValueError, match="different clip norms"):
        _ = whole + other
    with pytest.raises(ValueError, match="different clip norms"):
        whole.add_(other)


@pytest.mark.parametrize("method", ["auto", "ghost", "bk-ghost", "per-example"])
def test_a_finished_batch_is_freed_at_once(method):
    """Not when the garbage collector comes by: its activations are private and large."""
    import gc
    import weakref

    model, batch = setting()
    clipped = dpt.clipped_grad(model, loss_fn, clip_norm=0.5, method=method)
    clipped(batch)
    gc.collect()
    gc.disable()
    try:
        seen = []
        handle = model[0].register_forward_hook(lambda m, i, o: seen.append(weakref.ref(o)))
        out = clipped(batch)
        handle.remove()
        parts = [weakref.ref(g) for g in out.grads.values()]
        del out
        assert seen[0]() is None and all(part() is None for part in parts)
    finally:
        gc.enable()


def test_rule_7_doubtful_tied_norms_are_materialised():
    from dptrain.torch.pullback import Side, tied_gradients, tied_squared_norms

    torch.manual_seed(0)
    indices, token = torch.randint(7, (3, 5)), torch.randn(3, 5, 4)
    rows, cols = torch.randn(3, 6, 7), torch.randn(3, 6, 4)
    factors = [(Side(indices), Side(token)), (Side(rows), Side(cols))]
    dense = tied_gradients(factors, torch.Size((7, 4)))
    want = torch.nn.functional.one_hot(indices, 7).float().mT @ token + rows.mT @ cols
    torch.testing.assert_close(dense, want)
    squared, bound = tied_squared_norms(factors)
    error = (squared.double() - want.double().square().sum((1, 2))).abs()
    assert (error <= bound).all() and (bound < 0.01 * squared).all()
    flipped = [(c, r) for r, c in factors]
    torch.testing.assert_close(tied_gradients(flipped, torch.Size((4, 7))), want.mT)


@pytest.mark.parametrize("method", ["bk-ghost", "per-example", "fast-gradient"])
def test_float32_is_float32_in_norms_and_sums(method, monkeypatch):
    """Rule 7: what the model multiplies in less, TF32 or bfloat16, norms and sums do not."""
    from dptrain.torch.uses.linear import Linear

    found = []

    def watched(name):
        original = getattr(Linear, name)

        def wrapped(*args, **kwargs):
            found.append(torch.backends.mkldnn.matmul.fp32_precision)
            return original(*args, **kwargs)

        return wrapped

    for name in ("squared_norms", "example_gradients", "contract"):
        monkeypatch.setattr(Linear, name, watched(name))
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    data = (torch.randn(5, 4), torch.randint(3, (5,)))

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        dpt.clipped_grad(model, loss_fn, clip_norm=1.0, method=method)(data)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert found and set(found) == {"ieee"}


@pytest.mark.parametrize("method", ["auto", "ghost", "per-example"])
def test_rule_4_no_model_sees_what_masked_rows_hold(method):
    """Padding may hold words that there are not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    loss_fn = lambda model, tokens: model(tokens).square().sum(1)  # noqa: E731
    tokens, mask = torch.randint(7, (5, 3)), torch.tensor([True, False, True, True, False])
    clipped = dpt.clipped_grad(model, loss_fn, clip_norm=0.5, method=method)
    want = clipped(tokens[mask])
    found = clipped(torch.where(mask[:, None], tokens, 10**6), mask)
    for name, total in want.grads.items():
        torch.testing.assert_close(found.grads[name], total)
    assert not found.norms[~mask].any()


def test_a_backward_pass_that_lowers_the_precision_is_refused():
    """Rule 7: whether float32 is float32 is asked once for a backward pass, so it must stay as it was."""

    class Lowers(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            if lowers:
                torch.set_float32_matmul_precision("medium")
            return g

    class Model(nn.Linear):
        def forward(self, x):
            return Lowers.apply(super().forward(x))

    lowers = False
    clipped = dpt.clipped_grad(Model(4, 3), lambda model, x: model(x).square().sum(1), clip_norm=1.0)
    clipped(torch.randn(5, 4))
    before = torch.get_float32_matmul_precision()
    lowers = True
    try:
        with pytest.raises(dpt.Refused, match="changes the precision"):
            clipped(torch.randn(5, 4))
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("size", [1, 1000, 1024, 1030, 5000, 8192])
def test_norms_in_float32_leave_nothing_out(size):
    """Rule 7: they are joined from blocks, and the last one may be short."""
    gradients = torch.zeros(3, size)
    gradients[0] = torch.randn(size)
    gradients[1, -1] = 3.0
    gradients[2, 0] = 4.0
    true = gradients.double().square().sum(1)
    assert torch.allclose(squared_norm(gradients).double(), true, rtol=1e-5)
    assert torch.allclose(squared_norm(gradients.unsqueeze(1)).double(), true, rtol=1e-5)
