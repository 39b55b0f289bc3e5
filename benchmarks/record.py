"""Records of measurements that no command of dptrain takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def save(record: dict[str, Any], path: Path | None) -> None:
    """Write a record, if a path was given."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1, default=str) + "\n")


def command(module: str) -> str:
    """As it was given; of files and folders, whose place is nobody's business, only the names."""
    names = [Path(a).name if a.startswith(("/", "~")) else a for a in sys.argv[1:]]
    return f"python -m {module} " + " ".join(names)
