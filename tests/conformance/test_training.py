"""The suite on runs from configuration to run folder."""

from __future__ import annotations

import pytest

from .suite import Conformance
from .training_subjects import Training


class TestTorch(Conformance):
    subject = Training("torch")


@pytest.mark.slow
class TestHardened(Conformance):
    subject = Training("torch", hardened=True)


@pytest.mark.slow
class TestJax(Conformance):
    subject = Training("jax")

    @pytest.fixture(autouse=True)
    def needs_jax(self) -> None:
        pytest.importorskip("jax")
