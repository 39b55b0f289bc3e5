"""Measuring: a case, a process of its own, an immutable record."""

from dptrain.bench.case import MEASURES, Case, grid
from dptrain.bench.record import Record, Records

__all__ = ["MEASURES", "Case", "Record", "Records", "grid"]
