"""Faults are planted, and the suite must see each of them."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import numpy as np
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


EVERY = [(fault, engine) for fault in FAULTS.values() for engine in fault.engines]


def named(cases: list[tuple[Fault, str]]) -> pytest.MarkDecorator:
    ids = [f"{fault.name}-{engine}" for fault, engine in cases]
    return pytest.mark.parametrize(("fault", "engine"), cases, ids=ids)


def test_there_are_at_least_twenty_faults():
    assert len(FAULTS) >= 20 and all(fault.caught_by for fault in FAULTS.values())


@named([(fault, engine) for fault, engine in EVERY if not (fault.is_shared and engine == "jax")])
def test_each_is_caught(fault: Fault, engine: str):
    check(fault, engine)


@pytest.mark.slow
@named([(fault, engine) for fault, engine in EVERY if fault.is_shared and engine == "jax"])
def test_what_both_engines_share_is_caught_on_the_other_too(fault: Fault, engine: str):
    check(fault, engine)


def check(fault: Fault, engine: str) -> None:
    suite = anew(suite_on(engine))
    with fault.planted(engine):
        for name in fault.caught_by:
            assert sees(getattr(suite, name)), f"{fault.what}, and {name} does not see it."


@pytest.mark.parametrize("name", ["twice-the-clip-norm", "norm-without-a-layer"])
def test_the_rehearsal_refuses_grossly_wrong_norms_before_the_first_step(name: str):
    """Planting silences it; here it is heard again."""
    import dptrain.torch as dpt
    from dptrain.torch.rehearsal import rehearse

    from .torch_subjects import TorchLoop

    subject = TorchLoop()
    with FAULTS[name].planted("torch"), mock.patch("dptrain.torch.clipping.rehearse", rehearse):
        clipped = subject.clipped(subject.problem(), 1.0)
        with pytest.raises(dpt.Refused, match="please report this model"):
            clipped(np.ones(24, bool))


#: what a folder of images or the configuration of a run cannot bring about
BEYOND_A_RUN = ("nan-spreads", "mixing-is-not-seen", "anything-is-released", "norm-without-cross-terms")


@pytest.mark.slow
@named(EVERY)
def test_each_is_caught_in_a_run_of_the_command_too(fault: Fault, engine: str):
    from .training_subjects import Training

    suite = anew(Conformance, Training(engine))
    tests = [name for name in dir(suite) if name.startswith("test_")]
    with fault.planted(engine):
        seen = [name for name in tests if sees(getattr(suite, name))]
    print(f"{fault.name} on {engine}: {', '.join(seen) or 'not seen'}")
    assert bool(seen) != (fault.name in BEYOND_A_RUN)
