"""Accuracy on examples that were not trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from dptrain.data import Dataset, in_order
from dptrain.models import logits
from dptrain.training.device import autocast

BATCH_SIZE = 256


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy in nats, and the part of examples that are classified rightly."""

    accuracy: float
    loss: float
    examples: int


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, precision: str, device: torch.device) -> Score:
    """Score `model` on all of `dataset`, in evaluation mode; the mode is restored."""
    was_training = model.training
    model.eval()
    correct, loss = 0, 0.0
    for inputs, labels in dataset.stream(in_order(len(dataset), BATCH_SIZE)):
        with autocast(precision, device):
            outputs = logits(model, inputs)
        outputs = outputs.float()
        correct += int((outputs.argmax(1) == labels).sum())
        loss += float(functional.cross_entropy(outputs, labels, reduction="sum"))
    model.train(was_training)
    return Score(correct / len(dataset), loss / len(dataset), len(dataset))
