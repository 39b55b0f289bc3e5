"""Bytes that a gradient needs on its way between devices, by what both ends know of it.

A private step sends twice: each device's clipped sum towards the place where it is added up and gets noise,
and the noisy gradient back to whoever applies it. A projection that is public, or drawn from a key that all
have, is known before either: both carry the kept numbers alone. What the noisy gradient itself decides
(top-k) is known only after the sum: that one is dense, and the noisy gradient carries its indices with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod

VALUE_BYTES = 4
"""Of a float32."""


@dataclass(frozen=True)
class Wire:
    """Bytes of one step for each device.

    Attributes:
        sum_bytes: of its clipped sum.
        release_bytes: of the noisy gradient.
        dense_bytes: of either without any compression.
    """

    sum_bytes: int
    release_bytes: int
    dense_bytes: int

    def to_dict(self) -> dict[str, int]:
        """JSON-ready."""
        return asdict(self)


def wire(
    shapes: Mapping[str, tuple[int, ...]], kept: int | None, *, known: bool, remembers: bool = False
) -> Wire:
    """What a step sends.

    Args:
        shapes: of the trained parameters, by name.
        kept: how many numbers of the gradient are sent in all; None for all of them.
        known: whether both ends know which, before the sum: by a public mask, a public basis or a key. Else
            each number of the noisy gradient comes with its index.
        remembers: whether what is left out is wanted as well, where the sum is (error feedback).
    """
    elements = sum(map(prod, shapes.values()))
    dense = elements * VALUE_BYTES
    if kept is None:
        return Wire(dense, dense, dense)
    release = kept * (VALUE_BYTES if known else VALUE_BYTES + index_bytes(elements))
    return Wire(kept * VALUE_BYTES if known and not remembers else dense, release, dense)


def index_bytes(elements: int) -> int:
    """Of an index into so many elements: 4, or 8 where these do not suffice."""
    return 4 if elements <= 2**32 else 8
