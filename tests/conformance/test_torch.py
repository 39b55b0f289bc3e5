"""The suite on PyTorch."""

from __future__ import annotations

import torch
from torch import nn

import dptrain.torch as dpt

from .engine_suite import EngineConformance
from .lab import CLIP_NORM
from .torch_subjects import TorchLoop, TorchPrivate


class Centred(nn.Module):
    """Takes the mean of the batch away, without a trace in any gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer(x)
        return h - h.mean(0, keepdim=True).detach()


class TorchConformance(EngineConformance):
    def test_a_model_that_mixes_examples_is_refused(self):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        clipped = dpt.clipped_grad(Centred(), lambda m, b: m(b).square().sum(1), clip_norm=CLIP_NORM)
        try:
            clipped(x)
        except dpt.Refused:
            return
        raise AssertionError("one example moves another's gradient, and nothing is said.")


class TestLoop(TorchConformance):
    subject = TorchLoop()


class TestMakePrivate(TorchConformance):
    subject = TorchPrivate()
