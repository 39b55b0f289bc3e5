"""Ways in which real models are run: checkpoints, channels_last, nested inputs, frozen parts, autocast."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dptrain.torch as dpt

from . import oracle

METHODS = ["auto", "ghost", "bk-ghost", "per-example"]


def classify(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def images(size: int, side: int = 32):
    return {"x": torch.randn(size, 3, side, side).double(), "y": torch.randint(5, (size,))}


def assert_exact(model, loss_fn, batch, method="auto", reference=None):
    _, norms = oracle.clipped_sum(reference or model, loss_fn, batch, 1.0)
    bound = float(norms.median())
    expected, norms = oracle.clipped_sum(reference or model, loss_fn, batch, bound)
    out = dpt.clipped_grad(model, loss_fn, clip_norm=bound, method=method)(batch)
    torch.testing.assert_close(out.norms, norms, rtol=1e-9, atol=1e-12)
    assert oracle.relative_error(out.grads, expected) < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_timm_checkpointing(method):
    """Swin's position tables are gathered inside the checkpoint: the pull-back must recompute, too."""
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=5, img_size=32, window_size=4, embed_dim=12,
        depths=(1, 1), num_heads=(2, 2), drop_path_rate=0.0,
    ).double()  # fmt: skip
    model.set_grad_checkpointing(True)
    assert_exact(model, classify, images(4), method)


class Recomputed(nn.Module):
    """A recurrent layer, experts and an operation without a rule of its own, all recomputed."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.router, self.experts = nn.Linear(6, 3), nn.Parameter(torch.randn(3, 6, 6))
        self.centres, self.head = nn.Parameter(torch.randn(4, 6)), nn.Linear(4, 5)

    def block(self, x):
        x = self.lstm(x)[0]
        flat = x.flatten(0, 1)
        gate, chosen = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for e in range(3):
            rows = torch.where(chosen == e)[0]
            out = out.index_add(0, rows, gate[rows, None] * (flat[rows] @ self.experts[e]))
        return torch.cdist(out.view_as(x), self.centres)

    def forward(self, x):
        return self.head(checkpoint(self.block, x, use_reentrant=False).mean(1))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_recomputed_is_recorded_once(method):
    torch.manual_seed(0)
    batch = {"x": torch.randn(5, 4, 6).double(), "y": torch.randint(5, (5,))}
    assert_exact(Recomputed().double(), classify, batch, method)


def test_channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4),
        nn.Flatten(), nn.LazyLinear(5),
    ).double()  # fmt: skip
    batch = images(4, 8)
    model(batch["x"])
    model = model.to(memory_format=torch.channels_last)
    assert_exact(model, classify, batch | {"x": batch["x"].to(memory_format=torch.channels_last)})


def test_nested_inputs_and_several_losses():
    """A text tower and an image tower, a classification and a regression loss of each example."""

    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.text = nn.Embedding(10, 6), nn.Linear(6, 4)
            self.pixels, self.level = nn.Linear(12, 4), nn.Linear(4, 1)

        def forward(self, inputs):
            mask = inputs["text"]["mask"].unsqueeze(-1)
            words = (self.words(inputs["text"]["ids"]) * mask).sum(1) / mask.sum(1)
            joint = torch.tanh(self.text(words) + self.pixels(inputs["image"].flatten(1)))
            return joint, self.level(joint).squeeze(1)

    def loss_fn(model, batch):
        logits, level = model(batch["inputs"])
        classes, target = batch["targets"]
        return F.cross_entropy(logits, classes, reduction="none") + 0.5 * (level - target).square()

    torch.manual_seed(0)
    lengths = torch.randint(1, 6, (4, 1))
    batch = {
        "inputs": {
            "text": {"ids": torch.randint(10, (4, 5)), "mask": (torch.arange(5) < lengths).double()},
            "image": torch.randn(4, 3, 2, 2).double(),
        },
        "targets": (torch.randint(4, (4,)), torch.randn(4).double()),
    }
    assert_exact(Towers().double(), loss_fn, batch)


def test_frozen_parts_cost_nothing():
    """No use of a frozen parameter is recorded; nothing is back-propagated below the first trainable one."""
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            seen.append(g)
            return g

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(12, 8), nn.Linear(8, 5)
            self.body.requires_grad_(False)

        def forward(self, x):
            return self.head(Probe.apply(self.body(x.flatten(1)).tanh()))

    torch.manual_seed(0)
    model, batch = Model().double(), images(4, 2)
    clipped = dpt.clipped_grad(model, classify, clip_norm=1.0)
    assert set(clipped(batch).grads) == {"head.weight", "head.bias"}
    assert {row["parameter"] for row in clipped.plan(batch).rows()} == {"head.weight", "head.bias"}
    assert not seen
    assert_exact(model, classify, batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_bound(dtype):
    """Narrow compute types change gradients by their rounding, and never let an example's part exceed C."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=5, img_size=32, embed_dim=24, depth=2, num_heads=2
    )

    def loss_fn(model, batch):
        with torch.autocast("cpu", dtype):
            logits = model(batch["x"])
        return F.cross_entropy(logits.float(), batch["y"], reduction="none")

    batch = images(4)
    batch["x"] = batch["x"].float()
    clipped = dpt.clipped_grad(model, loss_fn, clip_norm=0.1)
    assert all(g.dtype == torch.float32 for g in clipped(batch).grads.values())
    for b in range(4):
        out = clipped(batch, torch.arange(4) == b)
        norm = sum(g.double().square().sum() for g in out.grads.values()).sqrt()
        assert norm <= 0.1
        assert norm > 0.099
