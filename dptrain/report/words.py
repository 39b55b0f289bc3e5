"""Numbers as people read them."""

from __future__ import annotations

import math
from typing import Any

NOTHING = "–"


def written(value: Any, digits: int = 4) -> str:
    """A cell: thousands with commas, others with so many significant digits, a dash for nothing."""
    if value is None or value is False or (isinstance(value, float) and math.isnan(value)):
        return NOTHING
    if isinstance(value, str):
        return value or NOTHING
    try:
        number = float(value)
    except (TypeError, ValueError):
        return NOTHING if value != value else str(value)  # pandas' missing values differ from themselves
    if not math.isfinite(number):
        return str(number).replace("inf", "∞")
    if number == int(number) and abs(number) < 1e15:
        return f"{int(number):,}"
    if abs(number) >= 1000:
        return f"{number:,.0f}"
    if abs(number) < 1e-3:
        return f"{number:.3g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(number))))
    text = f"{number:.{min(decimals, digits)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def short(value: float) -> str:
    """At a bar or an axis: three significant digits."""
    if value >= 1000:
        return f"{value:,.0f}"
    return written(float(f"{value:.3g}"), 3)
