"""What was measured on a machine, kept between runs, so that the next one plans the same at once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dptrain.core import files


class Remembered:
    """Numbers by name, and the file that holds them.

    Attributes:
        known: all that has been measured; add to it and call `save`.
    """

    def __init__(self, path: Path | None):
        self.known: dict[str, float] = _read(path)
        self._path, self._saved = path, len(self.known)

    def save(self) -> None:
        """Write what is new, along with what other processes have written meanwhile."""
        if self._path is None or len(self.known) == self._saved:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            scratch = self._path.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps(_read(self._path) | self.known, indent=0, sort_keys=True))
            scratch.replace(self._path)
        self._saved = len(self.known)


def remembered(kind: str, machine: str) -> Remembered:
    """What is remembered of a kind of measurement for a machine and the versions on it.

    The file lies in ``$XDG_CACHE_HOME/dptrain`` (``~/.cache``); ``DPTRAIN_CACHE`` names another folder,
    or nothing to remember nothing.
    """
    folder = os.environ.get("DPTRAIN_CACHE")
    if folder == "":
        return Remembered(None)
    root = (
        Path(folder)
        if folder
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dptrain"
    )
    return Remembered(root / f"{kind}-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json")


def processor() -> str:
    """The processor's name, where the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return ""


def _read(path: Path | None) -> dict[str, float]:
    if path is None:
        return {}
    try:
        found = files.read_json(path)
    except files.Unreadable:
        return {}
    return {k: float(v) for k, v in found.items() if _is_time(v)} if isinstance(found, dict) else {}


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e300
