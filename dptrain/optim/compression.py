"""Compression of private gradients: what is left out of a noisy gradient, and what becomes of it.

Everything here takes a ``PrivateGradient`` and gives one back. It sees no example, so it changes nothing of
the guarantee (post-processing), whichever coordinates the noisy gradient itself picks. What acts before the
clipping is ``dptrain/torch/subspace.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dptrain.torch import PrivateGradient
from dptrain.torch.projections import Projection, largest
from dptrain.torch.shards import is_sharded

Compress = Callable[[PrivateGradient], PrivateGradient]


def top_k(gradient: PrivateGradient, keep: float, *, of_all: bool = False) -> PrivateGradient:
    """The largest magnitudes of the noisy gradient, zeros elsewhere.

    Top-k sparsification (Aji and Heafield 2017, "Sparse communication for distributed gradient descent",
    arXiv 1704.05021) of what is released already.

    Args:
        keep: the share of coordinates that stay, in (0, 1]: of each tensor, at least one, or of all together.
        of_all: whether tensors compete with each other.

    Raises:
        TypeError: not a private gradient.
        ValueError: no such share, or the gradient lies in shards.
    """
    return projected(gradient, largest(checked(gradient).grads, keep, of_all=of_all))


def projected(gradient: PrivateGradient, projections: Mapping[str, Projection]) -> PrivateGradient:
    """The part of a private gradient that projections keep, by parameter name.

    The projections may depend on anything but the private examples: public ones, a key, weights that were
    released, or the noisy gradient itself.

    Raises:
        TypeError: not a private gradient.
        ValueError: the projections are of other parameters, or the gradient lies in shards.
    """
    if checked(gradient).grads.keys() != projections.keys():
        raise ValueError("the projections are of other parameters than the gradient: give one of each.")
    return gradient.map(lambda name, g: projections[name](g))


class ErrorFeedback:
    """Remembers what compression left out and adds it to the next gradient.

    ``send_t = compress(g_t + e_t)``, ``e_{t+1} = g_t + e_t - send_t`` (Seide et al. 2014, "1-bit stochastic
    gradient descent"; Stich et al. 2018, "Sparsified SGD with memory", arXiv 1809.07599, algorithm 1). The
    memory is made of private gradients, hence post-processing like all else.

    Attributes:
        memory: what is left over, by parameter name; all that the next step depends on.
    """

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        """like: the parameters, by name; the memory has the type of their gradients, at least float32."""
        self.memory = {
            name: torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            for name, p in like.items()
        }

    def __call__(self, gradient: PrivateGradient, compress: Compress) -> PrivateGradient:
        """What is sent of a gradient, with what was left over before.

        Raises:
            TypeError: not a private gradient.
            ValueError: it is of other parameters, or lies in shards.
        """
        if checked(gradient).grads.keys() != self.memory.keys():
            raise ValueError("the gradient is of other parameters than what is left over from before.")
        wanted = gradient.map(lambda name, g: g + self.memory[name])
        sent = compress(wanted)
        for name, left in self.memory.items():
            torch.sub(wanted.grads[name], sent.grads[name], out=left)
        return sent


def checked(gradient: PrivateGradient) -> PrivateGradient:
    """A private gradient that lies whole on each rank.

    Raises:
        TypeError: anything else.
        ValueError: it is sharded, as a model's under FSDP is.
    """
    if not isinstance(gradient, PrivateGradient):
        raise TypeError(
            f"compression takes a PrivateGradient and was given {type(gradient).__name__}: what acts before "
            "the noise must be public, see dptrain.torch.subspace."
        )
    if any(map(is_sharded, gradient.grads.values())):
        raise ValueError("compression is for gradients that are whole on each rank, not sharded by FSDP.")
    return gradient
