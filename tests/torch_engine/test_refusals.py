"""Exact or refused: what cannot be promised is said in one sentence, before anything is spent."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dptrain.torch as dpt

from . import oracle

WIDTH, CLASSES = 6, 3


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def batch(size: int = 8):
    torch.manual_seed(1)
    return torch.randn(size, WIDTH), torch.randint(CLASSES, (size,))


def refusal(model, loss=loss_fn, data=None, **kwargs) -> str:
    torch.manual_seed(0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises((dpt.Refused, ValueError, TypeError)) as caught:
        dpt.clipped_grad(model, loss, clip_norm=1.0, **kwargs)(batch() if data is None else data)
    for name, p in model.named_parameters():
        assert p.grad is None and torch.equal(p, before[name])
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


class BatchMean(nn.Module):
    """A batch mean behind a stop-gradient: no other row of any gradient moves, only their values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.layer(x - x.mean(0, keepdim=True).detach())


class HandWrittenBatchNorm(nn.Module):
    """Before a zero-initialised head, which hides the mixing at the first step."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        x = self.layer(x)
        return self.head((x - x.mean(0)) / (x.var(0) + 1e-5).sqrt())


class CapacityRouting(nn.Module):
    """Two experts that take four examples each, first come first served."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.Parameter(torch.randn(2, WIDTH, CLASSES))

    def forward(self, x):
        share = self.router(x).softmax(-1)
        chosen = F.one_hot(share.argmax(-1), 2)
        place = (chosen.cumsum(0) * chosen).sum(1)
        out = torch.einsum("bd,edk->bek", x, self.experts)
        out = (out * (share * chosen).unsqueeze(-1)).sum(1)
        return out * (place <= 3).unsqueeze(-1)


@pytest.mark.parametrize("model", [BatchMean, HandWrittenBatchNorm, CapacityRouting])
def test_mixing_models(model):
    torch.manual_seed(0)
    assert "examples mix" in refusal(model())


class MixingBackward(torch.autograd.Function):
    """The forward pass keeps examples apart; the backward pass scales by a mean over the batch."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 + x.mean())


def test_mixing_in_the_backward_pass_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

        def forward(self, x):
            return self.head(MixingBackward.apply(self.layer(x)))

    assert "examples mix" in refusal(Model())


def test_mixing_in_the_losses_alone():
    def shifted(model, data):
        losses = loss_fn(model, data)
        return losses + losses.mean().detach()

    assert "changes the loss of another" in refusal(nn.Linear(WIDTH, CLASSES), shifted)


def test_contrastive_loss():
    def contrastive(model, data):
        z = F.normalize(model(data[0]))
        return F.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="none")

    assert "examples mix" in refusal(nn.Linear(WIDTH, CLASSES), contrastive)


@pytest.mark.parametrize("method", ["auto", "per-example-vmap", "per-example-loop"])
def test_batch_norm_in_training(method):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES))
    message = refusal(model, method=method)
    assert "BatchNorm" in message and "GroupNorm" in message and ".eval()" in message
    model[1].eval()
    data = (batch()[0].double(), batch()[1])
    out = dpt.clipped_grad(model.double(), loss_fn, clip_norm=0.1)(data)
    expected, _ = oracle.clipped_sum(model, loss_fn, data, 0.1)
    assert oracle.relative_error(out.grads, expected) < 1e-9


def test_functional_batch_norm_is_seen_too():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, CLASSES)

        def forward(self, x):
            return F.batch_norm(self.layer(x), None, None, training=True)

    assert "BatchNorm" in refusal(Model())


def test_data_in_buffers():
    class Tracker(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, CLASSES)
            self.register_buffer("mean", torch.zeros(WIDTH))

        def forward(self, x):
            self.mean.lerp_(x.detach().mean(0), 0.1)
            return self.layer(x)

    assert "buffer mean" in refusal(Tracker())


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


class CustomModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, CLASSES))
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return Custom.apply(self.layer(x), self.weight)


def test_a_parameter_that_escapes_is_named():
    assert refusal(CustomModel()).startswith("weight reaches the loss")


def test_an_unused_parameter_is_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(WIDTH, CLASSES), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    model = Model()
    assert "spare.weight" in refusal(model)
    out = dpt.clipped_grad(model, loss_fn, clip_norm=1.0, allow_unused=True)(batch())
    assert out.grads["spare.weight"].eq(0).all()


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)
        )
        self.head, self.reentrant = nn.Linear(WIDTH, CLASSES), reentrant

    def forward(self, x):
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpointing_is_refused_by_name():
    assert "use_reentrant=False" in refusal(Checkpointed(True))


@pytest.mark.parametrize("method", ["auto", "ghost", "per-example", "bk-ghost"])
def test_checkpointing_is_exact(method):
    torch.manual_seed(0)
    model, data = Checkpointed(False).double(), (batch(4)[0].double(), batch(4)[1])
    out = dpt.clipped_grad(model, loss_fn, clip_norm=0.5, method=method)(data)
    expected, _ = oracle.clipped_sum(model, loss_fn, data, 0.5)
    assert oracle.relative_error(out.grads, expected) < 1e-9


def test_arguments():
    model = nn.Linear(WIDTH, CLASSES)
    clipped = dpt.clipped_grad(model, loss_fn, clip_norm=1.0)
    with pytest.raises(ValueError, match=r"mask must be a bool tensor of shape \(8,\)"):
        clipped(batch(), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must be a bool"):
        clipped(batch(), torch.ones(8))
    with pytest.raises(ValueError, match="lead with the examples"):
        clipped((torch.randn(8, WIDTH), torch.randint(3, (7,))))
    with pytest.raises(ValueError, match="no rows"):
        clipped((torch.randn(0, WIDTH), torch.randint(3, (0,))))
    with pytest.raises(ValueError, match="clip_norm"):
        dpt.clipped_grad(model, loss_fn, clip_norm=0.0)
    with pytest.raises(ValueError, match="unknown; choose one of"):
        dpt.clipped_grad(model, loss_fn, clip_norm=1.0, method="magic")
    assert "one loss per example" in refusal(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    for p in model.parameters():
        p.requires_grad_(False)
    assert "no trainable parameter" in refusal(model)


def test_compiled_models_are_refused():
    model = torch.compile(nn.Linear(WIDTH, CLASSES), backend="eager")
    assert "compiled" in refusal(model)


def test_random_state_is_left_as_found():
    model, data = nn.Sequential(nn.Linear(WIDTH, CLASSES), nn.Dropout(0.5)), batch()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    dpt.clipped_grad(model, loss_fn, clip_norm=1.0).plan(data)
    assert torch.equal(torch.rand(4), expected)


def test_rows_that_the_model_cannot_compute_alone_are_refused():
    """Four numbers pass for one row of four features, until one of them comes by itself."""
    clipped = dpt.clipped_grad(
        nn.Linear(4, 3),
        lambda model, batch: model(batch).sum().expand(4),
        clip_norm=1.0,
        method="per-example-loop",
    )
    with pytest.raises(dpt.Refused, match="by itself, as a batch of one"):
        clipped(torch.randn(4))
