"""The suite on JAX, where no example can see another: the loss is that of a single one."""

from __future__ import annotations

import pytest

pytest.importorskip("jax")

from .engine_suite import EngineConformance
from .jax_subjects import JaxLoop, JaxPrivate
from .suite import Conformance


@pytest.mark.slow
class TestLoop(EngineConformance):
    subject = JaxLoop()


class TestMakePrivate(EngineConformance):
    subject = JaxPrivate()


@pytest.mark.slow
class TestUnmasked(Conformance):
    subject = JaxPrivate(masked=False)


@pytest.mark.slow
class TestPerExampleLoop(Conformance):
    subject = JaxPrivate(method="per-example-loop")


@pytest.mark.slow
class TestPerExampleVmap(Conformance):
    subject = JaxPrivate(method="per-example-vmap")


@pytest.mark.slow
class TestGhost(Conformance):
    subject = JaxPrivate(method="ghost")


@pytest.mark.slow
class TestBookKeeping(Conformance):
    subject = JaxPrivate(method="bk-ghost")
