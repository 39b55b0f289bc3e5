"""Does a compiled step stay compiled while Poisson sampling changes who takes part?"""

from __future__ import annotations

import torch
from torch._dynamo.utils import compilation_time_metrics

from .contestants import Contestant

#: as the physical batches of real training: some full, the last of a logical one nearly empty
SHARES = (1.0, 0.7, 0.2)


def compiled_so_far() -> int:
    """Graphs that Inductor has compiled in this process, whatever asked for them."""
    return len(compilation_time_metrics.get("compile_fx_inner", ()))


def during_poisson_steps(contestant: Contestant, batch_size: int, steps: int, device: str) -> int | None:
    """Compilations in so many physical steps with random masks, after the contestant is warm.

    None where it takes no mask.
    """
    if contestant.clipped_sum is None or not steps:
        return None
    before = compiled_so_far()
    for step in range(steps):
        mask = torch.rand(batch_size, device=device) < SHARES[step % len(SHARES)]
        contestant.clipped_sum(mask)
    return compiled_so_far() - before
