"""What the report says when it cannot be made."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class ReportError(ValueError):
    """A report cannot be made as asked. The message says what was wrong and what to do."""


@contextmanager
def told_of(what: str) -> Iterator[None]:
    """Whatever values of another kind than docs/records.md says bring about is one sentence.

    Raises:
        ReportError: naming `what`; the cause is attached.
    """
    try:
        yield
    except (ReportError, MemoryError):
        raise
    except Exception as error:
        raise ReportError(
            f"{what} cannot be shown, because records hold values of another kind than docs/records.md says "
            f"({type(error).__name__}); remove what was changed and measure it again."
        ) from error


def needs(library: str) -> Any:
    """A library of the extra ``report``, imported when it is needed.

    Raises:
        ReportError: it is not installed.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ReportError(
            f"The report needs {library}, which is not installed; pip install 'dptrain[report]'."
        ) from error
