"""Number formats: what to compute in, what to accumulate in, and the error to expect.

Names and numbers only; the engines translate them into their own types.
"""

from dataclasses import dataclass

from dptrain.core import checks

# Unit roundoff u = 2^-p, with p the significant bits, the implicit one included.
_UNIT_ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "tfloat32": 2.0**-11,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}


@dataclass(frozen=True)
class Precision:
    """The formats of one run.

    Attributes:
        name: as given on the command line.
        compute: the type of activations and of their gradients.
        accumulate: the type of norms, clip factors, sums of clipped gradients and noise:
            float32 or better whatever `compute` is. A clip factor rounded to bfloat16
            would let a gradient exceed C by 2⁻⁸ of it.
        tf32_matmul: whether float32 products may round their operands to TF32.
        gram: the type in which Gram products are formed, never with TF32: they cancel,
            and an absolute error that is small beside their terms can be large beside
            the norm.
    """

    name: str
    compute: str
    accumulate: str
    tf32_matmul: bool
    gram: str


TABLE: tuple[Precision, ...] = (
    Precision("fp32", "float32", "float32", False, "float32"),
    Precision("tf32", "float32", "float32", True, "float32"),
    Precision("bf16", "bfloat16", "float32", False, "float32"),
    Precision("fp16", "float16", "float32", False, "float32"),
    Precision("fp64", "float64", "float64", False, "float64"),
)

NAMES: tuple[str, ...] = tuple(precision.name for precision in TABLE)


def resolve(name: str) -> Precision:
    """The precision called `name`.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    checks.one_of("precision", name, NAMES)
    return TABLE[NAMES.index(name)]


def unit_roundoff(dtype: str) -> float:
    """u, the largest relative error of rounding to nearest in `dtype`.

    Raises:
        ValueError: an unknown type.
    """
    checks.one_of("dtype", dtype, _UNIT_ROUNDOFF)
    return _UNIT_ROUNDOFF[dtype]


def gamma(terms: int, dtype: str) -> float:
    """γ_n = n·u / (1 − n·u), the relative error bound of n roundings in `dtype`.

    A computed inner product of n terms differs from the true one by at most
    γ_n · Σ|x_i||y_i|, in whatever order it is summed.

    Source: Higham 2002, "Accuracy and stability of numerical algorithms", lemma 3.1 and
    equation 3.5.

    Raises:
        ValueError: n·u ≥ 1, where the bound says nothing.
    """
    product = checks.whole("terms", terms, minimum=0) * unit_roundoff(dtype)
    if product >= 1:
        raise ValueError(f"{terms} terms are too many to bound their error in {dtype}; use a wider type.")
    return product / (1 - product)
