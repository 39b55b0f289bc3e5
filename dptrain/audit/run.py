"""From an audit to its record."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from dptrain.audit import final_model, one_run, white_box
from dptrain.audit.bounds import Evidence
from dptrain.audit.canaries import Game
from dptrain.audit.finding import Finding
from dptrain.audit.profile import Noises
from dptrain.audit.record import AuditRecord
from dptrain.audit.scenes import SCENES
from dptrain.audit.spec import Audit
from dptrain.audit.subjects import ENGINES, Training, for_batches_of, subject
from dptrain.bench.environment import Quiet, environment
from dptrain.bench.peers import PEERS
from dptrain.bench.processes import attempt
from dptrain.core.mechanism import Mechanism

#: hears of (done, of so many)
Progress = Callable[[int, int], None]
#: how often our engines are asked to use a layer in one forward pass; few libraries do that at all
REPEATS = 4
_POINTS = 60
_Seen = tuple[list[Evidence], list[Finding]]


def run(audit: Audit, progress: Progress = lambda done, of: None) -> AuditRecord:
    """Audit, in this process.

    Raises:
        ValueError: a mechanism that there is not; nothing was trained then.
    """
    mechanism = audit.mechanism()
    started = time.perf_counter()
    with Quiet() as quiet, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        outcome = attempt(results_of, audit, mechanism, progress)
    found = environment(audit.device)
    if audit.engine in PEERS:
        found["versions"] |= PEERS[audit.engine].versions()
    return AuditRecord(
        audit,
        outcome.status,
        outcome.sentence,
        outcome.traceback,
        time.perf_counter() - started,
        found,
        quiet.record(),
        outcome.value or {},
        tuple(sorted({str(w.message).split("\n")[0][:300] for w in warned})),
    )


def results_of(audit: Audit, mechanism: Mechanism, progress: Progress) -> dict[str, Any]:
    """Train, look on, and bound.

    Raises:
        Unsupported: the subject is not here, or refuses the model.
    """
    look = _on_many_runs if audit.kind == "final-model" else _on_one_run
    evidence, findings = look(audit, mechanism, progress)
    return {
        "epsilon": max(finding.epsilon for finding in findings),
        "findings": [finding.to_dict() for finding in findings],
        "mechanism": mechanism.to_dict(),
        "trade_off": _trade_off(evidence[0]),
    }


def _on_one_run(audit: Audit, mechanism: Mechanism, progress: Progress) -> _Seen:
    repeats = REPEATS if audit.engine in ENGINES else 1
    game = Game(audit.canaries or 0, audit.clip_norm, audit.key, repeats)
    mechanism = for_batches_of(mechanism, mechanism.sample_rate * game.size)
    how = Training(mechanism, 1.0, audit.physical_batch_size, audit.device)
    watched = white_box.watch(subject(audit.engine, audit.method), game, how, progress)
    noises = Noises(mechanism)
    if audit.kind == "white-box":
        return watched.evidence, white_box.findings(watched.evidence, noises, audit.delta, audit.significance)
    evidence = [*watched.evidence, watched.final_weights]
    return evidence, one_run.findings(evidence, noises, audit.delta, audit.significance)


def _on_many_runs(audit: Audit, stated: Mechanism, progress: Progress) -> _Seen:
    scenes = [(name, SCENES[name]) for name in audit.scenes]
    rates = {scene.sample_rate or audit.sample_rate for _, scene in scenes}
    mechanisms = {
        rate: stated if rate == stated.sample_rate else audit.mechanism(rate) for rate in sorted(rates)
    }
    noises = {rate: Noises(mechanism) for rate, mechanism in mechanisms.items()}
    evidence: list[Evidence] = []
    found: list[Finding] = []
    for number, (name, scene) in enumerate(scenes):
        rate = scene.sample_rate or audit.sample_rate
        seen = final_model.watch(
            subject(audit.engine, audit.method),
            scene,
            name,
            audit.runs or 0,
            mechanisms[rate],
            audit.key.child(name),
            lambda done, of, number=number: progress(number * of + done, len(scenes) * of),
            audit.device,
        )
        evidence += seen
        found += white_box.findings(seen, noises[rate], audit.delta, audit.significance / len(scenes))
    return evidence, found


def _trade_off(evidence: Evidence) -> dict[str, Any]:
    """Error rates as they were seen, without a margin, at some thresholds."""
    absent, present = evidence.sorted_by_truth()
    if not len(absent) or not len(present):
        return {"adversary": evidence.adversary, "false_positive_rate": [], "false_negative_rate": []}
    ranks = np.unique(np.geomspace(1, len(absent), _POINTS).astype(int))
    thresholds = absent[-ranks]
    missed = np.searchsorted(present, thresholds, side="right") / len(present)
    return {
        "adversary": evidence.adversary,
        "false_positive_rate": ((ranks - 1) / len(absent)).tolist(),
        "false_negative_rate": missed.tolist(),
    }
