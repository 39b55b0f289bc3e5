"""What each torch operation does when parameters meet data in it.

``mixed`` dispatches: a rule by name, the pointwise operations as a family, torch's own Python
functions by looking inside them, and the generic rule for the rest. Rules are written in terms of
other operations where they can be: ``capture(function, ...)`` calls one as the model would.
"""

from .dispatch import METADATA, chosen, is_special, metadata, mixed, parameter_only
from .norms import refuse_batch_statistics
from .scattering import scatters

__all__ = [
    "METADATA",
    "chosen",
    "is_special",
    "metadata",
    "mixed",
    "parameter_only",
    "refuse_batch_statistics",
    "scatters",
]
