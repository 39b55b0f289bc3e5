"""Random tokens or images for a model of transformers, and a loss per example for each task."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dptrain.models.errors import ModelError

if TYPE_CHECKING:
    from dptrain.models.subjects import Choices

LENGTH = 64


def random_batch(model: nn.Module, config: Any, kind: str, choices: Choices) -> tuple[dict[str, Tensor], str]:
    """Random inputs and labels, and what they are, in words."""
    generator = torch.Generator().manual_seed(0)
    count = choices.batch_size
    reads = model.main_input_name
    if reads == "pixel_values":
        size = getattr(config, "image_size", None) or choices.image_size or 224
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(config, "num_channels", 3)
        batch = {"pixel_values": torch.randn(count, channels, height, width, generator=generator)}
        if kind == "classification":
            batch["labels"] = torch.randint(config.num_labels, (count,), generator=generator)
        return batch, f"{height} x {width} pixels"
    if reads != "input_ids":
        raise ModelError(
            f"{type(model).__name__} reads {reads}, and stand-ins are made for images and tokens only; give "
            "package.module:factory, a function that returns (model, loss_fn, batch)."
        )
    vocabulary = config.get_text_config().vocab_size
    longest = getattr(config, "max_position_embeddings", None) or 0
    length = choices.length or (min(LENGTH, longest) if longest > 0 else LENGTH)
    if length < 2:
        raise ModelError(f"--length must be at least 2, and is {length}.")
    ids, mask = _tokens(count, length, vocabulary, config.pad_token_id, generator)
    batch = {"input_ids": ids, "attention_mask": mask}
    if kind == "seq2seq":
        targets, valid = _tokens(count, max(2, length // 2), vocabulary, config.pad_token_id, generator)
        start = torch.full((count, 1), config.pad_token_id)
        batch |= {
            "decoder_input_ids": torch.cat([start, targets[:, :-1]], 1),
            "decoder_attention_mask": valid,
            "labels": targets,
        }
    elif kind == "classification":
        batch["labels"] = torch.randint(config.num_labels, (count,), generator=generator)
    elif kind == "tokens":
        classes = config.num_labels if "Token" in type(model).__name__ else vocabulary
        batch["labels"] = torch.randint(classes, (count, length), generator=generator)
    return batch, f"{length} tokens, padded"


def _tokens(
    count: int, length: int, vocabulary: int, padding: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(ids, mask), each [B, T]: the first row is full, the others end earlier, in padding."""
    ids = torch.randint(vocabulary, (count, length), generator=generator)
    ids = torch.where(ids == padding, (padding + 1) % vocabulary, ids)
    lengths = length - (torch.arange(count) * max(1, length // 5)) % max(1, length - 1)
    mask = (torch.arange(length) < lengths.unsqueeze(1)).long()
    return torch.where(mask.bool(), ids, padding), mask


def _outputs(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return model(**{key: value for key, value in batch.items() if key != "labels"})


def _of_positions(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy ``[B]``, averaged over each example's own positions."""
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none") * mask
    return losses.sum(1) / mask.sum(1)


def _classification(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(_outputs(model, batch).logits, batch["labels"], reduction="none")


def _lm(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = _outputs(model, batch).logits
    return _of_positions(logits[:, :-1], batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:])


def _seq2seq(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = _outputs(model, batch).logits
    return _of_positions(logits, batch["labels"], batch["decoder_attention_mask"])


def _each_token(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return _of_positions(_outputs(model, batch).logits, batch["labels"], batch["attention_mask"])


def _features(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Without a task, the mean square of each output."""
    found = [t for t in _outputs(model, batch).values() if isinstance(t, Tensor) and t.is_floating_point()]
    return sum(t.flatten(1).square().mean(1) for t in found if t.dim() > 1)


LOSSES: dict[str, Callable[[nn.Module, Any], Tensor]] = {
    "classification": _classification,
    "lm": _lm,
    "seq2seq": _seq2seq,
    "tokens": _each_token,
    "features": _features,
}
