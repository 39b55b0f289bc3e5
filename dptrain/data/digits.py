"""scikit-learn's digits: 1,797 real handwritten digits of 8 x 8 pixels, always at hand."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from dptrain.data.split import stratified

SPLIT_SEED = 20_240_626
"""Published seed of the split, chosen once before any model was trained on it."""

TEST_FRACTION = 0.2
FULL_SCALE = 16.0
NUM_CLASSES = 10

Arrays = tuple[torch.Tensor, torch.Tensor]


def read() -> tuple[Arrays, Arrays]:
    """(images [N, 1, 8, 8] uint8 from 0 to 16, labels [N] int64) of train and of test."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    train, test = stratified(labels, TEST_FRACTION, SPLIT_SEED)
    return (images[train], labels[train]), (images[test], labels[test])
