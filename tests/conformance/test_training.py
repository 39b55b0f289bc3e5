"""The suite on runs from configuration to run folder."""

from __future__ import annotations

import pytest

from .suite import Conformance
from .training_subjects import Training


class TestTorch(Conformance):
    subject = Training("torch")


class TestJax(Conformance):
    subject = Training("jax")

    @pytest.fixture(autouse=True)
    def needs_jax(self) -> None:
        pytest.importorskip("jax")
