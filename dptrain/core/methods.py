"""The closed table of clipping methods: a method is a row, never a class.

All rows compute the same numbers. They differ in how they come by each example's
gradient norm and by the sum of the clipped gradients.
"""

from dataclasses import dataclass
from enum import StrEnum


class Capture(StrEnum):
    """How per-example information is obtained."""

    NONE = "none"
    USES = "uses"  # record each meeting of a parameter with data
    VMAP = "vmap"  # vectorise the gradient of one example
    LOOP = "loop"  # one example after another
    PLANNED = "planned"


class Norm(StrEnum):
    """How an example's gradient norm is computed for each use."""

    NONE = "none"
    MATERIALISE = "materialise"  # form the per-example gradient
    GRAM = "gram"  # from products of activations and of output gradients
    CHEAPER = "cheaper"  # the one of the two that needs less memory
    PLANNED = "planned"


class Sum(StrEnum):
    """How the sum of clipped gradients is computed."""

    NONE = "none"
    REUSE = "reuse"  # weight and add the materialised gradients
    RUNNING_SUM = "running-sum"  # add each example's clipped gradient as it comes
    SECOND_BACKWARD = "second-backward"  # back-propagate the weighted loss
    CONTRACT = "contract"  # weighted product of what was recorded
    REUSE_OR_CONTRACT = "reuse-or-contract"  # reuse where materialised, else contract
    PLANNED = "planned"


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: the name in commands, records and figures.
        aliases: what papers and other libraries call it.
        capture, norm, sum: its three choices.
    """

    name: str
    aliases: tuple[str, ...]
    capture: Capture
    norm: Norm
    sum: Sum

    @property
    def is_private(self) -> bool:
        """Whether gradients are clipped at all."""
        return self.capture is not Capture.NONE


TABLE: tuple[Method, ...] = (
    Method(
        "non-private",
        ("public", "non-private-virtual"),
        Capture.NONE,
        Norm.NONE,
        Sum.NONE,
    ),
    Method("per-example", ("O-flat", "opacus"), Capture.USES, Norm.MATERIALISE, Sum.REUSE),
    Method(
        "per-example-vmap",
        ("functorch_dp", "private-mini", "DP"),
        Capture.VMAP,
        Norm.MATERIALISE,
        Sum.REUSE,
    ),
    Method(
        "per-example-loop",
        ("scan", "microbatch"),
        Capture.LOOP,
        Norm.MATERIALISE,
        Sum.RUNNING_SUM,
    ),
    Method("fast-gradient", ("FGC",), Capture.USES, Norm.MATERIALISE, Sum.SECOND_BACKWARD),
    Method("ghost", ("PV-ghost", "O-ghost"), Capture.USES, Norm.GRAM, Sum.SECOND_BACKWARD),
    Method("mixed-ghost", ("PV-ghost_mixed",), Capture.USES, Norm.CHEAPER, Sum.SECOND_BACKWARD),
    # An alias that differs from its name in letters' case alone is still listed: it is
    # how the paper writes it.
    Method("bk-ghost", ("BK-ghost",), Capture.USES, Norm.GRAM, Sum.CONTRACT),
    Method("bk-mixed-ghost", ("BK-MixGhostClip",), Capture.USES, Norm.CHEAPER, Sum.CONTRACT),
    Method("bk-mix-opt", ("BK-MixOpt",), Capture.USES, Norm.CHEAPER, Sum.REUSE_OR_CONTRACT),
    Method("auto", (), Capture.PLANNED, Norm.PLANNED, Sum.PLANNED),
)

NAMES: tuple[str, ...] = tuple(method.name for method in TABLE)


def resolve(name: str) -> Method:
    """The method called `name`, by its name or an alias, in any case of letters.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    wanted = str(name).strip().lower()
    for method in TABLE:
        if wanted == method.name or wanted in (alias.lower() for alias in method.aliases):
            return method
    raise ValueError(f"clipping method {name!r} is unknown; choose one of: {', '.join(NAMES)}.")
