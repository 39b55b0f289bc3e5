"""What a use of a weight costs by each route, in floating-point operations and memory.

A use multiplies, for each example, inputs a [E, T, K] with a weight [E, K, N] to outputs
[E, T, N], where E is the number of groups (1 unless a grouped convolution), T the number
of positions, K and N the input and output features of a group. With g [E, T, N] the
gradient of the outputs, the example's weight gradient is aᵀg [E, K, N] in each group.

One multiplication and addition count as two operations. Lower-order terms are left out,
as in the sources: Bu et al. 2022, "Scalable and efficient training of large
convolutional neural networks with differential privacy" (arXiv 2205.10683), table 1, and
Bu et al. 2023, "Differentially private optimization on large model at small cost" (arXiv
2210.00038), table 2. There p and d are our K and N.
"""

from dataclasses import dataclass

from dptrain.core import checks


@dataclass(frozen=True)
class UseShape:
    """The shape of one use, for one example.

    Attributes:
        positions: T, at least 1.
        d_in: K, input features of a group.
        d_out: N, output features of a group.
        groups: E.
        picked: the rows of a table are picked by indices, not multiplied by inputs: N is the
            number of rows, and enters no operation.
        window: elements of a kernel that slides over an image by steps of one: its patches overlap,
            so that K = window times the channels, and their Gram matrix is made of that of pixels.
    """

    positions: int
    d_in: int
    d_out: int
    groups: int = 1
    picked: bool = False
    window: int = 1

    @property
    def multiplied(self) -> int:
        """K·N, or K where rows are picked."""
        return self.d_in * (1 if self.picked else self.d_out)

    def __post_init__(self) -> None:
        for name in ("positions", "d_in", "d_out", "groups", "window"):
            checks.whole(name, getattr(self, name))


@dataclass(frozen=True)
class Cost:
    """Operations, and memory that has to be held, for a number of examples.

    Attributes:
        flops: floating-point operations.
        bytes: held at once, beyond a and g themselves.
    """

    flops: int
    bytes: int

    def __add__(self, other: "Cost") -> "Cost":
        """One after the other, both results held."""
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def gram(use: UseShape, examples: int = 1, itemsize: int = 4) -> Cost:
    """‖aᵀg‖² = ⟨a aᵀ, g gᵀ⟩ for each example: 2T²(K+N) operations, 2T² numbers.

    The two products are symmetric, so half of these operations would do. For a kernel that slides over
    about T pixels, K is the number of channels and one addition for each element of the kernel.
    """
    t, e = use.positions, use.groups
    features = use.d_in // use.window + (use.window if use.window > 1 else 0)
    return Cost(
        flops=examples * e * 2 * t * t * (features + (0 if use.picked else use.d_out)),
        bytes=examples * e * 2 * t * t * itemsize,
    )


def materialise(use: UseShape, examples: int = 1, itemsize: int = 4) -> Cost:
    """aᵀg for each example, kept: 2TKN operations, KN numbers."""
    weight = use.groups * use.d_in * use.d_out
    return Cost(
        flops=examples * 2 * use.positions * use.groups * use.multiplied,
        bytes=examples * weight * itemsize,
    )


def contract(use: UseShape, examples: int = 1, itemsize: int = 4) -> Cost:
    """Σ_b c_b a_bᵀ g_b from what was recorded: an ordinary weight gradient, 2BTKN.

    Its result has the size of the weight, once for all examples.
    """
    weight = use.groups * use.d_in * use.d_out
    return Cost(flops=examples * 2 * use.positions * use.groups * use.multiplied, bytes=weight * itemsize)


def reuse(use: UseShape, examples: int = 1, itemsize: int = 4) -> Cost:
    """Σ_b c_b G_b over kept gradients, and their norms before: 4·B·K·N operations.

    Few operations, but two passes over B·K·N numbers in memory, which is what they cost
    on a CPU.
    """
    weight = use.groups * use.d_in * use.d_out
    return Cost(flops=4 * examples * weight, bytes=weight * itemsize)


def gram_saves_memory(use: UseShape) -> bool:
    """The published rule: Gram if and only if 2T² ≤ K·N.

    It minimises the memory of the norm. Source: arXiv 2205.10683, section 4, the
    "mixed" ghost norm.
    """
    return 2 * use.positions**2 <= use.d_in * use.d_out


def gram_saves_time(use: UseShape) -> bool:
    """The rule of operations where nothing can be kept: Gram if and only if T(K+N) < K·N.

    It compares 2T²(K+N) with 2TKN. Where a materialised gradient can be kept and reused,
    it saves the contraction as well, and this rule no longer says which is faster.
    """
    return use.positions * (use.d_in + use.d_out) < use.d_in * use.d_out
