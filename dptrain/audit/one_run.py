"""Bounds from one run that suppose nothing but that the canaries' coins were fair and secret."""

from __future__ import annotations

from dptrain.audit.bounds import Evidence, Guesses, guesses, one_run_epsilon, shares
from dptrain.audit.finding import Finding
from dptrain.audit.profile import Noises, Profile
from dptrain.audit.white_box import SUBSAMPLED_GAUSSIAN

GUESSES = "guesses"
PROFILE = "guesses, whole profile"


def findings(evidence: list[Evidence], noises: Noises, delta: float, significance: float) -> list[Finding]:
    """Bounds from correct guesses, all of them together wrong with probability `significance` at most.

    The first of each adversary is that of Steinke, Nasr and Jagielski (arXiv 2305.08846), the second that of
    Mahloujifar, Melis and Chaudhuri (arXiv 2410.22235) with the profile of the stated mechanism, for the
    largest noise that is left.
    """
    found = []
    for one, share in zip(evidence, shares(significance, len(evidence))):
        made = guesses(one)
        each = share / 2 / len(made)

        def refuted(profile: Profile, made: list[Guesses] = made, each: float = each) -> bool:
            return any(profile.refuted_by_guesses(g, each) for g in made)

        epsilon = max(one_run_epsilon(g, delta, each) for g in made)
        found.append(Finding(GUESSES, one.adversary, epsilon))
        scale, epsilon = noises.bound(refuted, delta)
        found.append(Finding(PROFILE, one.adversary, epsilon, (SUBSAMPLED_GAUSSIAN,), scale))
    return found
