"""Which exceptions mean bad input: they are shown as one sentence, without a traceback."""

from __future__ import annotations

from dptrain.core.team import RankLost
from dptrain.torch.errors import Refused

BAD_INPUT_ERRORS: tuple[type[Exception], ...] = (
    ValueError,
    TypeError,
    MemoryError,
    Refused,
    RankLost,
)
