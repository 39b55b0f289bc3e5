"""Layers that mix examples, converted to layers that do not."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.layers.norm_act import FrozenBatchNormAct2d, SyncBatchNormAct
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import dptrain.torch as dpt

from . import oracle


def loss(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Shared(nn.Module):
    """One BatchNorm under two names, used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList([nn.Conv2d(3, 8, 3), self.first])

    def forward(self, x):
        return self.blocks[1](self.first(self.blocks[0](x))).mean((2, 3))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("resnet18", {"channels": (8, 8, 16, 16)}),
        ("mobilenetv3_small_050", {"drop_rate": 0.0}),
        ("test_efficientnet", {"drop_rate": 0.0, "drop_path_rate": 0.0}),
    ],
)
def test_a_converted_network_is_clipped_exactly(name, settings):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **settings).double()
    with pytest.raises(dpt.Refused, match="BatchNorm"):
        dpt.clipped_grad(model, loss, clip_norm=1.0)(batch := images())
    model, report = dpt.convert(model)
    assert report.converted and not report.left_alone
    _, norms = oracle.clipped_sum(model, loss, batch, 1.0)
    clip_norm = float(norms.median())
    expected, _ = oracle.clipped_sum(model, loss, batch, clip_norm)
    out = dpt.clipped_grad(model, loss, clip_norm=clip_norm)(batch)
    torch.testing.assert_close(out.norms, norms, rtol=1e-9, atol=1e-12)
    assert oracle.relative_error(out.grads, expected) < 1e-9


def images():
    return {"x": torch.randn(3, 3, 32, 32, dtype=torch.float64), "y": torch.tensor([0, 1, 2])}


@pytest.mark.parametrize(
    ("layer", "groups"),
    [
        (nn.BatchNorm2d(64), 16),
        (nn.BatchNorm2d(256), 32),
        (nn.BatchNorm2d(24), 6),
        (nn.BatchNorm2d(26), 2),
        (nn.BatchNorm2d(13), 1),
        (nn.BatchNorm3d(3), 1),
        (nn.BatchNorm1d(64), 4),
        (nn.SyncBatchNorm(64), 16),
    ],
)
def test_the_number_of_groups(layer, groups):
    new, report = dpt.convert(layer)
    assert type(new) is nn.GroupNorm and new.num_groups == groups
    assert report.converted[0].groups == groups and report.converted[0].name == ""


def test_the_number_of_groups_as_asked():
    model = nn.Sequential(nn.BatchNorm2d(6), nn.BatchNorm2d(16))
    assert [layer.num_groups for layer in dpt.convert(model, groups=8)[0]] == [6, 8]
    for wrong in (0, True, "many", 2.0):
        with pytest.raises(ValueError, match="give a positive number"):
            dpt.convert(model, groups=wrong)


def test_what_a_layer_keeps():
    old = nn.BatchNorm2d(8, eps=0.25).to(torch.bfloat16).eval()
    nn.init.normal_(old.weight)
    old.bias.requires_grad_(False)
    seen = []
    handle = old.register_forward_hook(lambda *_: seen.append(1))
    new, _ = dpt.convert(old, in_place=True)
    assert new.weight is old.weight and new.bias is old.bias
    assert (new.eps, new.training, new.affine) == (0.25, False, True)
    x = torch.randn(2, 8, 5, 5, dtype=torch.bfloat16)
    assert torch.equal(new(x), F.group_norm(x, 2, old.weight, old.bias, 0.25)) and seen == [1]
    handle.remove()
    assert new(x) is not None and seen == [1]


def test_layers_without_affine_parameters_or_bias():
    model = nn.Sequential(nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8))
    model[1].bias = None
    plain, scaled = dpt.convert(model)[0]
    assert plain.weight is None and plain.bias is None and not plain.affine
    assert scaled.weight is not None and scaled.bias is None
    assert plain(torch.randn(2, 8, 4, 4)).shape == scaled(torch.randn(2, 8, 4, 4)).shape


def test_a_copy_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    new, _ = dpt.convert(model)
    assert type(model[1]) is nn.BatchNorm2d and type(new[1]) is nn.GroupNorm
    assert new[1].weight is not model[1].weight
    same, _ = dpt.convert(model, in_place=True)
    assert same is model and type(model[1]) is nn.GroupNorm


def test_a_shared_layer_stays_shared():
    model, report = dpt.convert(Shared())
    assert model.first is model.blocks[1] and type(model.first) is nn.GroupNorm
    assert [layer.name for layer in report.converted] == ["first"]
    assert model(torch.randn(2, 3, 6, 6)).shape == (2, 8)


def test_fused_layers_keep_their_activation():
    old = BatchNormAct2d(8, act_layer=nn.SiLU, drop_layer=nn.Dropout)
    x = torch.randn(2, 8, 5, 5)
    new, _ = dpt.convert(old.eval(), in_place=True)
    assert torch.equal(new(x), F.silu(F.group_norm(x, 2, old.weight, old.bias, old.eps)))
    synchronised = SyncBatchNormAct(8)
    synchronised.act = nn.SiLU()
    assert torch.allclose(dpt.convert(synchronised)[0](x), F.silu(F.group_norm(x, 2)), atol=1e-6)


def test_vectors_are_normalised_within_each_example():
    new, _ = dpt.convert(nn.BatchNorm1d(32))
    x = torch.randn(3, 32)
    assert torch.allclose(new(x)[1:], new(x[1:]))
    assert new(torch.randn(3, 32, 7)).shape == (3, 32, 7)


def test_instance_norm_loses_its_running_statistics():
    model = nn.Sequential(nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.InstanceNorm2d(4))
    new, report = dpt.convert(model)
    assert [layer.name for layer in report.converted] == ["0"]
    assert not list(new.buffers()) and model[0].running_mean is not None
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(new.eval()(x), new.train()(x))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (FrozenBatchNorm2d(8), "statistics are constants"),
        (FrozenBatchNormAct2d(8), "statistics are constants"),
        (OwnForward(8), "forward pass of its own"),
        (timm.layers.EvoNorm2dB0(8), "no BatchNorm of torch or timm"),
        (nn.LazyBatchNorm2d(), "has not seen an input"),
        (nn.BatchNorm1d(1), "would become a constant"),
        (
            nn.utils.parametrize.register_parametrization(nn.BatchNorm2d(8), "weight", nn.Tanh()),
            "remove the parametrization",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_what_is_left_alone_and_why(layer, reason):
    model = nn.Sequential(layer)
    same, report = dpt.convert(model, in_place=True)
    assert same[0] is layer and not report.converted
    (left,) = report.left_alone
    assert left.name == "0"
    assert reason in left.reason


def test_the_report_is_readable():
    _, report = dpt.convert(nn.Sequential(nn.BatchNorm2d(64), FrozenBatchNorm2d(8)))
    text = str(report)
    assert "layers converted: 1, left alone: 1" in text
    assert "BatchNorm2d -> GroupNorm, channels 64, groups 16, lost its running statistics" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_model_that_cannot_be_copied():
    model = nn.Sequential(nn.BatchNorm2d(4))
    model.made = torch.ones(1, requires_grad=True) * 2
    with pytest.raises(ValueError, match="in_place=True"):
        dpt.convert(model)
