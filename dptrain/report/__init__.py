"""From records to pictures and pages. Nothing here trains or measures."""

from dptrain.report.curves import draw_curves

__all__ = ["draw_curves"]
