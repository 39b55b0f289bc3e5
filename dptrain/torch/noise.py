"""Gaussian noise, once per logical step, in float32 or better."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dptrain.core.entropy import Key


def generator(key: Key, device: torch.device) -> torch.Generator:
    """A torch generator started from ``key``.

    On a CPU, ``manual_seed`` keeps 32 bits of a seed, few enough to try them all; so the whole
    state of the Mersenne Twister is written, from a stream with 256 bits of entropy. On a GPU the
    counter-based Philox takes 64 bits.
    """
    made = torch.Generator(device)
    made.manual_seed(key.seed64())
    if device.type == "cpu":
        # legacy layout, in words of 8 bytes: seed; (left, seeded); next; 624 words of state; ...
        state = made.get_state()
        words = state.view(torch.int64)
        fresh = key.child("mersenne-twister").numpy_generator().integers(2**32, size=624)
        words[3 : 3 + 624] = torch.from_numpy(fresh.astype(np.int64))
        made.set_state(state)
    return made


def add_noise_(sums: dict[str, Tensor], noise_stddev: float, key: Key) -> None:
    """Add N(0, noise_stddev^2) to every element of every sum, in place.

    Each tensor has a stream of its own, derived from its name, so that the noise does not depend
    on the order of the parameters.

    Args:
        sums: float32 or better.
        noise_stddev: sigma C, in units of the gradient.
        key: used for this step's noise and nothing else.
    """
    if noise_stddev == 0:
        return
    for name, total in sums.items():
        if total.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"noise for {name} would be drawn in {total.dtype}: float32 at least.")
        source = generator(key.child("parameter", name), total.device)
        noise = torch.empty(total.shape, dtype=total.dtype, device=total.device)
        total.add_(noise.normal_(0.0, noise_stddev, generator=source))
