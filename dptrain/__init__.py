"""dptrain: differentially private deep learning at non-private speed.

Importing this package imports neither PyTorch nor JAX: choose an engine with
``import dptrain.torch`` or ``import dptrain.jax``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dptrain.core.mechanism import Mechanism

__all__ = ["Mechanism", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The accountant behind Mechanism takes about a second to import; whoever only
    # wants the version, or a model, should not wait for it.
    if name == "Mechanism":
        from dptrain.core.mechanism import Mechanism

        return Mechanism
    raise AttributeError(f"module 'dptrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
