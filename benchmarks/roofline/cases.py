"""The models that are measured: how each is built, its batches and its loss.

Weights are random: what a step costs does not depend on them. Nothing is random in a forward pass.
Each case has a small form, in which every code path runs within seconds and no figure means anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LossFn = Callable[[nn.Module, Any], Tensor]

IMAGE_CLASSES = 100
VOCABULARY = 8192
SEQUENCE = 128


@dataclass(frozen=True)
class Case:
    """A model at a physical batch size.

    Attributes:
        make: the model, with random weights.
        make_batch: so many examples.
        loss_fn: losses ``[B]`` of a model on a batch.
        batch_size: examples in a physical batch.
        convolutional: also tried with channels last.
    """

    name: str
    make: Callable[[], nn.Module]
    make_batch: Callable[[int], Any]
    loss_fn: LossFn
    batch_size: int
    convolutional: bool = False

    def build(self, device: str = "cpu", seed: int = 0) -> nn.Module:
        """The same weights for the same seed."""
        torch.manual_seed(seed)
        return self.make().to(device).train()


def classify(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy of images, in float32 or better."""
    logits = model(batch[0])
    return F.cross_entropy(at_least_float32(logits), batch[1], reduction="none")


def predict_next(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross entropy over the positions of each sequence."""
    logits = at_least_float32(model(batch).logits[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    return losses.reshape(batch.shape[0], -1).mean(1)


def at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def under_autocast(loss_fn: LossFn, dtype: torch.dtype | None) -> LossFn:
    """The model computes in ``dtype`` where autocast lets it; None: as it is."""
    if dtype is None:
        return loss_fn

    def lowered(model: nn.Module, batch: Any) -> Tensor:
        some = batch if isinstance(batch, Tensor) else batch[0]
        with torch.autocast(some.device.type, dtype):
            return loss_fn(model, batch)

    return lowered


def labelled_images(side: int, batch_size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch_size, 3, side, side), torch.randint(IMAGE_CLASSES, (batch_size,))


def sequences(length: int, batch_size: int) -> Tensor:
    return torch.randint(VOCABULARY, (batch_size, length))


def timm_model(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, num_classes=IMAGE_CLASSES, **options)


def vgg11() -> nn.Module:
    """The CIFAR form: VGG11's convolutions on 32 pixels, no BatchNorm, one linear head."""
    from torchvision.models import vgg

    features = vgg.make_layers(vgg.cfgs["A"], batch_norm=False)
    return nn.Sequential(features, nn.Flatten(), nn.Linear(512, IMAGE_CLASSES))


def gpt2_like(layers: int, width: int, heads: int, length: int) -> nn.Module:
    """GPT-2 with fewer layers and words, head and embedding tied, no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": length}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **quiet, **ends))


def images(name: str, make: Callable[[], nn.Module], side: int, batch_size: int, **more: Any) -> Case:
    return Case(name, make, partial(labelled_images, side), classify, batch_size, **more)


def text(name: str, batch_size: int, **sizes: int) -> Case:
    make_batch = partial(sequences, sizes["length"])
    return Case(name, partial(gpt2_like, **sizes), make_batch, predict_next, batch_size)


def vit(name: str, size: str, batch_size: int) -> tuple[Case, Case]:
    model = partial(timm_model, f"vit_{size}_patch16_224")
    small = partial(model, img_size=32, depth=2)
    return images(name, model, 224, batch_size), images(name, small, 32, 2)


def convnet(name: str, model: str, batch_size: int, side: int = 64) -> tuple[Case, Case]:
    make = partial(timm_model, model)
    pair = ((224, batch_size), (side, 2))
    full, small = (images(name, make, *each, convolutional=True) for each in pair)
    return full, small


PAIRS = [
    vit("vit-tiny", "tiny", 16),
    vit("vit-small", "small", 8),
    vit("vit-base", "base", 4),
    convnet("bit-50x1", "resnetv2_50x1_bit", 8),
    convnet("convnext-atto", "convnext_atto", 16),
    (
        images("vgg11", vgg11, 32, 64, convolutional=True),
        images("vgg11", vgg11, 32, 2, convolutional=True),
    ),
    (
        text("gpt2-like", 8, layers=4, width=768, heads=12, length=SEQUENCE),
        text("gpt2-like", 2, layers=1, width=32, heads=2, length=8),
    ),
]
CASES: dict[str, Case] = {full.name: full for full, _ in PAIRS}
SMALL: dict[str, Case] = {small.name: small for _, small in PAIRS}


@contextlib.contextmanager
def arithmetic(precision: str):
    """Switch TF32 on for ``tf32`` and off otherwise, and back."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    try:
        yield torch.bfloat16 if precision == "bf16" else None
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
