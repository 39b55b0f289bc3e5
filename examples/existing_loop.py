"""An ordinary PyTorch script made private by three lines (marked), on scikit-learn's digits."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import dptrain
import dptrain.torch as dpt

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
labels = torch.tensor(digits.target)
train, test = TensorDataset(images[:1400], labels[:1400]), (images[1400:], labels[1400:])

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2),
    nn.Conv2d(16, 32, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(512, 10),
)  # fmt: skip
optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)


def loss_fn(model, batch):
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets, reduction="none")  # one loss per example


mechanism = dptrain.Mechanism.calibrate(  # (1) what is promised
    epsilon=8, delta=1e-4, sample_rate=0.3, steps=80, clip_norm=1.0, expected_batch_size=420
)
private = dpt.make_private(model, optimizer, train, loss_fn, mechanism)  # (2)
for step in private.steps():  # (3) instead of a loop over a DataLoader
    if step.number % 20 == 0:
        print(f"step {step.number} of {step.steps}, epsilon {step.epsilon:.2f}")

with torch.no_grad():
    accuracy = (model(test[0]).argmax(1) == test[1]).float().mean()
print(f"test accuracy {accuracy:.3f} at epsilon {private.epsilon:.2f}, delta {mechanism.delta:g}")
