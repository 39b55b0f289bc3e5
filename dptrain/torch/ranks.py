"""Processes that train one model together, and what they tell each other.

Rank 0 leads: it has the key, the ledger and the run's files. Collectives are called by all ranks in the same
order, or they wait for each other for ever; so every method here that says so is called by all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dptrain.core.team import RankLost, Team


class Ranks(Team):
    """The processes of a group of torch.distributed; without one, this process alone.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        group: None if this process is alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.leads = self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def __repr__(self) -> str:
        return f"<rank {self.rank} of {self.size}>"

    def tell(self, value: Any = None) -> Any:
        """As of ``Team``."""
        if self.alone:
            return value
        text = torch.frombuffer(
            bytearray(json.dumps(value).encode() if self.leads else b" "), dtype=torch.uint8
        )
        size = self._own(torch.tensor([len(text)]))
        self._call(dist.broadcast, size)
        message = self._own(text if self.leads else torch.empty(int(size), dtype=torch.uint8))
        self._call(dist.broadcast, message)
        return json.loads(bytes(message.cpu().tolist()))

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers. Called by all."""
        if self.alone:
            return number
        found = self._own(torch.tensor([number]))
        self._call(dist.all_reduce, found, op=dist.ReduceOp.MIN)
        return int(found)

    def total(self, number: float) -> float:
        """The sum of all ranks' numbers, in float64. Called by all."""
        if self.alone:
            return number
        found = self._own(torch.tensor([number], dtype=torch.float64))
        self._call(dist.all_reduce, found)
        return float(found)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks what rank 0 has in these tensors, in place. Called by all."""
        if self.alone:
            return
        with torch.no_grad():
            for tensor in tensors:
                whole = self._own(tensor.detach().contiguous())
                self._call(dist.broadcast, whole)
                if not self.leads:
                    tensor.copy_(whole)

    def check_alike(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        """Refuse ranks that differ. Called by all.

        Raises:
            ValueError: these tensors are not the same, bit for bit, on all ranks.
        """
        if len({bytes(each.tolist()) for each in self.digests(tensors)}) > 1:
            raise ValueError(
                f"the ranks have different {what}, and would train different models: begin with the same on "
                "all, for example with dptrain.torch.Ranks.share."
            )

    def digests(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """SHA-256 of every rank's own tensors, uint8 ``[32]`` each. Called by all."""
        if self.alone:
            return [torch.tensor(list(digest(tensors)), dtype=torch.uint8)]
        mine = self._own(torch.tensor(list(digest(tensors)), dtype=torch.uint8))
        found = [torch.empty_like(mine) for _ in range(self.size)]
        self._call(dist.all_gather, found, mine)
        return [each.cpu() for each in found]

    def _own(self, tensor: Tensor) -> Tensor:
        """On a device that the group can send from."""
        assert self.group is not None
        nccl = dist.get_backend(self.group) == "nccl"
        return tensor.to(torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu")

    def _call(self, collective: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if collective is dist.broadcast:
            options["group_src"] = 0
        with lost_ranks():
            return collective(*args, group=self.group, **options)


_FROM_GLOO = re.compile(
    r"\[[^]]*/gloo/[^]]*\] "
)  # the place in its source with which each of its errors begins


@contextlib.contextmanager
def lost_ranks() -> Iterator[None]:
    """Within, also as a decorator, what torch.distributed raises when a rank is gone is a `RankLost`."""
    try:
        yield
    except RankLost:
        raise
    except RuntimeError as error:
        said, from_gloo = _FROM_GLOO.subn("", str(error), count=1)
        if not from_gloo and not isinstance(error, dist.DistError):
            raise
        reason = said.strip().partition(". ")[0].splitlines()[0]
        raise RankLost(f"another rank has ended, and this one stops ({reason}).") from error


ALONE = Ranks()


def all_ranks() -> Ranks:
    """Those of torch.distributed's default group, if it is initialised; else this process alone."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Ranks(dist.group.WORLD)
    return ALONE


def digest(tensors: Mapping[str, Tensor]) -> bytes:
    """SHA-256 of all names, types, shapes and bits."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()
