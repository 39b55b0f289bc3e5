"""``convert``: from layers that mix examples to layers that do not.

BatchNorm normalises each example with the others' values, so that no per-example gradient exists;
GroupNorm (Wu and He 2018, arXiv 1803.08494) normalises each example by itself.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized

MOST_GROUPS = 32
FEWEST_CHANNELS = 4
"""Per group, where each group also spans the positions of an image or a volume."""
FEWEST_CHANNELS_1D = 16
"""Per group of a BatchNorm1d, which may have no positions: two numbers normalised keep but a sign."""

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Converted:
    """One layer that was converted. ``name`` is dotted, and empty for the model itself."""

    name: str
    was: str
    now: str
    channels: int
    groups: int | None  #: of a GroupNorm; None for an InstanceNorm
    lost: tuple[str, ...]


@dataclass(frozen=True)
class LeftAlone:
    """One layer with batch or running statistics that was not converted, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """What became of every layer that has batch or running statistics. Print it."""

    converted: tuple[Converted, ...]
    left_alone: tuple[LeftAlone, ...]

    def __str__(self) -> str:
        lines = [f"layers converted: {len(self.converted)}, left alone: {len(self.left_alone)}"]
        width = max((len(layer.name or ".") for layer in (*self.converted, *self.left_alone)), default=0)
        for layer in self.converted:
            facts = [f"{layer.was} -> {layer.now}", f"channels {layer.channels}"]
            if layer.groups is not None:
                facts.append(f"groups {layer.groups}")
            if layer.lost:
                facts.append(f"lost its {' and '.join(layer.lost)}")
            lines.append(f"  {layer.name or '.':<{width}}  {', '.join(facts)}")
        lines += [f"  {x.name or '.':<{width}}  {x.kind} left alone: {x.reason}" for x in self.left_alone]
        return "\n".join(lines)


def convert(
    model: nn.Module, *, groups: int | str = "auto", in_place: bool = False
) -> tuple[nn.Module, ConversionReport]:
    """The model with GroupNorm in place of BatchNorm, and a report.

    Affine parameters are taken over as they are (the same objects if ``in_place``, so that an
    optimizer keeps them), with eps, device, dtype, mode, hooks, and the activation of timm's fused
    layers; running statistics are lost, so that a pre-trained network needs training again. A
    layer used in several places stays shared. InstanceNorm loses its running statistics.

    Args:
        model: any module; may be a BatchNorm itself.
        groups: of a layer of C channels: the largest divisor of C that is at most this. "auto": at
            most 32 that leaves each group at least 4 channels (16 for BatchNorm1d), or 1.
        in_place: change the model that was given instead of a deep copy of it. What is returned is
            the same module, unless that is itself a BatchNorm.

    Raises:
        ValueError: groups is neither "auto" nor a positive number, or the model cannot be copied.
    """
    if groups != "auto" and (not isinstance(groups, int) or isinstance(groups, bool) or groups < 1):
        raise ValueError(f'groups is {groups!r}: give a positive number or "auto".')
    if not in_place:
        try:
            model = copy.deepcopy(model)
        except RuntimeError as error:
            raise ValueError(f"the model cannot be copied ({error}): pass in_place=True.") from error
    converted, left_alone = [], []
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if not _has_statistics(module):
            continue
        if reason := _obstacle(module):
            left_alone.append(LeftAlone(name, type(module).__name__, reason))
            continue
        lost = () if module.running_mean is None else ("running statistics",)
        if isinstance(module, _InstanceNorm):
            new, count = _without_statistics(module), None
        else:
            count = _groups(module, groups)
            new = replaced[module] = _group_norm(module, count)
        was, now = type(module).__name__, type(new).__name__
        converted.append(Converted(name, was, now, module.num_features, count, lost))
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in replaced:
                setattr(parent, name, replaced[child])
    return replaced.get(model, model), ConversionReport(tuple(converted), tuple(left_alone))


def _has_statistics(module: nn.Module) -> bool:
    """Whether a layer normalises by statistics of the batch, or by a running average of them."""
    if isinstance(module, _InstanceNorm):
        return module.track_running_stats
    return isinstance(module, _BatchNorm) or any(name in module._buffers for name in STATISTICS[:2])


def _obstacle(module: nn.Module) -> str | None:
    """Why a layer is left as it is; None if it can be converted."""
    kind = type(module)
    if "Frozen" in kind.__name__:
        return "its statistics are constants, which mix no examples"
    if not isinstance(module, _BatchNorm | _InstanceNorm):
        return "it is no BatchNorm of torch or timm; replace it by hand"
    if isinstance(module.weight, nn.UninitializedParameter) or module.num_features == 0:
        return "it has not seen an input yet; run the model once, then convert it"
    if is_parametrized(module):
        return "its parameters are parametrized; remove the parametrization, then convert it"
    if isinstance(module, _InstanceNorm):
        return None
    if kind.forward not in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward) and not _is_fused(module):
        return "it has a forward pass of its own; replace it by hand"
    if isinstance(module, nn.BatchNorm1d) and module.num_features == 1:
        return "its single channel would become a constant; remove it, or replace it by hand"
    return None


def _is_fused(module: nn.Module) -> bool:
    """Whether this is one of timm's layers that also hold dropout and an activation."""
    if not type(module).__module__.startswith("timm."):
        return False  # whoever does not use timm need not wait for it to load
    from timm.layers import BatchNormAct2d
    from timm.layers.norm_act import SyncBatchNormAct

    return type(module).forward in (BatchNormAct2d.forward, SyncBatchNormAct.forward)


def _groups(module: _BatchNorm, wanted: int | str) -> int:
    channels = module.num_features
    if wanted != "auto":
        most = min(wanted, channels)
    else:
        fewest = FEWEST_CHANNELS_1D if isinstance(module, nn.BatchNorm1d) else FEWEST_CHANNELS
        most = max(1, min(MOST_GROUPS, channels // fewest))
    return next(count for count in range(most, 0, -1) if channels % count == 0)


def _group_norm(module: _BatchNorm, groups: int) -> nn.GroupNorm:
    """A GroupNorm with the parameters, mode and hooks of ``module``."""
    if _is_fused(module):
        from timm.layers import GroupNormAct

        new = GroupNormAct(module.num_features, groups, eps=module.eps, affine=False, apply_act=False)
        for part in ("drop", "act"):
            if hasattr(module, part):
                setattr(new, part, getattr(module, part))
    else:
        new = nn.GroupNorm(groups, module.num_features, module.eps, affine=False)
    new.affine, new.training = module.affine, module.training
    new.weight, new.bias = module.weight, module.bias
    for name, hooks in vars(module).items():
        # The same dictionaries, so that a handle given out before still removes its hook.
        if name.endswith("_hooks"):
            setattr(new, name, hooks)
    return new


@torch.no_grad()
def _without_statistics(module: _InstanceNorm) -> _InstanceNorm:
    """The same layer, normalising by each example's own statistics in evaluation too."""
    module.track_running_stats = False
    for name in STATISTICS:
        setattr(module, name, None)
    return module
