"""Augmentation multiplicity: the views, and the gradient of their mean loss as one clipped vector."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import dptrain.torch as dpt
from dptrain.training import ConfigError, train
from dptrain.training.augment import views
from dptrain.training.loop import make_loss
from dptrain.training.prepare import prepare
from tests.torch_engine import oracle


def test_views_are_shifts_whose_edges_are_continued():
    torch.manual_seed(0)
    image = torch.arange(64.0).reshape(1, 1, 8, 8)
    for view in views(image, 40, flip=False)[0, :, 0]:
        row, column = int(view[3, 3]) // 8 - 3, int(view[3, 3]) % 8 - 3
        assert abs(row) <= 1 and abs(column) <= 1
        places = (torch.arange(8) + row).clamp(0, 7)[:, None] * 8 + (torch.arange(8) + column).clamp(0, 7)
        assert torch.equal(view, places.float())


def test_some_views_are_mirrored_where_that_is_asked_for():
    torch.manual_seed(0)
    image = torch.arange(8.0).expand(2, 3, 8, 8)
    mirrored = views(image, 50, flip=True)[:, :, :, :, 0] > 4
    assert 0.3 < mirrored.float().mean() < 0.7
    assert not (views(image, 50, flip=False)[:, :, :, :, 0] > 4).any()


def test_examples_are_augmented_each_by_itself():
    """The same draws, and another neighbour: nobody else's views change."""
    batch = torch.randn(4, 3, 8, 8)
    other = batch.clone()
    other[2] = torch.nan
    found = []
    for images in (batch, other):
        torch.manual_seed(0)
        found.append(views(images, 5, flip=True))
    keep = torch.tensor([0, 1, 3])
    assert torch.equal(found[0][keep], found[1][keep]) and found[1][2].isnan().all()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("method", ["auto", "bk-ghost", "ghost", "per-example-loop", "per-example-vmap"])
def test_the_mean_over_views_is_clipped_as_one_gradient(method, quick):
    """K = B here, to confuse whoever looks for the examples; one row is NaN, and one is masked."""
    torch.manual_seed(1)
    model = Net().double()
    loss = make_loss(prepare(quick(augmentations=4)))
    images, labels = torch.randn(4, 4, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0])

    def single(model, batch):
        return loss(model, batch).double()  # cross-entropy is taken in float32

    def wide(model, batch):
        outputs = model(batch[0].flatten(0, 1))
        each = nn.functional.cross_entropy(outputs, batch[1].repeat_interleave(4), reduction="none")
        return each.view(-1, 4).mean(1)

    want, _ = oracle.clipped_sum(model, wide, (images, labels), 0.3, keep=[True, True, False, False])
    images[2], images[3] = torch.nan, torch.nan
    mask = torch.tensor([True, True, True, False])
    out = dpt.clipped_grad(model, wide, clip_norm=0.3, method=method)((images, labels), mask)
    assert oracle.relative_error(out.grads, want) < 1e-9
    if method == "auto":  # and what training makes of it, up to float32
        torch.testing.assert_close(
            single(model, (images[:2], labels[:2])), wide(model, (images[:2], labels[:2])), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("engine", ["torch", "jax"])
def test_a_run_with_views_is_repeated_bit_for_bit(engine, quick, tmp_path):
    if engine == "jax":
        pytest.importorskip("jax")
    config = quick(augmentations=2, augmentation="shift", engine=engine)
    runs = [train(replace(config, out=tmp_path / name)) for name in "ab"]
    assert len({(run.folder.path / "model.safetensors").read_bytes() for run in runs}) == 1
    plain = train(replace(config, augmentations=0, out=tmp_path / "c"))
    assert plain.epsilon == runs[0].epsilon
    assert (tmp_path / "c/model.safetensors").read_bytes() != (tmp_path / "a/model.safetensors").read_bytes()


def test_features_have_no_views(quick):
    with pytest.raises(ConfigError, match="views of images"):
        prepare(quick(augmentations=2, trainable="head", cache_features=True))
