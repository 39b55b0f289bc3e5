"""The suite on JAX, where no example can see another: the loss is that of a single one."""

from __future__ import annotations

import pytest

pytest.importorskip("jax")

from .engine_suite import EngineConformance
from .jax_subjects import JaxLoop, JaxPrivate


class TestLoop(EngineConformance):
    subject = JaxLoop()


class TestMakePrivate(EngineConformance):
    subject = JaxPrivate()
