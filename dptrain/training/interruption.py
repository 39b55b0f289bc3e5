"""Signals that end a run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def termination_as_interruption() -> Iterator[None]:
    """Within, SIGTERM, which batch systems and torchrun send before they kill, ends a run as Ctrl-C does."""
    with _handled(signal.default_int_handler, signal.SIGTERM):
        yield


@contextmanager
def undisturbed(*, but_by_hand: bool = False) -> Iterator[None]:
    """Within, a run that is ending already is not ended again, unless it is killed.

    but_by_hand: a further Ctrl-C does end it.
    """
    with _handled(signal.SIG_IGN, signal.SIGTERM, *([] if but_by_hand else [signal.SIGINT])):
        yield


@contextmanager
def _handled(how: Any, *signals: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python allows it nowhere else
        yield
        return
    before = {each: signal.signal(each, how) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
