"""How far rounding can let a clipped gradient exceed C, and the margin that keeps it below.

Let g be an example's gradient as the engine holds it, N^2 its squared norm as computed, and c, also as
computed, its clip factor min(1, S C / N). The margin S is such that c |g| <= C for every g, in the arithmetic
of real numbers: by derivation, with u the unit roundoff of the type, t its smallest normal number, and
gamma_n = n u / (1 - n u) (Higham 2002, "Accuracy and stability of numerical algorithms", section 3.1: a sum
of n terms of one sign is off by gamma_(n - 1) of itself at most, in whatever order they are added).

1. A square below t may vanish: with d elements N^2 misses d t at most. All else is relative, so that
   N^2 >= (|g|^2 - d t) (1 - D), with D by route:

   ``blocks``  the squares of `BLOCK` elements are summed in the type; d / `BLOCK` blocks and the parts of the
               norm (of uses, parameters) in float64. D = gamma_(BLOCK + 8) + gamma_(d / BLOCK + parts + 8),
               the latter of float64; the 8 for squares, for roots that are squared again, for casts.
   ``levels``  sums of `LEVEL` elements are themselves summed by as many, until one is left, all in the type:
               `chain` says how many additions follow each other. D = gamma_(chain + parts + 8).
   ``gram``    a bound on its error is added to each part, which holds against the gradient in the arithmetic
               of real numbers; what remains is the rounding of that addition, D = gamma_8.

2. The square root, S C rounded to the type, the quotient and its minimum with 1 lose less than 16 u together,
   if each is off by 4 u at most: compilers for GPUs approximate roots and quotients, and where C is an
   argument of what is compiled, C, S and their product are rounded each. An engine that rounds c g element
   by element adds u, which is in the 16 u.

3. Where c g is contracted from two operands, c multiplies one of them, and what falls below t there is off by
   2^-150 an element in float32, or by t where the processor takes it for zero: c g is off by that times the
   sum of the other operand's magnitudes. This is below u C, which is in the 16 u too, as long as these add up
   to less than 8e37 C, or 5e30 C. It is an assumption, for nothing looks for larger ones; and it is why
   engines take no C below 1e-9.

So c |g| <= S C (1 + 16 u) sqrt((1 + d t / (S C)^2) / (1 - D)), and

    S = (1 - 16 u) sqrt(1 - D - 2 d t / C^2)

suffices. In float32 it is 1 - 5.1e-6 by blocks and about 1 - 8e-6 by levels, in float64 1 - 2e-14, a little
less for large models. The
type in which the model computes does not enter: whatever was rounded to TF32 or bfloat16 on the way to g, it
is this g that is clipped.
"""

import functools
import math

from dptrain.core import checks, precision

BLOCK = 128
"""Elements whose squares are added one after the other in the type they have."""

LEVEL = 32
"""Terms that are added one after the other where all is done in one type."""

BLOCKS, LEVELS, GRAM = ROUTES = ("blocks", "levels", "gram")

_ROOTS_AND_QUOTIENTS = 16

# The smallest normal numbers: what is below them, some processors take for zero.
_TINY = {"float64": 2.0**-1022, "float32": 2.0**-126}


def shortfall(dtype: str, elements: int, parts: int, route: str) -> float:
    """D: by how much a squared norm may be understated, relatively, underflow aside.

    Args:
        dtype: in which norms are taken, "float32" or "float64".
        elements: d, of the whole gradient.
        parts: of the norm, that are taken by themselves and added; in ``levels``, additions that follow each
            other when they are.
        route: how squares are added, one of `ROUTES`.

    Raises:
        ValueError: another type or route, or sums too long to bound their error.
    """
    checks.one_of("dtype", dtype, _TINY)
    checks.one_of("route", route, ROUTES)
    elements, parts = checks.whole("elements", elements), checks.whole("parts", parts)
    if route == GRAM:
        return precision.gamma(8, dtype)
    if route == LEVELS:
        return precision.gamma(chain(elements) + parts + 8, dtype)
    joined = -(-elements // BLOCK) + parts + 8
    return precision.gamma(min(elements, BLOCK) + 8, dtype) + precision.gamma(joined, "float64")


def chain(terms: int) -> int:
    """Additions that follow each other, at most, where so many terms are summed by levels."""
    levels = 1
    while LEVEL**levels < terms:
        levels += 1
    return levels * min(terms, LEVEL)


@functools.lru_cache(maxsize=1024)  # asked for at every step
def margin(dtype: str, elements: int, parts: int, clip_norm: float, route: str) -> float:
    """S, by which C is multiplied so that no clipped gradient is longer than C.

    Args:
        dtype, elements, parts, route: as for `shortfall`; ``blocks`` and ``levels`` cover ``gram``.
        clip_norm: C.

    Raises:
        ValueError: C is so small that squares of its size vanish in the type.
    """
    lost = max(shortfall(dtype, elements, parts, way) for way in (route, GRAM))
    clip_norm = checks.positive("clip_norm", clip_norm)
    lost += 2 * elements * _TINY[dtype] / clip_norm / clip_norm  # the square of a large one overflows
    if lost > 0.01:
        raise ValueError(
            f"a norm of {clip_norm:g} over {elements} elements is too small for {dtype}: raise the clip norm."
        )
    return (1 - _ROOTS_AND_QUOTIENTS * precision.unit_roundoff(dtype)) * math.sqrt(1 - lost)
