"""Colours, lines and markers: a colour says the method, a line and a marker say the library.

The hues are those of Okabe and Ito, and of Paul Tol, which people with a colour vision deficiency can tell
apart; relatives of a method differ in lightness.
"""

from __future__ import annotations

from dptrain.report import names
from dptrain.report.shown import Line, Look, Marker

#: by name, on white and on dark ground
COLOURS: dict[str, tuple[str, str]] = {
    "non-private": ("#2b2f36", "#e4e7ec"),
    "per-example": ("#d55e00", "#ff8b3d"),
    "per-example-vmap": ("#e69f00", "#f5bd42"),
    "per-example-loop": ("#8a7a1f", "#cfc25a"),
    "fast-gradient": ("#7a5ab5", "#ae93e6"),
    "ghost": ("#0072b2", "#4aa8e8"),
    "mixed-ghost": ("#56b4e9", "#9ad4f7"),
    "bk-ghost": ("#009e73", "#2fcf9f"),
    "bk-mixed-ghost": ("#7cc8ad", "#a9e6d0"),
    "bk-mix-opt": ("#0b5d48", "#6aa892"),
    "auto": ("#c2187a", "#ff6db6"),
    "ideal": ("#8b919b", "#8b919b"),
    # an ordered quantity, such as a number of workers, from little to much
    "step-1": ("#9ecae1", "#2f6f9f"),
    "step-2": ("#5aa2cf", "#4a94c9"),
    "step-3": ("#2171b5", "#7bb8e3"),
    "step-4": ("#0b3c74", "#b5dbf5"),
}
STEPS = ("step-1", "step-2", "step-3", "step-4")
UNKNOWN = "ideal"

_LINES: dict[str, tuple[Line, Marker]] = {
    "torch": ("solid", "circle"),
    "jax": ("dashdot", "square"),
    "opacus": ("dash", "triangle"),
    "private-vision": ("dot", "diamond"),
    "fastdp": ("dash", "pentagon"),
    "jax-privacy": ("dot", "cross"),
}


def look(engine: str, method: str, faint: bool = False) -> Look:
    """How a way of training looks wherever it appears."""
    colour = names.method(method)
    line, marker = _LINES.get(names.engine(engine), ("solid", "circle"))
    return Look(colour if colour in COLOURS else UNKNOWN, line, marker, faint)


def step(number: int, of: int) -> Look:
    """How the value `number` of an ordered quantity looks, which has `of` of them."""
    place = round(number * (len(STEPS) - 1) / max(of - 1, 1))
    return Look(STEPS[min(place, len(STEPS) - 1)])


IDEAL = Look("ideal", "dash", "none")
