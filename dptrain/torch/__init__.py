"""The PyTorch engine: capture, plan, clip, noise, step.

    clipped = clipped_grad(model, loss_fn, clip_norm=1.0)     # batch -> ClippedSum
    gradient = privatize(clipped(batch), mechanism, key)      # -> PrivateGradient
    apply(optimizer, model, gradient)

``make_private`` does all three over a data set.
"""

from .clipped_sum import ClippedSum
from .clipping import ClippedGrad, clipped_grad
from .errors import Refused
from .private import PrivateTraining, make_private
from .release import PrivateGradient, apply, privatize

__all__ = [
    "ClippedGrad",
    "ClippedSum",
    "PrivateGradient",
    "PrivateTraining",
    "Refused",
    "apply",
    "clipped_grad",
    "make_private",
    "privatize",
]
