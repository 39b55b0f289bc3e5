"""Rules that bound one example's contribution, and the sensitivity that each gives.

The sensitivity is in the L2 norm over all trainable parameters together, in the units
of the gradient: the most that the clipped sum can move when one example is added or
removed.

To an engine a rule is three things: a partition of the parameters by name, a threshold C_k for
each of its parts, and the factor that brings a norm n below it: min(1, C_k / n), or
C_k / (n + stability) where the rule has a stability.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dptrain.core import checks


class _Whole:
    """All parameters together, to one norm."""

    clip_norm: float

    @property
    def sensitivity(self) -> float:
        """C; of `Quantile` that of the first step, and of the steps after it their own, as the noise is."""
        return self.clip_norm

    @property
    def thresholds(self) -> tuple[float, ...]:
        """C, of all parameters together."""
        return (self.clip_norm,)

    def partition(self, names: Sequence[str]) -> tuple[int, ...]:
        """The part that each of these parameters belongs to: there is one."""
        return (0,) * len(names)


class _InParts:
    """Parts of the parameters, each on its own, to a norm of its own."""

    clip_norms: tuple[float, ...]

    @property
    def sensitivity(self) -> float:
        """√(Σ C_k²)."""
        return math.hypot(*self.clip_norms)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """C_k by part."""
        return self.clip_norms


@dataclass(frozen=True)
class Flat(_Whole):
    """Scale an example's whole gradient by min(1, C / ‖g‖).

    Source: Abadi et al. 2016, "Deep learning with differential privacy", algorithm 1.
    """

    clip_norm: float
    name: ClassVar[str] = "flat"
    stability: ClassVar[None] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_norm", checks.positive("clip_norm", self.clip_norm))


@dataclass(frozen=True)
class Automatic(_Whole):
    """Normalise an example's gradient: g · C / (‖g‖ + stability).

    Its norm stays below C whatever ‖g‖ is, so the sensitivity is C, as for `Flat`.

    Source: Bu et al. 2022, "Automatic clipping", equation 4.1 (there R is our C).
    """

    clip_norm: float
    stability: float = 0.01
    name: ClassVar[str] = "automatic"

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_norm", checks.positive("clip_norm", self.clip_norm))
        # At 0 a vanishing gradient would be divided by zero.
        object.__setattr__(self, "stability", checks.positive("stability", self.stability))


@dataclass(frozen=True)
class PerLayer(_InParts):
    """Clip each layer k on its own to C_k.

    A layer is the parameters of one module (weight and bias of a linear map), or what stands side by side in
    a tree of parameters; layers are numbered by their first parameter. Clipped layers are orthogonal blocks
    of one vector, so the sensitivity of the whole is √(Σ C_k²).

    Source: McMahan et al. 2018, "Learning differentially private recurrent language
    models", section 2, "per-layer clipping".
    """

    clip_norms: tuple[float, ...]
    name: ClassVar[str] = "per-layer"
    stability: ClassVar[None] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_norms", _thresholds(self.clip_norms))

    @classmethod
    def evenly(cls, clip_norm: float, names: Sequence[str]) -> "PerLayer":
        """C / √K for each of the K layers of these parameters: of sensitivity C, as `Flat`."""
        count = len({layer_of(name) for name in names})
        checks.whole("the number of layers", count)
        return cls((checks.positive("clip_norm", clip_norm) / math.sqrt(count),) * count)

    def partition(self, names: Sequence[str]) -> tuple[int, ...]:
        """The layer that each of these parameters belongs to.

        Raises:
            ValueError: there are more or fewer layers than thresholds.
        """
        layers: dict[str, int] = {}
        found = tuple(layers.setdefault(layer_of(name), len(layers)) for name in names)
        if len(layers) != len(self.clip_norms):
            raise ValueError(
                f"the clip rule has {len(self.clip_norms)} thresholds for the layers, and the model has "
                f"{len(layers)} layers with trainable parameters; give one for each (PerLayer.evenly does)."
            )
        return found


@dataclass(frozen=True)
class GroupWise(_InParts):
    """Clip each group of parameters k on its own to C_k; the groups are a partition.

    A parameter belongs to the first group whose regular expression is found in its name. The same
    sensitivity as `PerLayer`, √(Σ C_k²), for any partition of the parameters.

    Source: He et al. 2023, "Exploring the limits of differentially private deep
    learning with group-wise clipping", section 2.
    """

    clip_norms: tuple[float, ...]
    patterns: tuple[str, ...]
    name: ClassVar[str] = "group-wise"
    stability: ClassVar[None] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_norms", _thresholds(self.clip_norms))
        patterns = self.patterns
        if not isinstance(patterns, (list, tuple)) or len(patterns) != len(self.clip_norms):
            raise ValueError(
                f"patterns must hold one regular expression for each of the {len(self.clip_norms)} "
                f"thresholds, but it is {checks.shown(patterns)}."
            )
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"each of patterns must be a text, and one is {checks.shown(pattern)}.")
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(
                    f"patterns holds {checks.shown(pattern)}, which is no regular expression ({error})."
                ) from error
        object.__setattr__(self, "patterns", tuple(patterns))

    def partition(self, names: Sequence[str]) -> tuple[int, ...]:
        """The group that each of these parameters belongs to.

        Raises:
            ValueError: a parameter belongs to none.
        """
        return tuple(self._group_of(name) for name in names)

    def _group_of(self, name: str) -> int:
        for number, pattern in enumerate(self.patterns):
            if re.search(pattern, name):
                return number
        raise ValueError(
            f"the parameter {name} belongs to no group of the clip rule; let the last pattern be '', which "
            "takes all that are left."
        )


@dataclass(frozen=True)
class Quantile(_Whole):
    """Flat clipping whose C follows a quantile of the norms, estimated privately (`dptrain.core.quantile`).

    Every step releases two things: the noisy clipped sum, and a noisy count of the examples whose norm is at
    most C. Let b be 1 for such an example and 0 for others: one example moves the sum of b - 1/2 by 1/2.
    With noise of standard deviation σ_b on that count and z_g C on the sum, both together are one Gaussian
    mechanism of noise multiplier z, where 1/z² = 1/z_g² + 1/(2 σ_b)². A step of this rule states that z as
    its noise multiplier, which is what is accounted; z_g follows from it.

    Attributes:
        clip_norm: C of the first step.
        count_noise: σ_b, in examples. The paper recommends a twentieth of the expected batch size.
        quantile: the share of examples whose norm C shall exceed.
        learning_rate: η of the geometric update C ← C exp(-η (share - quantile)).

    Source: Andrew et al. 2021, "Differentially private learning with adaptive clipping", theorem 1 and
    algorithm 1.
    """

    clip_norm: float
    count_noise: float
    quantile: float = 0.5
    learning_rate: float = 0.2
    name: ClassVar[str] = "quantile"
    stability: ClassVar[None] = None

    def __post_init__(self) -> None:
        for name in ("clip_norm", "count_noise", "learning_rate"):
            object.__setattr__(self, name, checks.positive(name, getattr(self, name)))
        object.__setattr__(self, "quantile", checks.probability("quantile", self.quantile))

    def noise_on_gradients(self, noise_multiplier: float) -> float:
        """z_g of a step whose noise multiplier is z, as above.

        Raises:
            ValueError: the count alone costs more than z allows: 2 σ_b is at most z.
        """
        share = noise_multiplier / (2 * self.count_noise)  # (z / 2 σ_b)² of the privacy loss is the count's
        if share >= 1:
            raise ValueError(
                f"count_noise is {self.count_noise:g} examples, but a noise multiplier of "
                f"{noise_multiplier:g} takes more than {noise_multiplier / 2:g}; raise it."
            )
        return noise_multiplier / math.sqrt(1 - share * share)


ClipRule = Flat | Automatic | PerLayer | GroupWise | Quantile

LEAST_CLIP_NORM = 1e-9
"""Engines take no threshold below: in float32 squares of its size, and operands weighted by factors of its
size, come near to what vanishes (``core/clipping_error.py``)."""


def rule_of(clip_norm: float | ClipRule) -> ClipRule:
    """The rule that an engine is to clip by: of a number, `Flat`.

    Raises:
        TypeError: neither a number nor a rule.
        ValueError: a threshold below `LEAST_CLIP_NORM`, or not finite.
    """
    rule = clip_norm if isinstance(clip_norm, ClipRule) else Flat(checks.number("clip_norm", clip_norm))
    if not all(LEAST_CLIP_NORM <= c < math.inf for c in rule.thresholds):
        raise ValueError(
            f"clip_norm must be at least {LEAST_CLIP_NORM:g} and finite, and is {min(rule.thresholds)}."
        )
    return rule


def to_dict(rule: ClipRule) -> dict[str, Any]:
    """`rule` as JSON-able data; `from_dict` gives it back exactly."""
    match rule:
        case Flat():
            return {"rule": rule.name, "clip_norm": rule.clip_norm}
        case Automatic():
            return {"rule": rule.name, "clip_norm": rule.clip_norm, "stability": rule.stability}
        case Quantile():
            return {
                "rule": rule.name,
                "clip_norm": rule.clip_norm,
                "count_noise": rule.count_noise,
                "quantile": rule.quantile,
                "learning_rate": rule.learning_rate,
            }
        case PerLayer():
            return {"rule": rule.name, "clip_norms": list(rule.clip_norms)}
        case GroupWise():
            return {
                "rule": rule.name,
                "clip_norms": list(rule.clip_norms),
                "patterns": list(rule.patterns),
            }


def from_dict(data: Any) -> ClipRule:
    """The clip rule that `to_dict` described.

    Raises:
        TypeError: `data` is not a dictionary.
        ValueError: an unknown rule, an unknown or missing key, or a bad threshold.
    """
    if not isinstance(data, dict):
        raise TypeError(f"a clip rule must be a dictionary, but it is {checks.shown(data)}.")
    name = checks.one_of("clip rule", data.get("rule"), _READERS)
    return _READERS[name](data)


def layer_of(name: str) -> str:
    """The layer of a parameter: its name less the last part."""
    return name.rpartition(".")[0]


def _thresholds(values: Any) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError(
            f"clip_norms must hold one threshold for each group, but it is {checks.shown(values)}; "
            "give a non-empty sequence of positive numbers."
        )
    return tuple(checks.positive("each of clip_norms", value) for value in values)


def _read_flat(data: dict[str, Any]) -> Flat:
    checks.known_keys("the flat clip rule", data, ("rule", "clip_norm"))
    return Flat(data["clip_norm"])


def _read_automatic(data: dict[str, Any]) -> Automatic:
    checks.known_keys("the automatic clip rule", data, ("rule", "clip_norm", "stability"))
    return Automatic(data["clip_norm"], data["stability"])


def _read_per_layer(data: dict[str, Any]) -> PerLayer:
    checks.known_keys("the per-layer clip rule", data, ("rule", "clip_norms"))
    return PerLayer(data["clip_norms"])


def _read_group_wise(data: dict[str, Any]) -> GroupWise:
    checks.known_keys("the group-wise clip rule", data, ("rule", "clip_norms", "patterns"))
    return GroupWise(data["clip_norms"], data["patterns"])


def _read_quantile(data: dict[str, Any]) -> Quantile:
    keys = ("clip_norm", "count_noise", "quantile", "learning_rate")
    checks.known_keys("the quantile clip rule", data, ("rule", *keys))
    return Quantile(*(data[key] for key in keys))


_READERS: dict[str, Callable[[dict[str, Any]], ClipRule]] = {
    Flat.name: _read_flat,
    Automatic.name: _read_automatic,
    PerLayer.name: _read_per_layer,
    GroupWise.name: _read_group_wise,
    Quantile.name: _read_quantile,
}
