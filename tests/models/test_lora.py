import sys

import pytest
import timm
import torch
from torch import nn

import dptrain.torch as dpt
from dptrain.models import ModelError, add_lora, build, in_first_blocks, logits, select_trainable, split_head

pytest.importorskip("peft")

IMAGE = (3, 32, 32)


class ReadsTheWeight(nn.Module):
    """Calls one of its linear layers and reads the weight of the other, as BEiT does."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(nn.functional.linear(self.blocks[0](x), self.blocks[1].weight))


def vit():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=3
    )


def test_blocks_are_adapted_and_the_head_is_trained():
    model, x = vit(), torch.randn(2, *IMAGE)
    before = model(x)
    add_lora(model, rank=2, alpha=4, example=x[:1])
    assert torch.allclose(model(x), before)
    chosen = select_trainable(model, "lora")
    adapted = {name.split(".lora_")[0] for name in chosen.names if "lora_" in name}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert adapted == {f"blocks.{block}.{layer}" for block in (0, 1) for layer in layers}
    assert set(chosen.names) - {name for name in chosen.names if "lora_" in name} == {
        "head.weight",
        "head.bias",
    }
    assert model.blocks[0].attn.qkv.lora_A["default"].weight.shape == (2, 16)


def test_adapters_are_clipped_exactly():
    model, x, y = vit(), torch.randn(3, *IMAGE), torch.tensor([0, 1, 2])
    add_lora(model, rank=2, alpha=4, example=x[:1])
    select_trainable(model, "lora")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    loss = lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1], reduction="none")  # noqa: E731
    grads = dpt.clipped_grad(model.double(), loss, clip_norm=1e6)((x.double(), y)).grads
    loss(model, (x.double(), y)).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-9, atol=1e-9)
    assert len(grads) == 8 * 2 + 2


def test_layers_that_are_not_called_are_left_alone():
    model = ReadsTheWeight()
    add_lora(model, 2, 4, torch.zeros(1, 4))
    assert select_trainable(model, "lora").names == (
        "blocks.0.lora_A.default.weight",
        "blocks.0.lora_B.default.weight",
        "head.weight",
        "head.bias",
    )


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
def test_torchs_own_attention_keeps_its_output_projection():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(16, 2))
    add_lora(model, 2, 4, torch.zeros(1, 2, 8))
    names = [name for name in select_trainable(model, "lora").names if "lora_A" in name]
    assert [name.split(".")[3] for name in names] == ["linear1", "linear2"]


def test_a_model_without_linear_layers():
    with pytest.raises(ModelError, match="no linear layer to adapt in Sequential"):
        add_lora(build("larger-convnet", 3, IMAGE), 2, 4, torch.zeros(1, *IMAGE))


def test_without_peft_the_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"pip install 'dptrain\[lora\]'"):
        add_lora(vit(), 2, 4, torch.zeros(1, *IMAGE))


def test_features_of_an_adapted_model():
    model, x = vit().eval(), torch.randn(2, *IMAGE)
    backbone, head = split_head(model)
    assert torch.allclose(head(backbone(x)), logits(model, x))


def test_frozen_blocks_get_no_adapters():
    model = vit()
    frozen = in_first_blocks(model, 1)
    add_lora(model, rank=2, alpha=4, example=torch.randn(1, *IMAGE), frozen=frozen)
    chosen = select_trainable(model, "lora", frozen)
    assert all(name.startswith(("blocks.1.", "head.")) for name in chosen.names)
    assert len(chosen.names) == 4 * 2 + 2
