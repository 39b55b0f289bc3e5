"""Faults are planted, and the suite must see each of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .faults import FAULTS, Fault
from .subjects import Subject
from .suite import Conformance


def suite_on(engine: str) -> type[Conformance]:
    """The suite on ``make_private``."""
    if engine == "torch":
        from .test_torch import TestMakePrivate
    else:
        pytest.importorskip("jax")
        from .test_jax import TestMakePrivate
    return TestMakePrivate


def anew(suite: type[Conformance], subject: Subject | None = None) -> Conformance:
    """The suite with nothing done yet."""
    return type("Anew", (suite,), {"subject": subject or suite.subject})()


def sees(test: Callable[[], None]) -> bool:
    try:
        test()
    except AssertionError:
        return True
    return False


CASES = [
    pytest.param(fault, engine, id=f"{fault.name}-{engine}")
    for fault in FAULTS.values()
    for engine in fault.engines
]


def test_there_are_at_least_twenty_faults():
    assert len(FAULTS) >= 20 and all(fault.caught_by for fault in FAULTS.values())


@pytest.mark.parametrize(("fault", "engine"), CASES)
def test_each_is_caught(fault: Fault, engine: str):
    suite = anew(suite_on(engine))
    with fault.planted(engine):
        for name in fault.caught_by:
            assert sees(getattr(suite, name)), f"{fault.what}, and {name} does not see it."


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "engine"), CASES)
def test_each_is_caught_in_a_run_of_the_command_too(fault: Fault, engine: str, record_property):
    """On the whole suite, and what of it sees the fault; tests of an engine's parts are not about runs."""
    from .training_subjects import Training

    suite = anew(Conformance, Training(engine))
    tests = [name for name in dir(suite) if name.startswith("test_")]
    with fault.planted(engine):
        seen = [name for name in tests if sees(getattr(suite, name))]
    record_property("seen_by", " ".join(seen))
    assert seen or fault.name in ("nan-spreads", "mixing-is-not-seen", "anything-is-released")
