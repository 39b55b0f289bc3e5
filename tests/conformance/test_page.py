"""docs/conformance.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_on_the_page_exists():
    page = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 30
    missing = {name for name in named if f"def {name}(" not in sources}
    assert not missing
    held = set(re.findall(r"    def (test_\w+)\(", (ROOT / "tests/conformance/suite.py").read_text("utf-8")))
    assert held <= named, "a test of the suite that the page leaves out"
