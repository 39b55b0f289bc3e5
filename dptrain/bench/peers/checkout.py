"""Libraries that no package index has: imported from a clone that an environment variable names."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType


def imported(package: str, variable: str) -> ModuleType:
    """A package, installed or from the folder that the environment variable names.

    Raises:
        ImportError: it is in neither place, or something that it imports is missing.
    """
    folder = os.environ.get(variable)
    if not folder:
        return importlib.import_module(package)
    sys.path.insert(0, folder)  # for this import alone: a clone's root holds more than the package
    try:
        return importlib.import_module(package)
    finally:
        sys.path.remove(folder)
