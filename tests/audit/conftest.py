"""Audits draw samples and noise afresh; here a test draws the same at every run: none fails by chance."""

from __future__ import annotations

import itertools

import pytest

from dptrain.core.entropy import Key


@pytest.fixture(autouse=True)
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of the operating system's entropy: keys of a counter, of which no two are equal."""
    seeds = itertools.count()
    monkeypatch.setattr(Key, "from_entropy", classmethod(lambda cls: cls.from_seed(next(seeds))))
