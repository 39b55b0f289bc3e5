"""Checks of single quantities, one clear sentence for each way to be wrong."""

import math
import operator
from collections.abc import Iterable
from typing import Any

_TOO_MANY = 2**63
_LONGEST = 80  # characters of a wrong value in a message


def number(name: str, value: Any) -> float:
    """`value` as a finite float.

    Raises:
        TypeError: it is not a real number (booleans are not).
        ValueError: it is NaN or infinite.
    """
    if isinstance(value, (bool, str, bytes)):
        raise TypeError(f"{name} must be a number, but it is {shown(value)}; give a real number.")
    try:
        result = float(value)
    except (TypeError, ValueError, RuntimeError):  # tensors raise the last
        raise TypeError(f"{name} must be a number, but it is {shown(value)}; give a real number.") from None
    except OverflowError:
        raise ValueError(
            f"{name} must be finite, and is too large for a float; give a smaller number."
        ) from None
    if not math.isfinite(result):
        raise ValueError(f"{name} must be finite, but it is {result}; give a finite number.")
    return result


def positive(name: str, value: Any) -> float:
    """`value` as a finite float above zero."""
    result = number(name, value)
    if result <= 0:
        raise ValueError(f"{name} must be above 0, but it is {result}; give a positive number.")
    return result


def non_negative(name: str, value: Any) -> float:
    """`value` as a finite float of at least zero."""
    result = number(name, value)
    if result < 0:
        raise ValueError(f"{name} must not be negative, but it is {result}; give 0 or a positive number.")
    return result


def probability(name: str, value: Any) -> float:
    """`value` as a probability in (0, 1], the range of a sample rate."""
    result = number(name, value)
    if not 0 < result <= 1:
        raise ValueError(
            f"{name} must be above 0 and at most 1, but it is {result}; "
            "give the expected batch size divided by the size of the data set."
        )
    return result


def delta(value: Any) -> float:
    """`value` as the δ of (ε, δ)-differential privacy, strictly between 0 and 1."""
    result = number("delta", value)
    if not 0 < result < 1:
        raise ValueError(
            f"delta must lie strictly between 0 and 1, but it is {result}; "
            "give a probability well below one over the size of the data set."
        )
    return result


def whole(name: str, value: Any, *, minimum: int = 1) -> int:
    """`value` as an integer of at least `minimum`.

    Raises:
        TypeError: it is not an integer (``4.0`` and ``True`` are not).
        ValueError: it is below `minimum`, or too large for 64 bits.
    """
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, but it is {shown(value)}; give an integer.")
    try:
        result = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be a whole number, but it is {shown(value)}; give an integer."
        ) from None
    if result < minimum:
        raise ValueError(
            f"{name} must be at least {minimum}, but it is {shown(result)}; give a larger number."
        )
    if result >= _TOO_MANY:
        raise ValueError(f"{name} must be below 2^63; give a smaller number.")
    return result


def one_of(name: str, value: Any, allowed: Iterable[str]) -> str:
    """`value` if it is one of the names in `allowed`."""
    names = list(allowed)
    if value not in names:
        raise ValueError(f"{name} {shown(value)} is unknown; choose one of: {', '.join(names)}.")
    return str(value)


def sequence(name: str, value: Any) -> list[Any]:
    """`value` as a list, if it is a list or a tuple."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list, but it is {shown(value)}; give a list.")
    return list(value)


def shown(value: Any) -> str:
    """`value` as a message can hold it: on one line, and not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def known_keys(what: str, data: Any, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Any]:
    """`data` if it is a dictionary with the keys in `required`, maybe some in `optional`, and no others.

    Raises:
        TypeError: it is not a dictionary.
        ValueError: a key is unknown (a newer or foreign format) or missing.
    """
    if not isinstance(data, dict):
        raise TypeError(f"{what} must be a dictionary, but it is {shown(data)}.")
    wanted = set(required)
    unknown = sorted(str(key) for key in data.keys() - wanted - set(optional))
    if unknown:
        raise ValueError(
            f"{what} holds unknown keys ({', '.join(shown(key) for key in unknown[:3])}); "
            "it was written by another version or edited by hand."
        )
    missing = sorted(wanted - data.keys())
    if missing:
        raise ValueError(f"{what} lacks the keys {', '.join(missing)}; it is incomplete.")
    return data
