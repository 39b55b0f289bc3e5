"""Is an engine's clipped gradient that of single examples, in float64?"""

from __future__ import annotations

import dataclasses
import time
import traceback
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .entry import Case, Entry

#: relative, in float64
TOLERANCE = 1e-9
BATCH_SIZE = 4


@dataclass(frozen=True)
class Answer:
    """What an engine returns: a clipped sum, perhaps norms, and the factor that it documents.

    ``stabiliser`` is added to the norm in ``min(1, C / (norm + stabiliser))``.
    """

    grads: dict[str, Tensor | None]
    norms: Tensor | None = None
    stabiliser: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """``exact``, ``refused`` (the engine says why), ``raises`` (anything else) or ``WRONG``."""

    model: str
    family: str
    verdict: str
    sentence: str = ""
    error_of_sum: float | None = None
    error_of_norms: float | None = None
    skipped: tuple[str, ...] = ()
    seconds: float = 0.0
    #: what the engine should have done, where that is not to be exact
    refusable: bool = False

    record = property(dataclasses.asdict)


class SingleExamples:
    """The oracle: ordinary autograd, one example at a time."""

    def __init__(self, case: Case, batch):
        parameters = {n: p for n, p in case.model.named_parameters() if p.requires_grad}
        size = len(tree_leaves(batch)[0])
        self.grads = []
        for b in range(size):
            case.loss_fn(case.model, tree_map(lambda t, b=b: t[b : b + 1], batch)).sum().backward()
            self.grads.append({n: p.grad for n, p in parameters.items() if p.grad is not None})
            case.model.zero_grad(set_to_none=True)
        self.zeros = {n: torch.zeros_like(p) for n, p in parameters.items()}
        self.norms = torch.stack([norm(grads) for grads in self.grads])

    def clipped_sum(self, clip_norm: float, stabiliser: float, without: tuple[str, ...]) -> dict[str, Tensor]:
        """As if the parameters in ``without`` were frozen."""
        total = {n: zeros.clone() for n, zeros in self.zeros.items() if n not in without}
        for grads in self.grads:
            kept = {n: g for n, g in grads.items() if n in total}
            factor = min(1.0, clip_norm / (float(norm(kept)) + stabiliser))
            for name, g in kept.items():
                total[name] += factor * g
        return total


def norm(grads: dict[str, Tensor]) -> Tensor:
    return sum((g.square().sum() for g in grads.values()), torch.zeros((), dtype=torch.float64)).sqrt()


def judge(entry: Entry, engine, seed: int = 0) -> Verdict:
    """Half of the examples clipped; whatever goes wrong on the way is a verdict."""
    start = time.perf_counter()
    case = entry.build(seed)
    try:
        found = _judged(engine.prepare(case), engine, entry.refusable)
    except Exception as error:
        kind = "refused" if engine.is_refusal(error) else "raises"
        found = {"verdict": kind, "sentence": sentence(error)}
    seconds = round(time.perf_counter() - start, 2)
    return Verdict(entry.name, entry.family, **found, seconds=seconds, refusable=entry.refusable)


def _judged(case: Case, engine, refusable: bool) -> dict:
    batch = case.make_batch(BATCH_SIZE)
    if refusable:  # there is nothing to compare with: an example's gradient is not its own
        engine.clipped_sum(case, batch, 1.0)
        return {"verdict": "WRONG", "sentence": "examples mix, and a gradient is returned all the same"}
    oracle = SingleExamples(case, batch)
    clip_norm = float(oracle.norms.median())
    return compare(engine.clipped_sum(case, batch, clip_norm), oracle, clip_norm, engine.tolerance)


def compare(answer: Answer, oracle: SingleExamples, clip_norm: float, tolerance: float) -> dict:
    """Errors relative to each parameter's sum, or to a thousandth of the whole where that is more.

    Where parameters are left out, the others are compared as if those had been frozen.
    """
    skipped = tuple(n for n in oracle.zeros if answer.grads.get(n) is None)
    expected = oracle.clipped_sum(clip_norm, answer.stabiliser, skipped)
    errors = {}
    if expected:
        floor = 1e-3 * float(norm(expected))
        for name, want in expected.items():
            error = float((answer.grads[name] - want).norm()) / max(float(want.norm()), floor)
            errors[name] = error if error == error else float("inf")
    worst = max(errors, key=errors.__getitem__, default=None)
    of_sum = errors[worst] if worst else 0.0
    of_norms = None
    if answer.norms is not None:
        of_norms = float(((answer.norms - oracle.norms) / oracle.norms).abs().max())
    exact = of_sum < tolerance and (of_norms is None or of_norms < tolerance)
    parts = [f"skips {len(skipped)} of {len(oracle.zeros)} trainable parameters"] if skipped else []
    if not exact:
        parts.append(f"error {of_sum:.1e} at {worst}")
    return {
        "verdict": "exact" if exact and not skipped else "WRONG",
        "sentence": ", ".join(parts),
        "error_of_sum": of_sum,
        "error_of_norms": of_norms,
        "skipped": skipped,
    }


def sentence(error: Exception) -> str:
    """The first line of the error, with its place where the text alone says little."""
    text = str(error).strip().split("\n")[0]
    if not text or isinstance(error, (AssertionError, KeyError, AttributeError)):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{text} (in {frame.name})".strip()
    return f"{type(error).__name__}: {text}"[:400]
