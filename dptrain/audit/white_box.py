"""One run, thousands of canaries, and an adversary who sees every noisy gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dptrain.audit.adversaries import Watching
from dptrain.audit.bounds import Evidence, epsilon_of_rates, error_rates, shares
from dptrain.audit.canaries import Game
from dptrain.audit.finding import Finding
from dptrain.audit.profile import Noises
from dptrain.audit.subjects import Subject, Training

COUNTED = "error rates"
NOISE = "noise"
INDEPENDENT = "canaries' scores are independent of each other"
SUBSAMPLED_GAUSSIAN = "the mechanism is the stated one, but for the amount of its noise"


@dataclass(frozen=True)
class Watched:
    """What came of one run."""

    evidence: list[Evidence]
    final_weights: Evidence


def watch(subject: Subject, game: Game, how: Training, progress: Callable[[int, int], None]) -> Watched:
    """Train once and look on.

    Args:
        progress: hears of ``(steps done, steps)``.

    Raises:
        Unsupported: the subject is not here, or refuses the model.
    """
    watching = Watching(game, how.mechanism)
    trajectory = subject.train(game, how)
    before = next(trajectory)
    for step, after in enumerate(trajectory):
        divisor = how.mechanism.step(step).expected_batch_size / how.learning_rate
        watching.see(game.observed({name: divisor * (before[name] - after[name]) for name in after}))
        before = after
        progress(step + 1, how.mechanism.steps)
    return Watched(watching.evidence(), watching.of_final_weights())


def findings(evidence: list[Evidence], noises: Noises, delta: float, significance: float) -> list[Finding]:
    """Bounds from error rates, all of them together wrong with probability `significance` at most.

    A bound from error rates at δ holds for any mechanism. That on the noise (after Nasr et al. 2023, "Tight
    auditing of differentially private machine learning", arXiv 2302.07956, who do it for a Gaussian
    mechanism) asks for which noise multipliers the error rates contradict the whole profile δ(ε) of the
    stated mechanism, and gives the ε of the largest that is left.
    """
    found = []
    for one, each in zip(evidence, shares(significance, len(evidence))):
        rates = error_rates(one, each)
        scale, epsilon = noises.bound(lambda profile, rates=rates: profile.refuted_by(rates), delta)
        found.append(Finding(COUNTED, one.adversary, epsilon_of_rates(rates, delta), (INDEPENDENT,)))
        found.append(Finding(NOISE, one.adversary, epsilon, (INDEPENDENT, SUBSAMPLED_GAUSSIAN), scale))
    return found
