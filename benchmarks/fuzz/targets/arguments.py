"""What Python code may call dptrain with."""

from __future__ import annotations

from benchmarks.fuzz.target import Target

TARGETS: tuple[Target, ...] = ()
