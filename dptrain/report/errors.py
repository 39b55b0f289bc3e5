"""What the report says when it cannot be made."""

from __future__ import annotations

import importlib
from typing import Any


class ReportError(ValueError):
    """A report cannot be made as asked. The message says what was wrong and what to do."""


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
