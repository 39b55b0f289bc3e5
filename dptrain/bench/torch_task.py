"""What every contestant of PyTorch is given: a model, a loss and one physical batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dptrain.bench.case import Case
from dptrain.bench.contestant import Unsupported
from dptrain.models import build, logits
from dptrain.training.device import autocast

LEARNING_RATE = 1e-4
VOCABULARY = 8192

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Task:
    """A case as PyTorch sees it. Weights and data are random: what a step costs depends on neither.

    Attributes:
        clip_norm: of the private contestants.
    """

    case: Case
    clip_norm: float = 1.0

    def model(self) -> nn.Module:
        """A new model, in training mode on the device, always with the same weights."""
        torch.manual_seed(0)
        case = self.case
        model = (
            gpt2_like(case.image_size)
            if case.model == "gpt2-like"
            else build(case.model, case.num_classes, (3, case.image_size, case.image_size))
        )
        model = model.to(case.device).train()
        return model.to(memory_format=torch.channels_last) if case.channels_last else model

    @cached_property
    def batch(self) -> Any:
        """``(images [B, 3, S, S], labels [B])``, or tokens ``[B, T]``, on the device."""
        return self.batch_of(self.case.batch_size)

    def batch_of(self, size: int, seed: int = 1) -> Any:
        """A batch of so many examples."""
        generator, case = torch.Generator().manual_seed(seed), self.case
        if case.model == "gpt2-like":
            batch: Any = torch.randint(VOCABULARY, (size, case.image_size), generator=generator)
        else:
            images = torch.randn(size, 3, case.image_size, case.image_size, generator=generator)
            if case.channels_last:
                images = images.to(memory_format=torch.channels_last)
            batch = images, torch.randint(case.num_classes, (size,), generator=generator)
        return tree_map(lambda t: t.to(case.device), batch)

    def loss_fn(self, model: nn.Module, batch: Any) -> Tensor:
        """Losses ``[B]`` float32 or better; the model runs under autocast where the precision says so."""
        with autocast(self.case.precision, torch.device(self.case.device)):
            if self.case.model == "gpt2-like":
                return _next_token(model, batch)
            return F.cross_entropy(_wide(logits(model, batch[0])), batch[1], reduction="none")

    @property
    def logical_batch_size(self) -> int:
        """L, of so many full physical batches."""
        return self.case.batch_size * self.case.accumulate

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Adam, as in the paper, over all parameters that are trained."""
        return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.case.device.startswith("cuda"):
            torch.cuda.synchronize(self.case.device)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    scores = _wide(model(tokens).logits[:, :-1])
    losses = F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.reshape(len(tokens), -1).mean(1)


def gpt2_like(length: int, layers: int = 4, width: int = 768, heads: int = 12) -> nn.Module:
    """GPT-2 with fewer layers and words, its head tied to the embedding, no dropout."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise Unsupported("gpt2-like needs transformers: pip install 'dptrain[transformers]'.") from error
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": length}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **quiet, **ends))
