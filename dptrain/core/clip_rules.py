"""Rules that bound one example's contribution, and the sensitivity that each gives.

The sensitivity is in the L2 norm over all trainable parameters together, in the units
of the gradient: the most that the clipped sum can move when one example is added or
removed. Only `Flat` is carried out by the engines so far; the others are described so
that an accountant never has to guess what they would cost.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from dptrain.core import checks


@dataclass(frozen=True)
class Flat:
    """Scale an example's whole gradient by min(1, C / ‖g‖).

    Source: Abadi et al. 2016, "Deep learning with differential privacy", algorithm 1.
    """

    clip_norm: float
    name: ClassVar[str] = "flat"

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_norm", checks.positive("clip_norm", self.clip_norm))

    @property
    def sensitivity(self) -> float:
        """C."""
        return self.clip_norm


@dataclass(frozen=True)
class Automatic:
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

    @property
    def sensitivity(self) -> float:
        """C."""
        return self.clip_norm


@dataclass(frozen=True)
class PerLayer:
    """Clip each layer k on its own to C_k.

    Clipped layers are orthogonal blocks of one vector, so the sensitivity of the whole
    is √(Σ C_k²).

    Source: McMahan et al. 2018, "Learning differentially private recurrent language
    models", section 2, "per-layer clipping".
    """

    clip_norms: tuple[float, ...]
    name: ClassVar[str] = "per-layer"

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_norms", _thresholds(self.clip_norms))

    @property
    def sensitivity(self) -> float:
        """√(Σ C_k²)."""
        return math.hypot(*self.clip_norms)


@dataclass(frozen=True)
class GroupWise:
    """Clip each group of parameters k on its own to C_k; the groups are a partition.

    The same sensitivity as `PerLayer`, √(Σ C_k²), for any partition of the parameters.

    Source: He et al. 2023, "Exploring the limits of differentially private deep
    learning with group-wise clipping", section 2.
    """

    clip_norms: tuple[float, ...]
    name: ClassVar[str] = "group-wise"

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_norms", _thresholds(self.clip_norms))

    @property
    def sensitivity(self) -> float:
        """√(Σ C_k²)."""
        return math.hypot(*self.clip_norms)


ClipRule = Flat | Automatic | PerLayer | GroupWise


def to_dict(rule: ClipRule) -> dict[str, Any]:
    """`rule` as JSON-able data; `from_dict` gives it back exactly."""
    match rule:
        case Flat():
            return {"rule": rule.name, "clip_norm": rule.clip_norm}
        case Automatic():
            return {"rule": rule.name, "clip_norm": rule.clip_norm, "stability": rule.stability}
        case PerLayer() | GroupWise():
            return {"rule": rule.name, "clip_norms": list(rule.clip_norms)}


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
    checks.known_keys("the group-wise clip rule", data, ("rule", "clip_norms"))
    return GroupWise(data["clip_norms"])


_READERS: dict[str, Callable[[dict[str, Any]], ClipRule]] = {
    Flat.name: _read_flat,
    Automatic.name: _read_automatic,
    PerLayer.name: _read_per_layer,
    GroupWise.name: _read_group_wise,
}
