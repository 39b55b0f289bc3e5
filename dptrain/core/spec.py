"""One step of the mechanism as data: how examples are sampled, clipped and noised."""

import math
from dataclasses import dataclass, replace
from typing import Any

from dptrain.core import checks, clip_rules, grid, rounded_gaussian
from dptrain.core.clip_rules import ClipRule, Flat, Quantile

POISSON = "poisson"
TRUNCATED_POISSON = "truncated-poisson"
FIXED_SIZE = "fixed-size"
SHUFFLE = "shuffle-without-amplification"
CYCLIC_POISSON = "cyclic-poisson"

SAMPLERS = (POISSON, TRUNCATED_POISSON, FIXED_SIZE, SHUFFLE, CYCLIC_POISSON)


@dataclass(frozen=True)
class Sampling:
    """How the logical batch of a step is drawn from the data set.

    Attributes:
        sampler: ``poisson``: each example independently with probability q.
            ``truncated-poisson``: the same, and a uniform subset of `max_batch_size`
            examples where more were drawn. ``fixed-size``: a uniform subset of exactly
            q·N examples. ``shuffle-without-amplification``: the data set is shuffled
            once an epoch and cut into 1/q batches; no privacy is gained by it.
            ``cyclic-poisson``: each example belongs to one of `cycle` groups, independently and uniformly,
            and step t draws each example of group t mod cycle with probability cycle · q.
        sample_rate: q, the probability that an example is drawn, in (0, 1].
        dataset_size: N, which counts as public. The samplers that need it are
            ``truncated-poisson`` and ``fixed-size``; None for the others.
        max_batch_size: where ``truncated-poisson`` truncates; None for the others.
        cycle: the number of groups of ``cyclic-poisson``; None for the others.

    Raises:
        ValueError: an unknown sampler, q outside (0, 1], a quantity that the sampler
            needs and lacks or does not use, q·N or 1/q not whole where it must be, cycle · q above 1.
    """

    sampler: str
    sample_rate: float
    dataset_size: int | None = None
    max_batch_size: int | None = None
    cycle: int | None = None

    def __post_init__(self) -> None:
        if self.sampler == "shuffle":
            raise ValueError(
                "shuffling gives no privacy amplification that can be accounted; use sampler "
                f"'{POISSON}', or ask for '{SHUFFLE}' by its full name and pay for it."
            )
        checks.one_of("sampler", self.sampler, SAMPLERS)
        object.__setattr__(self, "sample_rate", checks.probability("sample_rate", self.sample_rate))
        self._check_size("dataset_size", (TRUNCATED_POISSON, FIXED_SIZE))
        self._check_size("max_batch_size", (TRUNCATED_POISSON,))
        self._check_size("cycle", (CYCLIC_POISSON,))
        if self.cycle is not None and self.cycle * self.sample_rate > 1 + 1e-9:
            raise ValueError(
                f"a group of {self.cycle} is drawn from with probability cycle times sample_rate, which is "
                f"{self.cycle * self.sample_rate:g}, and can be at most 1; take a shorter cycle."
            )
        if self.sampler == FIXED_SIZE:
            _ = self.batch_size
        if self.sampler == SHUFFLE:
            _ = self.steps_per_epoch

    def _check_size(self, name: str, users: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if self.sampler in users:
            if value is None:
                raise ValueError(f"sampler '{self.sampler}' needs {name}; give it.")
            object.__setattr__(self, name, checks.whole(name, value))
        elif value is not None:
            raise ValueError(
                f"sampler '{self.sampler}' does not use {name}, but it is {checks.shown(value)}; "
                "leave it out."
            )

    @property
    def batch_size(self) -> int:
        """q·N, the size of every batch of the ``fixed-size`` sampler, in examples."""
        if self.sampler != FIXED_SIZE or self.dataset_size is None:
            raise ValueError(f"sampler '{self.sampler}' has no fixed batch size.")
        return _nearest_whole(self.sample_rate * self.dataset_size, "sample_rate times dataset_size")

    @property
    def group_rate(self) -> float:
        """cycle · q, the probability that ``cyclic-poisson`` draws an example whose turn it is."""
        if self.cycle is None:
            raise ValueError(f"sampler '{self.sampler}' has no groups.")
        return min(1.0, self.cycle * self.sample_rate)

    @property
    def period(self) -> int | None:
        """In how many consecutive steps of a draw an example takes part at most once; None if in any."""
        return self.steps_per_epoch if self.sampler == SHUFFLE else self.cycle

    @property
    def steps_per_epoch(self) -> int:
        """1/q, the number of batches that a shuffled epoch is cut into."""
        if self.sampler != SHUFFLE:
            raise ValueError(f"sampler '{self.sampler}' has no epochs.")
        return _nearest_whole(1 / self.sample_rate, "one over sample_rate")

    def to_dict(self) -> dict[str, Any]:
        """This sampling as JSON-able data: a cycle is named only where there is one."""
        data = {
            "sampler": self.sampler,
            "sample_rate": self.sample_rate,
            "dataset_size": self.dataset_size,
            "max_batch_size": self.max_batch_size,
        }
        return data if self.cycle is None else data | {"cycle": self.cycle}

    @classmethod
    def from_dict(cls, data: Any) -> "Sampling":
        """The sampling that `to_dict` described; unknown keys are refused."""
        keys = ("sampler", "sample_rate", "dataset_size", "max_batch_size")
        return cls(**checks.known_keys("a sampling", data, keys, optional=("cycle",)))


@dataclass(frozen=True)
class StepSpec:
    """Everything that one noisy step does, and everything that its accounting reads.

    Attributes:
        clip_rule: bounds each example's gradient; gives the sensitivity.
        noise_multiplier: σ, the noise's standard deviation over the sensitivity; of `Quantile`, of both
            that it releases together.
        sampling: how the logical batch is drawn.
        expected_batch_size: L, the public number that the noisy sum is divided by, in
            examples. Never the realised batch size, which is private.
        correlation: c_0, c_1, ..., the coefficients of correlated noise (`dptrain.core.correlated`), of which
            noise_multiplier is the innovation's; None for independent noise.
        grid: the spacing, a power of two in units of the gradient, of the integer grid on which hardened
            steps sum and add rounded noise (`dptrain.core.grid`); None for ordinary ones.

    Raises:
        TypeError, ValueError: a quantity is not a number or out of its range, or the grid does not suit
            the noise.
    """

    clip_rule: ClipRule
    noise_multiplier: float
    sampling: Sampling
    expected_batch_size: float
    grid: float | None = None
    correlation: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.clip_rule, ClipRule):
            raise TypeError(
                f"clip_rule must be a rule of dptrain.core.clip_rules, but it is "
                f"{self.clip_rule!r}; give for example Flat(1.0)."
            )
        if not isinstance(self.sampling, Sampling):
            raise TypeError(f"sampling must be a Sampling, but it is {self.sampling!r}.")
        object.__setattr__(
            self,
            "noise_multiplier",
            checks.non_negative("noise_multiplier", self.noise_multiplier),
        )
        object.__setattr__(
            self,
            "expected_batch_size",
            checks.positive("expected_batch_size", self.expected_batch_size),
        )
        if self.correlation is not None:
            object.__setattr__(self, "correlation", self._checked_correlation())
        if isinstance(self.clip_rule, Quantile):
            if self.grid is not None:
                raise ValueError("hardened steps have a fixed clip norm; leave out the grid or the quantile.")
            self.clip_rule.noise_on_gradients(self.noise_multiplier)
        if self.grid is not None:
            object.__setattr__(self, "grid", grid.checked(self.grid, self.sensitivity))
            rounded_gaussian.check_stddev(grid.in_spacings(self.noise_stddev, self.grid))

    def _checked_correlation(self) -> tuple[float, ...]:
        bands = tuple(
            checks.number("each of correlation", c) for c in checks.sequence("correlation", self.correlation)
        )
        cycle = self.sampling.cycle or 1
        if not bands or bands[0] <= 0 or math.fsum(c * c for c in bands) > 1 + 1e-9:
            raise ValueError(
                "correlation must begin with a positive number, and its squares must not add up to more than "
                "1, or one example would move the release by more than is accounted."
            )
        if len(bands) > cycle:
            raise ValueError(
                f"correlation has {len(bands)} bands, but examples may take part again after {cycle} steps; "
                f"sample by '{CYCLIC_POISSON}' with a cycle of at least {len(bands)}."
            )
        if self.grid is not None or isinstance(self.clip_rule, Quantile):
            raise ValueError("correlated noise goes with a fixed clip norm and no grid; leave them out.")
        return bands

    @property
    def clip_norm(self) -> float:
        """C of a rule with one threshold.

        Raises:
            ValueError: the rule has several thresholds; read `sensitivity`.
        """
        if isinstance(self.clip_rule, (clip_rules.PerLayer, clip_rules.GroupWise)):
            raise ValueError(
                f"the {self.clip_rule.name} clip rule has one threshold for each group; "
                "read clip_rule.clip_norms, or sensitivity."
            )
        return self.clip_rule.clip_norm

    def at(self, clip_norm: float) -> "StepSpec":
        """The noisy sum of a step of `Quantile` whose C has become `clip_norm`.

        It is a part of the step, to be released by, and not to be accounted for.

        Raises:
            ValueError: the clip rule is another one.
        """
        if not isinstance(self.clip_rule, Quantile):
            raise ValueError(f"the {self.clip_rule.name} clip rule keeps its clip norm.")
        sigma = self.clip_rule.noise_on_gradients(self.noise_multiplier)
        return replace(self, clip_rule=Flat(clip_norm), noise_multiplier=sigma)

    @property
    def sensitivity(self) -> float:
        """The most that one example adds to the clipped sum, in the L2 norm."""
        return self.clip_rule.sensitivity

    @property
    def noise_stddev(self) -> float:
        """σ times the sensitivity: of each coordinate of the noise on the *sum*."""
        return self.noise_multiplier * self.sensitivity

    @property
    def mean_noise_variance(self) -> float:
        """(noise_stddev / L)^2: of each coordinate of the noise on the released *mean*, which is public."""
        return (self.noise_stddev / self.expected_batch_size) ** 2

    @property
    def sample_rate(self) -> float:
        """q, the probability that an example is drawn."""
        return self.sampling.sample_rate

    @property
    def sampler(self) -> str:
        """The sampler's name."""
        return self.sampling.sampler

    def to_dict(self) -> dict[str, Any]:
        """This step as JSON-able data: an ordinary one's has no grid, as it was before there were any."""
        data: dict[str, Any] = {
            "clip_rule": clip_rules.to_dict(self.clip_rule),
            "noise_multiplier": self.noise_multiplier,
            "sampling": self.sampling.to_dict(),
            "expected_batch_size": self.expected_batch_size,
        }
        if self.grid is not None:
            data["grid"] = self.grid
        if self.correlation is not None:
            data["correlation"] = list(self.correlation)
        return data

    @classmethod
    def from_dict(cls, data: Any) -> "StepSpec":
        """The step that `to_dict` described; unknown keys are refused."""
        keys = ("clip_rule", "noise_multiplier", "sampling", "expected_batch_size")
        checks.known_keys("a step", data, keys, optional=("grid", "correlation"))
        return cls(
            clip_rule=clip_rules.from_dict(data["clip_rule"]),
            noise_multiplier=data["noise_multiplier"],
            sampling=Sampling.from_dict(data["sampling"]),
            expected_batch_size=data["expected_batch_size"],
            grid=data.get("grid"),
            correlation=data.get("correlation"),
        )


def flat_step(
    *,
    noise_multiplier: float,
    clip_norm: float | ClipRule,
    sample_rate: float,
    expected_batch_size: float,
    sampler: str = POISSON,
    dataset_size: int | None = None,
    max_batch_size: int | None = None,
) -> StepSpec:
    """The common step: flat clipping to `clip_norm`, or another rule, Gaussian noise, one sampler."""
    return StepSpec(
        clip_rule=clip_norm if isinstance(clip_norm, ClipRule) else Flat(clip_norm),
        noise_multiplier=noise_multiplier,
        sampling=Sampling(sampler, sample_rate, dataset_size, max_batch_size),
        expected_batch_size=expected_batch_size,
    )


def _nearest_whole(value: float, what: str) -> int:
    nearest = round(value)
    # A rate such as 1/3 is not a binary fraction: allow for its rounding, no more.
    if nearest < 1 or not math.isclose(value, nearest, rel_tol=1e-9):
        raise ValueError(
            f"{what} must be a whole number for this sampler, but it is {value}; change the sample rate."
        )
    return nearest
