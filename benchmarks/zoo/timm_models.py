"""Image classifiers of timm, by name or by class, at tiny sizes."""

from __future__ import annotations

import copy
import importlib
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .entry import Case, Entry

CLASSES = 5


class Of:
    """``module:Class`` of timm as the value of an option, or an object of that class.

    It is looked up when the model is made: the catalogue imports nothing heavy.
    """

    def __init__(self, source: str, **options):
        self.source, self.options = source, options

    def __call__(self):
        found = lookup(self.source)
        return found(**self.options) if self.options else found


def lookup(source: str):
    module, name = source.split(":")
    home = "timm.layers" if module == "layers" else f"timm.models.{module}"
    return getattr(importlib.import_module(home), name)


def resolve(option):
    if isinstance(option, list):
        return [resolve(part) for part in option]
    return option() if isinstance(option, Of) else option


def image_loss(model, batch):
    """Cross-entropy; models with a distillation or an auxiliary head give several logits."""
    outputs = model(batch["image"])
    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    losses = [F.cross_entropy(o.flatten(1), batch["label"], reduction="none") for o in outputs]
    return torch.stack(losses).mean(0)


def images(size: int, batch_size: int, channels: int = 3):
    return {
        "image": torch.randn(batch_size, channels, size, size, dtype=torch.float64),
        "label": torch.randint(CLASSES, (batch_size,)),
    }


def group_normed(model: nn.Module) -> nn.Module:
    """Every BatchNorm replaced by a GroupNorm, as the usual advice has it."""
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm):
            groups = next(g for g in (4, 3, 2, 1) if child.num_features % g == 0)
            norm = nn.GroupNorm(groups, child.num_features)
            # timm's BatchNormAct2d holds its activation
            setattr(model, name, nn.Sequential(norm, copy.deepcopy(getattr(child, "act", nn.Identity()))))
        else:
            group_normed(child)
    return model


def timm_model(source, **options) -> nn.Module:
    """A timm model by name, or by ``module:Class`` where the name fixes the sizes."""
    import timm

    options = {name: resolve(option) for name, option in options.items()}
    create = lookup(source) if ":" in source else partial(timm.create_model, source)
    return create(num_classes=CLASSES, **options)


def classifier(create, size: int, change=None) -> Case:
    model = create()
    return Case(change(model) if change else model, image_loss, partial(images, size))


def image(
    family: str, source: str, size: int, *, batch_norm=False, wide=False, slow=False, **options
) -> Entry:
    make = partial(classifier, partial(timm_model, source, **options), size)
    return Entry(f"timm/{family}", family, make, batch_norm=batch_norm, wide=wide, slow=slow)


def normed(family: str, source: str, size: int, *, slow=False, **options) -> list[Entry]:
    """A model as it is, with BatchNorm, and the same with GroupNorm instead."""
    entry = image(family, source, size, batch_norm=True, slow=slow, **options)
    make = partial(classifier, partial(timm_model, source, **options), size, group_normed)
    return [entry, Entry(f"{entry.name}+gn", family, make, slow=slow)]
