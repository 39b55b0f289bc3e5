import pytest
import torch
from torch import nn

from dptrain.models import (
    ModelError,
    build,
    head_name,
    in_first_blocks,
    select_trainable,
    split_blocks,
    split_head,
)


def trained(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.fixture(scope="module")
def vit():
    return build("vit-tiny", 10, (3, 32, 32))


def test_all(vit):
    assert select_trainable(vit, "all").count == sum(p.numel() for p in vit.parameters())


def test_head(vit):
    chosen = select_trainable(vit, "head")
    assert trained(vit) == ["head.weight", "head.bias"] == list(chosen.names)
    assert chosen.count == 1930


def test_bias_only_includes_the_head(vit):
    select_trainable(vit, "bias")
    assert all(name.endswith(".bias") or name == "head.weight" for name in trained(vit))
    assert "blocks.0.norm1.bias" in trained(vit)


def test_norm_only_includes_the_head(vit):
    select_trainable(vit, "norm")
    assert all("norm" in name or name.startswith("head.") for name in trained(vit))
    assert "blocks.11.norm2.weight" in trained(vit)


def test_a_regular_expression(vit):
    select_trainable(vit, r"blocks\.(10|11)\.")
    assert all(name.startswith(("blocks.10.", "blocks.11.")) for name in trained(vit))


@pytest.mark.parametrize(
    ("which", "message"), [("nothing-like-it", "matches no parameter"), ("(", "regular expression")]
)
def test_what_matches_nothing_is_refused(vit, which, message):
    with pytest.raises(ModelError, match=message):
        select_trainable(vit, which)


@pytest.mark.parametrize("name", ["vit-tiny", "bit-50x1", "mlp"])
def test_head_of_backbone_is_the_model(name):
    shape = (3, 32, 32)
    model = build(name, 5, shape).eval()
    nn.init.normal_(model.get_submodule(head_name(model)).weight)
    backbone, head = split_head(model)
    x = torch.randn(2, *shape)
    with torch.no_grad():
        assert torch.allclose(head(backbone(x)), model(x))
    assert {id(p) for p in head.parameters()} <= {id(p) for p in model.parameters()}


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ModelError, match="name its classification layer"):
        head_name(nn.Sequential(nn.Flatten()))


@pytest.mark.parametrize(
    ("name", "count"), [("vit-tiny", 9), ("vit-tiny", 1), ("bit-50x1", 3), ("convnext_atto", 2)]
)
def test_what_follows_frozen_blocks_is_the_rest_of_the_model(name, count):
    model = build(name, 5, (3, 32, 32))
    nn.init.normal_(model.get_submodule(head_name(model)).weight)
    chosen = select_trainable(model, "all", in_first_blocks(model, count))
    backbone, rest = split_blocks(model, count, torch.zeros(1, 3, 32, 32))
    x = torch.randn(2, 3, 32, 32)
    features = backbone(x)
    assert torch.equal(rest(features), model(x))
    assert not features.requires_grad, "nothing before the cut is trained"
    rest(features).sum().backward()
    reached = [n for n, p in model.named_parameters() if p.grad is not None]
    assert reached == list(chosen.names), "and all after it is"


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("eva02_tiny_patch14_224", 2, "reads more than their output"),  # a table of rotations, in each block
        ("vit-tiny", 12, "has 12 blocks"),
        ("mlp", 1, "needs a model with a sequence of blocks"),
    ],
)
def test_what_cannot_be_cut_is_refused(name, count, message):
    shape = (3, 224, 224) if name.startswith("eva") else (3, 32, 32)
    model = build(name, 5, shape)
    for parameter in model.get_submodule(head_name(model)).parameters():
        nn.init.zeros_(parameter)  # as many begin: whatever reaches the head, the outputs are alike
    with pytest.raises(ModelError, match=message):
        split_blocks(model, count, torch.zeros(1, *shape))
