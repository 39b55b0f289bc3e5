"""Fixed, stratified splits."""

from __future__ import annotations

import torch


def stratified(labels: torch.Tensor, fraction: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of a rest and of a held-out part with about `fraction` of each class.

    labels: [N] int64. Returns two sorted index tensors that partition range(N). The same labels,
    fraction and seed give the same split on every machine: the split is public, not a secret.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"The held-out fraction is {fraction}: give a number between 0 and 1.")
    generator = torch.Generator().manual_seed(seed)
    held_out = []
    for label in labels.unique().tolist():
        members = (labels.cpu() == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        held_out.append(members[order[: round(fraction * len(members))]])
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[torch.cat(held_out)] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()
