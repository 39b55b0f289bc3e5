"""Adam without the bias that private noise gives its second moment, for torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dptrain.optim.directed import Directed

BETAS = (0.9, 0.999)
EPS = 1e-8
FLOOR = 0.1

UNKNOWN_NOISE = (
    "adam-bc and adamw-bc subtract the variance of their gradients' noise, and that of this one is not "
    "known: give them, through apply or private, gradients as privatize released them, or take adam or adamw."
)


class AdamBC(Directed):
    """DP-AdamBC: Adam whose second moment is that of the gradient and not that of the noise.

    Tang, Shpilevskiy, Lecuyer 2024, "DP-AdamBC: Your DP-Adam Is Actually DP-SGD (Unless You Apply Bias
    Correction)", arXiv 2312.14334, algorithm 1. A private gradient is g_t = clipped mean + noise, whose
    variance Phi_t = (sigma C / L)^2 in each coordinate is public. It adds Phi to the second moment, of which
    it is often the greater part: all coordinates are then divided by nearly the same number, as in SGD. With

        m_t = b1 m_(t-1) + (1 - b1) g_t                     m^ = m_t / (1 - b1^t)
        v_t = b2 v_(t-1) + (1 - b2) (g_t^2 - Phi_t)         v^ = v_t / (1 - b2^t)
        d_t = m^ / (sqrt(max(v^, floor Phi_t)) + eps)

    the expectation of v^ is the second moment of the clipped mean, also if the noise changes from step to
    step. For a constant Phi it is the paper's ``v^ - Phi``; its floor gamma' is our ``floor Phi``, in
    units of the noise, which makes one choice do for other clip norms and batch sizes. Without noise, this is
    Adam.

    The noise's variance comes with each step, in the parameter groups: `dptrain.torch.apply` puts it there.

    Raises (from ``step``):
        ValueError: the variance is not known.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        floor: float = FLOOR,
    ):
        if not (math.isfinite(floor) and floor > 0):
            raise ValueError(f"the floor of the second moment is {floor}: give a positive number.")
        super().__init__(parameters, lr, weight_decay, decoupled, floor=floor, noise_variance=None)

    def direction(self, gradient: Tensor, state: dict[str, Any], step: int, group: dict[str, Any]) -> Tensor:
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        (b1, b2), noise = BETAS, group["noise_variance"]
        mean = state["exp_avg"].lerp_(gradient, 1 - b1)
        square = state["exp_avg_sq"].mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        square.sub_((1 - b2) * noise)
        root = (square / (1 - b2**step)).clamp_min_(group["floor"] * noise).sqrt_()
        return (mean / (1 - b1**step)).div_(root.add_(EPS))

    def step(self, closure: Any = None) -> float | None:
        if any(group["noise_variance"] is None for group in self.param_groups):
            raise ValueError(UNKNOWN_NOISE)
        return super().step(closure)
