"""One lower bound, and what it supposes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """ε is at least this.

    Attributes:
        bound: how it was come by.
        adversary: on whose scores.
        epsilon: 0 says nothing.
        assumes: what must hold for it, beside fair secret coins.
        noise_below: of bounds on the noise: it is less than this, in units of what is stated.
    """

    bound: str
    adversary: str
    epsilon: float
    assumes: tuple[str, ...] = ()
    noise_below: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: what is infinite says nothing and is None."""
        told = asdict(self) | {"assumes": list(self.assumes)}
        return told | {"noise_below": None if self.noise_below == float("inf") else self.noise_below}
