"""What was measured on a machine, kept between runs, so that the next one plans the same at once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from dptrain.core import files

Consulted = dict[str, dict[str, float]]
"""Numbers by name, by the file that they are kept in."""

_recalled: ContextVar[Consulted | None] = ContextVar("recalled", default=None)


class Remembered:
    """Numbers by name, and the file that holds them.

    Attributes:
        known: all that has been measured; add to it and call `save`.
    """

    def __init__(self, path: Path | None, consulted: dict[str, float] | None = None):
        found = _read(path)
        self.known = found if consulted is None else _Noted(found | consulted, consulted)
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
    name = f"{kind}-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"
    recalled = _recalled.get()
    consulted = None if recalled is None else recalled.setdefault(name, {})
    folder = os.environ.get("DPTRAIN_CACHE")
    if folder == "":
        return Remembered(None, consulted)
    root = (
        Path(folder)
        if folder
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dptrain"
    )
    return Remembered(root / name, consulted)


@contextlib.contextmanager
def recalling(consulted: Consulted) -> Iterator[None]:
    """Within, what `consulted` holds is known, and all that is asked for is added to it.

    What is decided by measurements is decided the same way by whoever recalls them: a resumed run plans as
    it did before it was interrupted.
    """
    token = _recalled.set(consulted)
    try:
        yield
    finally:
        _recalled.reset(token)


class _Noted(dict[str, float]):
    """Numbers, and in ``consulted`` those that have been asked for."""

    def __init__(self, known: dict[str, float], consulted: dict[str, float]):
        super().__init__(known)
        self._consulted = consulted

    def __getitem__(self, name: str) -> float:
        value = self._consulted[name] = super().__getitem__(name)
        return value


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
