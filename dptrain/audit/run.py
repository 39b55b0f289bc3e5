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
from dptrain.audit.subjects import ENGINES, Training, subject
from dptrain.bench.environment import Quiet, environment
from dptrain.bench.peers import PEERS
from dptrain.bench.processes import attempt
from dptrain.core.mechanism import Mechanism

#: hears of (done, of so many)
Progress = Callable[[int, int], None]
#: how often our engines are asked to use a layer in one forward pass; few libraries do that at all
REPEATS = 4
_POINTS = 60


def run(audit: Audit, progress: Progress = lambda done, of: None) -> AuditRecord:
    """Audit, in this process.

    Raises:
        ValueError: a mechanism that there is not; nothing was trained then.
    """
    audit.mechanism(1.0)
    started = time.perf_counter()
    with Quiet() as quiet, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        outcome = attempt(results_of, audit, progress)
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


def results_of(audit: Audit, progress: Progress) -> dict[str, Any]:
    """Train, look on, and bound.

    Raises:
        Unsupported: the subject is not here, or refuses the model.
    """
    ways = {"white-box": _in_one_run, "one-run": _in_one_run, "final-model": _in_many_runs}
    mechanism, evidence, findings = ways[audit.kind](audit, progress)
    epsilon = max(finding.epsilon for finding in findings)
    return {
        "epsilon": epsilon,
        "claimed": epsilon <= audit.epsilon,
        "findings": [finding.to_dict() for finding in findings],
        "mechanism": mechanism.to_dict(),
        "trade_off": _trade_off(evidence),
    }


def _in_one_run(audit: Audit, progress: Progress) -> tuple[Mechanism, Evidence, list[Finding]]:
    repeats = REPEATS if audit.engine in ENGINES else 1
    game = Game(audit.canaries or 0, audit.clip_norm, audit.key, repeats)
    mechanism = audit.mechanism(audit.sample_rate * game.size)
    how = Training(mechanism, 1.0, audit.physical_batch_size, audit.device)
    watched = white_box.watch(subject(audit.engine, audit.method), game, how, progress)
    noises = Noises(mechanism)
    if audit.kind == "white-box":
        found = white_box.findings(watched.evidence, noises, audit.delta, audit.significance)
    else:
        everything = [*watched.evidence, watched.final_weights]
        found = one_run.findings(everything, noises, audit.delta, audit.significance)
    return mechanism, watched.evidence[0], found


def _in_many_runs(audit: Audit, progress: Progress) -> tuple[Mechanism, Evidence, list[Finding]]:
    runs, scenes = (audit.runs or 0) // len(audit.scenes), len(audit.scenes)
    found: list[Finding] = []
    seen: list[tuple[Mechanism, Evidence]] = []
    for number, name in enumerate(audit.scenes):
        scene = SCENES[name]
        rate = audit.sample_rate if scene.sample_rate is None else scene.sample_rate
        mechanism = audit.mechanism(final_model.expected_batch_size(scene, audit.clip_norm, rate), rate)
        evidence = final_model.watch(
            subject(audit.engine, audit.method),
            scene,
            name,
            runs,
            mechanism,
            audit.key.child(name),
            lambda done, of, number=number: progress(number * of + done, scenes * of),
            audit.device,
        )
        found += white_box.findings(evidence, Noises(mechanism), audit.delta, audit.significance / scenes)
        seen.append((mechanism, evidence[0]))
    return *seen[0], found


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
