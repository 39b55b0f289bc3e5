"""The JAX engine: split, capture, clip, noise, step.

    clipped = clipped_grad(loss_fn, clip_norm=1.0)            # loss_fn(params, example) -> scalar
    gradient = privatize(clipped(params, batch), mechanism, key)
    updates, state = private(optax.adam(1e-3)).update(gradient, state, params)

``make_private`` does all three over a data set.
"""

from . import denoise
from .accumulate import Accumulator, accumulate
from .clipped_sum import ClippedSum
from .clipping import ClippedGrad, clipped_grad
from .correlated import CorrelatedNoise
from .errors import Refused
from .private import PrivateTraining, make_private
from .release import PrivateGradient, private, privatize

__all__ = [
    "Accumulator",
    "ClippedGrad",
    "ClippedSum",
    "CorrelatedNoise",
    "PrivateGradient",
    "PrivateTraining",
    "Refused",
    "accumulate",
    "clipped_grad",
    "denoise",
    "make_private",
    "private",
    "privatize",
]
