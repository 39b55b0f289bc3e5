"""The audit alone catches seeded faults that raise ε by more than a factor of two, and no correct engine.

At a significance of 1e-6, so that neither direction flakes.
"""

from __future__ import annotations

import pytest

from dptrain.audit import Audit, run
from tests.conformance.faults import FAULTS

CONFIDENCE = 1 - 1e-6
#: of white-box audits: small, for what is looked for is large
WHITE_BOX = {"canaries": 4000, "steps": 4}
FINAL_MODEL = {"kind": "final-model", "runs": 200, "steps": 2}

BY_ITSELF = FINAL_MODEL | {"scenes": ("by itself",)}
AGAINST_ALL = FINAL_MODEL | {"scenes": ("against all, always sampled",)}
#: what moves the sum twice or thrice as far: to see that takes more trainings, and less noise
DISPLACING = FINAL_MODEL | {"epsilon": 8.0, "steps": 1}

#: fault: how it is audited
SHOWN: dict[str, dict] = {
    "no-noise": WHITE_BOX,
    "half-noise": WHITE_BOX,
    "noise-divided-twice": WHITE_BOX,
    "noise-for-another-clip-norm": WHITE_BOX,
    "repeated-noise": WHITE_BOX,
    "same-noise-for-all-parameters": WHITE_BOX,
    "noise-in-bfloat16": WHITE_BOX,
    "noise-only-where-a-gradient-is": BY_ITSELF,
    "empty-batch-skipped": BY_ITSELF,
    "noise-on-the-mean": DISPLACING | {"scenes": ("against all, always sampled",), "runs": 800},
    "divided-by-the-realised-batch": AGAINST_ALL,
    "divided-by-the-data-set": AGAINST_ALL,
    "constant-seed": BY_ITSELF,
    "fixed-size-as-poisson": DISPLACING | {"scenes": ("against all",), "runs": 1500},
    "same-batch-every-step": WHITE_BOX | {"steps": 30, "sample_rate": 0.1},
    "fewer-steps-accounted": WHITE_BOX,
    "larger-noise-accounted": WHITE_BOX,
    "twice-the-clip-norm": WHITE_BOX,
    "norm-without-a-layer": WHITE_BOX,
    "norm-without-cross-terms": WHITE_BOX | {"canaries": 20_000},  # a quarter of them show it
    "clipped-by-layer": WHITE_BOX,
    "clipped-as-a-group": WHITE_BOX,
    "nan-spreads": FINAL_MODEL | {"scenes": ("not a number",)},
    "mask-ignored": BY_ITSELF,
    "forgets-earlier-parts": AGAINST_ALL,
    "counts-the-first-part-twice": DISPLACING | {"scenes": ("against all, always sampled",), "runs": 600},
}
#: raise ε by more than twofold somewhere, but not in a training that an audit can hold
NOT_SHOWN = {
    "truncated-to-the-buffer": "others' sampling hides most of it at the sample rates that can be audited.",
    "mixing-is-not-seen": "only models that a correct engine refuses show it.",
    "anything-is-released": "only code that passes such a sum shows it.",
}
#: in every run of the tests; the others are slow. Both engines share what is planted in the core
OFTEN = {
    "torch": (
        "no-noise",
        "half-noise",
        "repeated-noise",
        "twice-the-clip-norm",
        "nan-spreads",
        "mask-ignored",
    ),
    "jax": ("half-noise", "norm-without-a-layer"),
}


def cases():
    for engine in ("torch", "jax"):
        for name in SHOWN:
            if engine in FAULTS[name].engines:
                marks = [] if name in OFTEN[engine] else [pytest.mark.slow]
                yield pytest.param(engine, name, id=f"{engine}-{name}", marks=marks)


@pytest.mark.parametrize(("engine", "name"), list(cases()))
def test_a_fault_is_caught(engine, name):
    pytest.importorskip(engine)
    audit = Audit(engine=engine, method="per-example", confidence=CONFIDENCE, seed=1, **SHOWN[name])
    with FAULTS[name].planted(engine):
        record = run(audit)
    assert record.status == "ok", record.traceback
    assert record.refuted, record.results["findings"]


@pytest.mark.parametrize("engine", ["torch", "jax"])
@pytest.mark.parametrize(
    "how",
    [
        pytest.param(WHITE_BOX, id="white-box"),
        pytest.param(WHITE_BOX | {"kind": "one-run"}, id="one-run", marks=pytest.mark.slow),
        pytest.param(BY_ITSELF, id="by itself", marks=pytest.mark.slow),
        pytest.param(AGAINST_ALL, id="against all", marks=pytest.mark.slow),
        pytest.param(
            FINAL_MODEL | {"scenes": ("among many", "not a number")}, id="others", marks=pytest.mark.slow
        ),
    ],
)
def test_a_correct_engine_is_not_refuted(engine, how):
    pytest.importorskip(engine)
    record = run(Audit(engine=engine, method="per-example", confidence=CONFIDENCE, seed=1, **how))
    assert record.status == "ok", record.traceback
    assert not record.refuted
    assert len(record.results["findings"]) >= 2


def test_every_fault_that_doubles_epsilon_is_here():
    doubling = {name for name, fault in FAULTS.items() if fault.epsilon_factor > 2}
    assert doubling == SHOWN.keys() | NOT_SHOWN.keys()
