"""ε, σ or the number of steps from the other two: what ``dptrain privacy`` answers."""

import math
from dataclasses import dataclass

from dptrain.core import checks
from dptrain.core.accounting import ADD_OR_REMOVE_ONE, PLD
from dptrain.core.mechanism import Mechanism
from dptrain.core.spec import POISSON


@dataclass(frozen=True)
class Budget:
    """The answer.

    Attributes:
        mechanism: with every quantity filled in.
        epsilon: ε of the whole mechanism, at its δ.
        solved: which of ``epsilon``, ``noise_multiplier`` and ``steps`` was asked for.
        epochs: the expected number of times that an example is used, q · steps.
        accountant: ``pld`` or ``rdp``.
    """

    mechanism: Mechanism
    epsilon: float
    solved: str
    epochs: float
    accountant: str

    def describe(self) -> dict[str, str]:
        """Every quantity of the guarantee, ready to print, in reading order."""
        return self.mechanism.describe(self.accountant)


def solve(
    *,
    delta: float,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    sample_rate: float | None = None,
    expected_batch_size: float | None = None,
    dataset_size: int | None = None,
    clip_norm: float = 1.0,
    sampler: str = POISSON,
    accountant: str = PLD,
    neighbours: str = ADD_OR_REMOVE_ONE,
    max_batch_size: int | None = None,
) -> Budget:
    """Fill in the one of ε, σ and the number of steps that is not given.

    Give exactly two of `epsilon`, `noise_multiplier` and the length of the training; and
    either `sample_rate`, or `expected_batch_size` with `dataset_size`.

    Args:
        delta: δ, strictly between 0 and 1.
        epsilon: the budget, above 0.
        noise_multiplier: σ, at least 0.
        steps: the length of the training in steps.
        epochs: or in expected passes over the data: ⌈epochs / q⌉ steps.
        sample_rate: q in (0, 1].
        expected_batch_size: L in examples; by default q · dataset_size. It does not
            influence ε.
        dataset_size: N in examples.
        clip_norm: C; it does not influence ε either.
        sampler, accountant, neighbours, max_batch_size: as for `Mechanism.calibrate`.

    Raises:
        TypeError, ValueError: too much, too little or contradictory is given, or a
            quantity is out of its range.
    """
    rate = _sample_rate(sample_rate, expected_batch_size, dataset_size)
    length = _steps(steps, epochs, rate)
    given = {"epsilon": epsilon, "noise_multiplier": noise_multiplier, "steps": length}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) != 1:
        raise ValueError(
            "give exactly two of epsilon, noise multiplier and steps (or epochs); "
            f"{3 - len(missing)} are given."
        )
    if expected_batch_size is None:
        # L plays no part in ε; one example stands in where the size is not known.
        expected_batch_size = rate * dataset_size if dataset_size else 1.0
    needs_size = sampler not in (POISSON, "shuffle-without-amplification")
    solved = missing[0]
    mechanism: Mechanism
    if epsilon is None:
        assert noise_multiplier is not None and length is not None
        mechanism = Mechanism.constant(
            noise_multiplier=noise_multiplier,
            steps=length,
            delta=delta,
            clip_norm=clip_norm,
            sample_rate=rate,
            expected_batch_size=expected_batch_size,
            sampler=sampler,
            neighbours=neighbours,
            dataset_size=dataset_size if needs_size else None,
            max_batch_size=max_batch_size,
        )
    elif noise_multiplier is None:
        assert length is not None
        mechanism = Mechanism.calibrate(
            epsilon=epsilon,
            steps=length,
            delta=delta,
            clip_norm=clip_norm,
            sample_rate=rate,
            expected_batch_size=expected_batch_size,
            sampler=sampler,
            accountant=accountant,
            neighbours=neighbours,
            dataset_size=dataset_size if needs_size else None,
            max_batch_size=max_batch_size,
        )
    else:
        mechanism = Mechanism.calibrate_steps(
            epsilon=epsilon,
            noise_multiplier=noise_multiplier,
            delta=delta,
            clip_norm=clip_norm,
            sample_rate=rate,
            expected_batch_size=expected_batch_size,
            sampler=sampler,
            accountant=accountant,
            neighbours=neighbours,
            dataset_size=dataset_size if needs_size else None,
            max_batch_size=max_batch_size,
        )
    return Budget(
        mechanism=mechanism,
        epsilon=mechanism.epsilon(accountant=accountant),
        solved=solved,
        epochs=rate * mechanism.steps,
        accountant=accountant,
    )


def _sample_rate(
    sample_rate: float | None, expected_batch_size: float | None, dataset_size: int | None
) -> float:
    if dataset_size is not None:
        dataset_size = checks.whole("dataset_size", dataset_size)
    if expected_batch_size is not None:
        expected_batch_size = checks.positive("expected_batch_size", expected_batch_size)
    implied = None
    if expected_batch_size is not None and dataset_size is not None:
        implied = expected_batch_size / dataset_size
    if sample_rate is None and implied is None:
        raise ValueError(
            "the sample rate is not known; give sample_rate, or expected_batch_size and dataset_size."
        )
    if sample_rate is None:
        return checks.probability("sample_rate", implied)
    sample_rate = checks.probability("sample_rate", sample_rate)
    if implied is not None and not math.isclose(sample_rate, implied, rel_tol=0.01):
        raise ValueError(
            f"sample_rate is {sample_rate}, but expected_batch_size over dataset_size is "
            f"{implied}; leave one of the three out."
        )
    return sample_rate


def _steps(steps: int | None, epochs: float | None, rate: float) -> int | None:
    if epochs is None:
        return None if steps is None else checks.whole("steps", steps)
    if steps is not None:
        raise ValueError("give either steps or epochs, not both.")
    return steps_in(epochs, rate)


def steps_in(epochs: float, sample_rate: float) -> int:
    """The number of steps, at least 1, in which `epochs` passes over the data are expected."""
    return max(1, round(checks.positive("epochs", epochs) / sample_rate))
