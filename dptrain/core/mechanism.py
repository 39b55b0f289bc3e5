"""`Mechanism`: the one description that clipping, noise, sampling and accounting read."""

import bisect
import dataclasses
import importlib.metadata
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import dp_accounting

from dptrain.core import accounting, calibration, checks, grid
from dptrain.core.accounting import ADD_OR_REMOVE_ONE, PLD, RDP, Segments
from dptrain.core.clip_rules import ClipRule, Quantile
from dptrain.core.spec import POISSON, StepSpec, flat_step

_FORMAT = 1


@dataclass(frozen=True)
class Mechanism:
    """A sequence of noisy steps and the sense in which they are private.

    Most mechanisms are constant: make them with `calibrate`, `constant` or
    `calibrate_steps`. A schedule is several segments.

    Attributes:
        segments: runs of equal steps, in order: (specification, how many times).
        neighbours: the neighbouring relation: ``add-or-remove-one`` (the default),
            ``replace-one`` or ``replace-special`` (an example becomes the zero record).
        delta: the δ that ε is reported at, or None where none was chosen.

    Raises:
        TypeError, ValueError: a quantity is out of its range, or a sampler cannot be
            accounted under the relation.
    """

    segments: Segments
    neighbours: str = ADD_OR_REMOVE_ONE
    delta: float | None = None

    def __post_init__(self) -> None:
        runs = []
        for run in self.segments:
            spec, count = run
            if not isinstance(spec, StepSpec):
                raise TypeError(f"each segment must hold a StepSpec, but one holds {spec!r}.")
            runs.append((spec, checks.whole("steps", count)))
        if not runs:
            raise ValueError("a mechanism needs at least one step; give one.")
        object.__setattr__(self, "segments", accounting.merge(runs))
        if self.delta is not None:
            object.__setattr__(self, "delta", checks.delta(self.delta))
        accounting.check_supported(self.segments, self.neighbours)

    # Making one

    @classmethod
    def constant(
        cls,
        *,
        noise_multiplier: float,
        clip_norm: float | ClipRule,
        sample_rate: float,
        steps: int,
        expected_batch_size: float,
        delta: float | None = None,
        sampler: str = POISSON,
        neighbours: str = ADD_OR_REMOVE_ONE,
        dataset_size: int | None = None,
        max_batch_size: int | None = None,
    ) -> "Mechanism":
        """`steps` equal steps of flat clipping and Gaussian noise.

        Args:
            noise_multiplier: σ ≥ 0, the noise's standard deviation over C; 0 is not
                private, and its ε is infinite.
            clip_norm: C > 0, the largest norm of an example's gradient in the sum; or a rule of
                `dptrain.core.clip_rules`.
            sample_rate: q in (0, 1].
            steps: the number of optimizer steps.
            expected_batch_size: L > 0, the public divisor of the sum, in examples.
            delta: δ in (0, 1).
            sampler: see `dptrain.core.spec.Sampling`, also for the last two.
            neighbours: the neighbouring relation.
        """
        step = flat_step(
            noise_multiplier=noise_multiplier,
            clip_norm=clip_norm,
            sample_rate=sample_rate,
            expected_batch_size=expected_batch_size,
            sampler=sampler,
            dataset_size=dataset_size,
            max_batch_size=max_batch_size,
        )
        return cls(((step, steps),), neighbours, delta)

    @classmethod
    def calibrate(
        cls,
        *,
        epsilon: float,
        delta: float,
        sample_rate: float,
        steps: int,
        clip_norm: float | ClipRule,
        expected_batch_size: float,
        sampler: str = POISSON,
        accountant: str = PLD,
        neighbours: str = ADD_OR_REMOVE_ONE,
        dataset_size: int | None = None,
        max_batch_size: int | None = None,
    ) -> "Mechanism":
        """The constant mechanism with the smallest σ that costs at most `epsilon`.

        The budget is met according to `accountant`; the others are as for `constant`.

        Raises:
            ValueError: no noise multiplier meets the budget, or a bad argument.
        """

        def step_with(sigma: float) -> StepSpec:
            return flat_step(
                noise_multiplier=sigma,
                clip_norm=clip_norm,
                sample_rate=sample_rate,
                expected_batch_size=expected_batch_size,
                sampler=sampler,
                dataset_size=dataset_size,
                max_batch_size=max_batch_size,
            )

        sigma = calibration.smallest_noise_multiplier(
            step_with,
            steps=steps,
            epsilon=epsilon,
            delta=delta,
            neighbours=neighbours,
            accountant=accountant,
        )
        return cls(((step_with(sigma), steps),), neighbours, delta)

    @classmethod
    def calibrate_steps(
        cls,
        *,
        epsilon: float,
        delta: float,
        noise_multiplier: float,
        sample_rate: float,
        clip_norm: float | ClipRule,
        expected_batch_size: float,
        sampler: str = POISSON,
        accountant: str = PLD,
        neighbours: str = ADD_OR_REMOVE_ONE,
        dataset_size: int | None = None,
        max_batch_size: int | None = None,
    ) -> "Mechanism":
        """The constant mechanism with the most steps that cost at most `epsilon`.

        Raises:
            ValueError: one step alone costs more, or a bad argument.
        """
        step = flat_step(
            noise_multiplier=noise_multiplier,
            clip_norm=clip_norm,
            sample_rate=sample_rate,
            expected_batch_size=expected_batch_size,
            sampler=sampler,
            dataset_size=dataset_size,
            max_batch_size=max_batch_size,
        )
        steps = calibration.most_steps(
            step, epsilon=epsilon, delta=delta, neighbours=neighbours, accountant=accountant
        )
        return cls(((step, steps),), neighbours, delta)

    def hardened(self) -> "Mechanism":
        """The same mechanism with integer sums and exactly rounded noise in every step, at the same ε.

        Its steps have a grid (see `dptrain.core.grid`), which clipping and noise have to follow.

        Raises:
            ValueError: a step has no noise, or one has 128 times as much as another.
        """
        specs = [spec for spec, _ in self.segments]
        spacing = grid.spacing(min(s.noise_stddev for s in specs), max(s.sensitivity for s in specs))
        segments = tuple((dataclasses.replace(spec, grid=spacing), count) for spec, count in self.segments)
        return Mechanism(segments, self.neighbours, self.delta)

    def with_rule(self, rule: ClipRule) -> "Mechanism":
        """The same mechanism with another clip rule of the same sensitivity, and so at the same ε.

        Raises:
            ValueError: it has another sensitivity than a step, or a rule whose accounting is another.
        """
        for spec, _ in self.segments:
            alike = math.isclose(rule.sensitivity, spec.sensitivity, rel_tol=1e-12)
            if not alike or Quantile in (type(rule), type(spec.clip_rule)):
                raise ValueError(
                    f"the rule {rule.name}, of sensitivity {rule.sensitivity:g}, cannot take the place of "
                    f"{spec.clip_rule.name}, of sensitivity {spec.sensitivity:g}; make a mechanism with it."
                )
        segments = tuple((dataclasses.replace(spec, clip_rule=rule), count) for spec, count in self.segments)
        return Mechanism(segments, self.neighbours, self.delta)

    # Reading it

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        return tuple(itertools.accumulate(count for _, count in self.segments))

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self._ends[-1]

    def step(self, index: int) -> StepSpec:
        """The specification of step `index`, counted from 0.

        Raises:
            IndexError: there is no such step.
        """
        index = checks.whole("step", index, minimum=0)
        if index >= self.steps:
            raise IndexError(
                f"step {index} is beyond the mechanism's {self.steps} steps; the budget is spent."
            )
        return self.segments[bisect.bisect_right(self._ends, index)][0]

    @property
    def is_constant(self) -> bool:
        """Whether all steps are equal."""
        return len(self.segments) == 1

    @property
    def is_correlated(self) -> bool:
        """Whether the noise of a step depends on that of the steps before it."""
        return any(spec.correlation is not None for spec, _ in self.segments)

    @property
    def noise_multiplier(self) -> float:
        """σ of a constant mechanism."""
        return self._constant("noise_multiplier").noise_multiplier

    @property
    def clip_norm(self) -> float:
        """C of a constant mechanism."""
        return self._constant("clip_norm").clip_norm

    @property
    def clip_rule(self) -> ClipRule:
        """The clip rule of a mechanism whose steps all have the same."""
        return self._constant("clip_rule").clip_rule

    @property
    def sample_rate(self) -> float:
        """q of a constant mechanism."""
        return self._constant("sample_rate").sample_rate

    @property
    def expected_batch_size(self) -> float:
        """L of a constant mechanism, in examples."""
        return self._constant("expected_batch_size").expected_batch_size

    @property
    def grid(self) -> float | None:
        """The spacing of a hardened, constant mechanism's grid; None of an ordinary one's."""
        return self._constant("grid").grid

    @property
    def sampler(self) -> str:
        """The sampler of a constant mechanism."""
        return self._constant("sampler").sampler

    def _constant(self, name: str) -> StepSpec:
        values = {getattr(spec, name) for spec, _ in self.segments}
        if len(values) > 1:
            raise ValueError(f"{name} changes between steps; read mechanism.step(i).{name}.")
        return self.segments[0][0]

    def expected_examples(self, steps: int | None = None) -> float:
        """The sum of the L of the first `steps` steps (default: all): public, unlike how many there were."""
        return sum(spec.expected_batch_size * count for spec, count in self._first(steps))

    # Accounting for it

    def event(self, steps: int | None = None) -> dp_accounting.DpEvent:
        """The first `steps` steps (default: all) in dp-accounting's vocabulary."""
        return accounting.event(self._first(steps), self.neighbours)

    def epsilon(self, delta: float | None = None, steps: int | None = None, accountant: str = PLD) -> float:
        """ε after the first `steps` steps (default: all), an upper bound.

        0 after no steps, infinite if a step has no noise. A repeated question is
        answered from memory; a new one costs about 0.1 to 1 s by ``pld``. In a progress
        bar use `epsilon_so_far`.

        Args:
            delta: δ, by default the mechanism's own.
            accountant: ``pld`` or ``rdp``.

        Raises:
            ValueError: no δ here nor in the mechanism, or more steps than there are.
        """
        segments = self._first(steps)
        return accounting.epsilon(segments, self._delta(delta), self.neighbours, accountant)

    def epsilon_so_far(self, steps: int, delta: float | None = None, points: int = 10) -> float:
        """A cheap upper bound on ε after the first `steps` steps, exact at the end.

        ε never falls with the number of steps, so ε at the next of `points` equidistant
        numbers of steps is a bound; so is RDP's ε, which costs next to nothing. The
        smaller of the two is returned. Over a whole run at most `points` PLDs are
        computed, each when it is first needed.

        Raises:
            ValueError: as for `epsilon`.
        """
        segments = self._first(steps)
        taken = sum(count for _, count in segments)
        stride = math.ceil(self.steps / checks.whole("points", points))
        samplers = {spec.sampler for spec, _ in self.segments}
        usable = [set(accounting.supported(s, self.neighbours)) for s in samplers]
        bounds = []
        if all(PLD in u for u in usable):
            ahead = min(self.steps, math.ceil(taken / stride) * stride)
            bounds.append(self.epsilon(delta, ahead, PLD))
        if all(RDP in u for u in usable):
            bounds.append(self.epsilon(delta, taken, RDP))
        return min(bounds)

    def epsilon_curve(
        self, points: int | Iterable[int] = 16, delta: float | None = None, accountant: str = PLD
    ) -> list[tuple[int, float]]:
        """(steps, ε after so many steps), for drawing.

        Args:
            points: the numbers of steps, or how many of them to spread evenly over the
                whole mechanism; the last of these is always all steps.
        """
        try:
            numbers = list(points)  # type: ignore[arg-type]
        except TypeError:
            spread = min(checks.whole("points", points), self.steps)
            numbers = sorted({math.ceil(self.steps * (i + 1) / spread) for i in range(spread)})
        return [(steps, self.epsilon(delta, steps, accountant)) for steps in numbers]

    def _first(self, steps: int | None) -> Segments:
        left = self.steps if steps is None else checks.whole("steps", steps, minimum=0)
        if left > self.steps:
            raise ValueError(f"steps is {left}, but the mechanism has {self.steps}; give at most that many.")
        first = []
        for spec, count in self.segments:
            first.append((spec, min(count, left)))
            left -= min(count, left)
        return accounting.merge(first)

    def _delta(self, delta: float | None) -> float:
        chosen = self.delta if delta is None else delta
        if chosen is None:
            raise ValueError("no delta is known; give delta here or when making the mechanism.")
        return checks.delta(chosen)

    # Writing it down

    def to_dict(self) -> dict[str, Any]:
        """This mechanism as JSON-able data; `from_dict` gives it back exactly."""
        return {
            "format": _FORMAT,
            "neighbours": self.neighbours,
            "delta": self.delta,
            "segments": [{"steps": count, "step": spec.to_dict()} for spec, count in self.segments],
        }

    @classmethod
    def from_dict(cls, data: Any) -> "Mechanism":
        """The mechanism that `to_dict` described.

        Raises:
            TypeError, ValueError: an unknown format, an unknown or missing key, or a
                quantity out of its range.
        """
        checks.known_keys("a mechanism", data, ("format", "neighbours", "delta", "segments"))
        if data["format"] != _FORMAT:
            raise ValueError(
                f"a mechanism of format {data['format']!r} cannot be read; "
                f"this version reads format {_FORMAT}."
            )
        segments = []
        for run in checks.sequence("segments", data["segments"]):
            checks.known_keys("a segment", run, ("steps", "step"))
            segments.append((StepSpec.from_dict(run["step"]), run["steps"]))
        return cls(tuple(segments), data["neighbours"], data["delta"])

    def describe(self, accountant: str = PLD) -> dict[str, str]:
        """Every quantity of the guarantee, named and ready to print, in reading order."""
        described = {
            "epsilon": f"{self.epsilon(accountant=accountant):.4g}" if self.delta else "no delta",
            "delta": f"{self.delta:g}" if self.delta else "not chosen",
            "neighbouring relation": self.neighbours,
            "privacy unit": "one example (one index of the data set)",
            "accountant": f"{accountant}, dp-accounting {importlib.metadata.version('dp-accounting')}",
            "steps": str(self.steps),
            "sampler": self._list(lambda spec: spec.sampler),
            "sample rate q": self._list(lambda spec: f"{spec.sample_rate:.6g}"),
            "expected epochs": f"{sum(s.sample_rate * n for s, n in self.segments):.4g}",
            "expected batch size L": self._list(lambda s: f"{s.expected_batch_size:.6g}"),
            "clip rule": self._list(lambda spec: spec.clip_rule.name),
            "sensitivity C": self._list(lambda spec: f"{spec.sensitivity:.6g}"),
            "noise multiplier sigma": self._list(lambda s: f"{s.noise_multiplier:.6g}"),
            "noise stddev on the sum": self._list(lambda s: f"{s.noise_stddev:.6g}"),
            "noise stddev on the mean": self._list(lambda s: f"{s.noise_stddev / s.expected_batch_size:.4g}"),
        }
        if any(spec.sampling.max_batch_size is not None for spec, _ in self.segments):
            described["largest batch size"] = self._list(lambda s: str(s.sampling.max_batch_size or "any"))
        if any(isinstance(spec.clip_rule, Quantile) for spec, _ in self.segments):
            described["noise on the count"] = self._list(lambda s: f"{s.clip_rule.count_noise:g} examples")
            sums = self._list(lambda s: f"{s.at(1.0).noise_multiplier:.6g}")
            described["of sigma, on the sum alone"] = sums
        if self.is_correlated:
            described["noise"] = self._list(lambda s: f"correlated over {len(s.correlation or '1')} steps")
        if any(spec.grid is not None for spec, _ in self.segments):
            described["integer grid"] = self._list(lambda s: f"{s.grid:g}" if s.grid else "none")
        return described

    def _list(self, text: Any) -> str:
        values = list(dict.fromkeys(text(spec) for spec, _ in self.segments))
        if len(values) > 4:
            return f"{values[0]}, {values[1]}, …, {values[-1]}"
        return ", ".join(values)
