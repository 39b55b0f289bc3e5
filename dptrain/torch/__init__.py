"""The PyTorch engine: capture, plan, clip, noise, step.

    clipped = clipped_grad(model, loss_fn, clip_norm=1.0)     # batch -> ClippedSum
    gradient = privatize(clipped(batch), mechanism, key)      # -> PrivateGradient
    apply(optimizer, model, gradient)

``make_private`` does all three over a data set. ``convert`` replaces layers that mix examples;
``check`` says what would be done with a model and whether it is exact.
"""

from dptrain.core.team import RankLost

from .check import CheckReport, check
from .clipped_sum import ClippedSum
from .clipping import ClippedGrad, clipped_grad
from .convert import ConversionReport, convert
from .correlated import CorrelatedNoise
from .denoise import Denoiser
from .errors import Refused
from .private import PrivateTraining, make_private
from .ranks import Ranks
from .release import PrivateGradient, apply, privatize

__all__ = [
    "CheckReport",
    "ClippedGrad",
    "ClippedSum",
    "ConversionReport",
    "CorrelatedNoise",
    "Denoiser",
    "PrivateGradient",
    "PrivateTraining",
    "RankLost",
    "Ranks",
    "Refused",
    "apply",
    "check",
    "clipped_grad",
    "convert",
    "make_private",
    "privatize",
]
