"""`dptrain audit`."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from dptrain.audit import KINDS, Audit, AuditRecord
from dptrain.audit.scenes import SCENES
from dptrain.audit.spec import Kind
from dptrain.audit.subjects import ENGINES
from dptrain.bench.peers import PEERS
from dptrain.bench.record import Records
from dptrain.cli.audit_display import show_records, show_what_it_does, watched
from dptrain.cli.errors import BAD_INPUT_ERRORS

__all__ = ["BAD_INPUT_ERRORS", "run"]

REFUTED_OR_FAILED = 1


def run(arguments: Sequence[str]) -> int:
    """Audit. Returns 1 if a claim was refuted, or an audit ended in an error."""
    return tyro.cli(
        _audit, prog="dptrain audit", args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,)
    )


def _audit(
    *,
    kind: tuple[Kind, ...] = ("white-box",),
    engine: tuple[str, ...] = (),
    method: tuple[str, ...] = ("auto",),
    peer: tuple[str, ...] = (),
    epsilon: float = 4.0,
    delta: float = 1e-5,
    steps: int = 10,
    sample_rate: float = 0.5,
    clip_norm: float = 4.0,
    canaries: int | None = None,
    runs: int | None = None,
    scene: tuple[str, ...] = tuple(SCENES),
    confidence: float = 0.95,
    physical_batch_size: int = 256,
    device: str = "cpu",
    seed: int | None = None,
    out: Path = Path("audit"),
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Attack ways of training, and bound epsilon from below by what the attacks find out.

    The noise is calibrated to a claim, (epsilon, delta), and an adversary looks for more than that. A bound
    above the claim refutes it: the implementation is broken, and the command ends with exit code 1. A bound
    below it proves nothing, but the closer it is the less can be hidden between the two.

    Args:
        kind: white-box: one run with thousands of canaries, an adversary who sees every noisy gradient.
            one-run: the same, with bounds that suppose nothing but fair coins. final-model: many short
            trainings with and without one canary, told apart by their last weights.
        engine: torch, jax; torch where no peer is named.
        method: Clipping methods of the engines, by any of their names.
        peer: Other libraries, each perhaps with a mode: opacus opacus:ghost jax-privacy fastdp.
        epsilon: What is claimed.
        delta: The other half of the claim.
        steps: Of each training.
        sample_rate: Probability with which each example takes part in a step.
        clip_norm: Of each example's gradient.
        canaries: Of white-box (100,000 by default) and one-run (20,000).
        runs: Of final-model: trainings in each scene (400 by default).
        scene: Of final-model: whom the canary is with.
        confidence: Of each audit, all of its bounds together.
        physical_batch_size: Examples computed at once.
        device: cpu, cuda, cuda:1.
        seed: Of coins and data; a new one by default. The noise has entropy of its own.
        out: The folder for records and the figure.
        as_json: Print the records as JSON, and all else on the error stream.
    """
    seed = secrets.randbits(32) if seed is None else seed
    audits = [
        Audit(
            kind=one,
            engine=who,
            method=how,
            epsilon=epsilon,
            delta=delta,
            steps=steps,
            sample_rate=sample_rate,
            clip_norm=clip_norm,
            canaries=canaries,
            runs=runs,
            scenes=scene,
            confidence=confidence,
            physical_batch_size=physical_batch_size,
            device=device,
            seed=seed,
        )
        for one in kind
        for who, how in _subjects(engine, method, peer)
    ]
    audits[0].mechanism()  # bad numbers are found before anything is trained
    errors = Console(stderr=True, soft_wrap=True)
    console = errors if as_json else Console()
    show_what_it_does(console, audits)
    store = Records(out)
    records = []
    for record in watched(console, audits):
        store.put(record)
        records.append(record)
    figures = _draw(records, out)
    show_records(console, records)
    console.print(f"records: {out / 'records'}", *figures, sep="\n", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps([record.to_dict() for record in records], indent=1))
    for record in records:
        if record.status == "error":
            errors.print(f"[bold red]error:[/] {record.case.subject}: {record.sentence}", highlight=False)
        elif record.refuted:
            errors.print(f"[bold red]refuted:[/] {verdict(record)}", highlight=False)
    return REFUTED_OR_FAILED if any(r.refuted or r.status == "error" for r in records) else 0


def verdict(record: AuditRecord) -> str:
    """One sentence on a claim that does not hold."""
    audit = record.case
    return (
        f"{audit.subject} is not ({audit.epsilon:g}, {audit.delta:g})-differentially private: with "
        f"{100 * audit.confidence:g} % confidence its epsilon is at least {record.epsilon:.2f} "
        f"({record.best['bound']}; {record.best['adversary']})."
    )


def _subjects(engines: Sequence[str], methods: Sequence[str], peers: Sequence[str]) -> list[tuple[str, str]]:
    """(engine, method) of all."""
    if unknown := [name for name in engines if name not in ENGINES]:
        raise ValueError(
            f"there is no engine {unknown[0]!r}; choose from {', '.join(ENGINES)}, and give other libraries "
            "by --peer."
        )
    own = engines or (() if peers else ("torch",))
    found = [(engine, method) for engine in own for method in methods]
    for text in peers:
        name, _, mode = text.partition(":")
        if name not in PEERS:
            raise ValueError(f"there is no peer {name!r}; choose from {', '.join(PEERS)}.")
        found.append((name, PEERS[name].mode(mode or next(iter(PEERS[name].methods)))))
    return list(dict.fromkeys(found))


def _draw(records: Sequence[AuditRecord], out: Path) -> list[str]:
    """A figure for each kind, and where it is."""
    from dptrain.audit.figure import draw

    made = []
    for kind in KINDS:
        of_kind = [record for record in records if record.case.kind == kind and record.status == "ok"]
        if of_kind:
            path = out / "figures" / f"{of_kind[0].case.id}.png"
            draw(of_kind, path)
            made.append(f"figure: {path}")
    return made
