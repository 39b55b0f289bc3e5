"""Augmentation multiplicity: the gradients of several random views of an example, averaged before clipping.

Source: De et al. 2022, "Unlocking high-accuracy differentially private image classification through scale",
section 3.2. An example's gradient is that of the mean loss over its K views: one vector, which is clipped
once. Neither sensitivity nor accounting know of K.
"""

from __future__ import annotations

import torch

PADDING = 8
"""Images are shifted by up to one in so many of their pixels (4 of 32), and by one at least."""


def views(images: torch.Tensor, count: int, flip: bool) -> torch.Tensor:
    """Random views ``[B, K, C, H, W]`` of images ``[B, C, H, W]``: shifted, with their edges continued.

    What is drawn comes from torch's global random state, and does not depend on the images.

    Args:
        count: K.
        flip: also mirror left and right, each view with probability 1/2.
    """
    size, _, height, width = images.shape
    many = images.repeat_interleave(count, 0)
    rows = _places(len(many), height, images.device)
    columns = _places(len(many), width, images.device)
    if flip:
        mirrored = torch.rand(len(many), 1, device=images.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    number = torch.arange(len(many), device=images.device)
    # [B K, H, W, C]: places are taken from three axes at once, and the channels come last
    taken = many.movedim(1, -1)[number[:, None, None], rows[:, :, None], columns[:, None, :]]
    return taken.movedim(-1, 1).reshape(size, count, *images.shape[1:])


def _places(count: int, length: int, device: torch.device) -> torch.Tensor:
    """Where the pixels of shifted lines are taken from, ``[count, length]``."""
    most = max(1, length // PADDING)
    shift = torch.randint(-most, most + 1, (count, 1), device=device)
    return (torch.arange(length, device=device) + shift).clamp(0, length - 1)
