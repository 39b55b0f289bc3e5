import pytest
import torch
from torch import nn

from dptrain.models import ModelError, build, head_name, select_trainable, split_head


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
