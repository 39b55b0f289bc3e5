"""Models whose units were passed to ``torch.distributed.fsdp.fully_shard`` (FSDP2).

FSDP gathers a unit's parameters before its forward and its backward pass and frees them afterwards; between
times each rank holds a shard of every parameter. Per-example gradients are those of full parameters, seen
where the example is; their clipped sums are added up over the ranks and come back in shards. What FSDP itself
does with ordinary gradients (a mean, into ``.grad``) never happens, since no parameter receives one.
"""

from __future__ import annotations

import contextlib
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import Refused, Together, Unforeseen
from .guards import listed, trainable
from .shards import is_sharded, like, local, rows_of
from .uses.base import wide_type

#: attributes of a module that hold its forward hooks
HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that were passed to ``fully_shard``."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever has sharded a model has imported it
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def reshard(model: nn.Module) -> bool:
    """Back to shards, as FSDP leaves a root's parameters whole after a forward pass; False without FSDP."""
    modules = fsdp_modules(model)
    for module in modules:
        module.reshard()
    return bool(modules)


@dataclass(frozen=True, eq=False)
class Unit:
    """A module whose parameters are gathered together, and the names of the trainable ones."""

    module: Any
    names: tuple[str, ...]


class Sharding:
    """The units of a model under FSDP2.

    Attributes:
        units: in the order of the model.
        shards: its trainable parameters by name, as the optimizer knows them.
        full: the same by name, as a forward pass sees them; without memory while they are not gathered.
        everything: all parameters as a forward pass sees them, frozen ones too.

    Raises:
        Refused: parameters are not sharded in the one way that is supported: by rows, over one mesh.
    """

    def __init__(self, model: nn.Module):
        self.model, self.modules = model, fsdp_modules(model)
        reshard(model)
        self.shards = trainable(model)
        self._check()
        some = next(iter(self.shards.values()))
        self.mesh = some.device_mesh
        self.group, self.ranks = self.mesh.get_group(), self.mesh.size()
        self.rank = self.mesh.get_local_rank()
        self.device = some.to_local().device
        full: dict[str, Tensor] = {}
        self.units: list[Unit] = []
        self._unit_of_storage: dict[int, Unit] = {}
        self.everything: list[Tensor] = []
        for module in self.modules:
            before = dict(model.named_parameters())
            module.unshard()
            mine = {n: p for n, p in model.named_parameters() if p is not before[n]}
            module.reshard()
            if not mine:  # it shares the unit of another
                continue
            unit = Unit(module, tuple(n for n, p in mine.items() if p.requires_grad))
            self.units.append(unit)
            self.everything += mine.values()
            full |= mine
            self._unit_of_storage |= {p.untyped_storage()._cdata: unit for p in mine.values()}
        self.everything += [p for p in model.parameters() if not is_sharded(p)]  # frozen, and left alone
        self.full = {name: full[name] for name in self.shards}
        if any(p.device != self.device for p in full.values()):
            raise Refused("shards are kept on the host by an offload policy: use fully_shard without one.")
        self.unit_of = {name: unit for unit in self.units for name in unit.names}

    def _check(self) -> None:
        from torch.distributed.tensor import DTensor, Shard

        loose = [n for n, p in self.shards.items() if not isinstance(p, DTensor)]
        if loose:
            raise Refused(
                f"{listed(loose)} is trained and not sharded, while other parameters are: pass the whole "
                "model to fully_shard after its units, without ignored_params."
            )
        meshes = {p.device_mesh for p in self.shards.values()}
        if any(tuple(p.placements) != (Shard(0),) for p in self.shards.values()) or len(meshes) > 1:
            raise Refused(
                "only parameters sharded by their first dimension over one mesh of one dimension can be "
                "clipped: use fully_shard without shard_placement_fn, replication or tensor parallelism."
            )

    # ------------------------------------------------------------------ gathering

    @contextlib.contextmanager
    def gathered(self, units: Collection[Unit]) -> Iterator[None]:
        """Keep units gathered for a while."""
        for unit in units:
            unit.module.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.module.reshard()

    def behind(self, values: Sequence[Tensor]) -> list[Unit]:
        """The units without whose parameters these values cannot be differentiated: graphs saved them."""
        found: dict[int, Unit] = {}
        stack, seen = [value.grad_fn for value in values], set()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            for name in dir(node):
                if not name.startswith("_saved_"):
                    continue
                saved = getattr(node, name)
                for tensor in saved if isinstance(saved, (list, tuple)) else [saved]:
                    if isinstance(tensor, Tensor):
                        unit = self._unit_of_storage.get(tensor.untyped_storage()._cdata)
                        if unit is not None:
                            found[id(unit)] = unit
            stack += [parent for parent, _ in node.next_functions]
        return [unit for unit in self.units if id(unit) in found]

    @contextlib.contextmanager
    def as_one(self) -> Iterator[dict[str, Tensor]]:
        """The whole model gathered and FSDP's hooks set aside: an ordinary module on every rank.

        Yields its trainable parameters by name.
        """
        reshard(self.model)
        with self.gathered(self.units), _without_hooks(self.model):
            yield self.full

    def differentiate(
        self, target: Tensor, take: Callable[[str, Tensor], None], retain_graph: bool = False
    ) -> None:
        """Ordinary gradients, of this rank alone: each is handed over when it is there, and not kept."""

        def hand_over(p: Tensor) -> None:
            gradient, p.grad = p.grad, None
            take(names[id(p)], gradient)

        names = {id(p): name for name, p in self.full.items()}
        hooks = [p.register_post_accumulate_grad_hook(hand_over) for p in self.full.values()]
        try:
            target.backward(retain_graph=retain_graph, inputs=list(self.full.values()))
        finally:
            for hook in hooks:
                hook.remove()

    # ------------------------------------------------------------------ between ranks

    def reduce(self, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the ranks, this rank's rows of each, by one reduce-scatter.

        Args:
            totals: by name, shaped like the parameter and all of one type.
        """
        if not totals:
            return {}
        chunk = {name: -(-t.shape[0] // self.ranks) for name, t in totals.items()}  # rows of a rank
        sizes = [chunk[name] * t[0].numel() for name, t in totals.items()]
        some = next(iter(totals.values()))
        sent = some.new_zeros(self.ranks, sum(sizes))
        for (name, total), place in zip(totals.items(), sent.split(sizes, 1)):
            for rows, row in zip(total.detach().split(chunk[name]), place):
                row[: rows.numel()] = rows.reshape(-1)
        if self.ranks == 1:
            mine = sent[0]
        else:
            mine = sent.new_empty(sum(sizes))
            dist.reduce_scatter_tensor(mine, sent.view(-1), group=self.group)
        out = {}
        for name, part in zip(totals, mine.split(sizes)):
            shape = local(self.shards[name]).shape
            out[name] = part[: shape.numel()].reshape(shape)
        return out

    def shard(self, name: str, part: Tensor) -> Tensor:
        """This rank's rows of something like a parameter, as a tensor over all ranks."""
        return like(self.shards[name], part)

    def rows(self, whole: Tensor) -> Tensor:
        """This rank's rows of something shaped like a parameter."""
        return whole[rows_of(whole.shape[0], self.ranks, self.rank)]

    def nothing(self, name: str) -> Tensor:
        """The whole of a sum over nothing."""
        p = self.full[name]
        return torch.zeros(p.shape, dtype=wide_type(p.dtype), device=p.device)

    def zeros(self, name: str) -> Tensor:
        """This rank's rows of a sum over nothing."""
        shape = local(self.shards[name]).shape
        return torch.zeros(shape, dtype=wide_type(self.full[name].dtype), device=self.device)

    def greatest(self, *numbers: float) -> list[float]:
        """The greatest of each number over the ranks."""
        return self._all_reduce(numbers, dist.ReduceOp.MAX)

    def total(self, *numbers: float) -> list[float]:
        """The sum of each number over the ranks."""
        return self._all_reduce(numbers, dist.ReduceOp.SUM)

    def _all_reduce(self, numbers: Sequence[float], operation: Any) -> list[float]:
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if self.ranks > 1:
            dist.all_reduce(tensor, operation, group=self.group)
        return tensor.tolist()

    def agree(self, trouble: Refused | None, way: str) -> None:
        """See that every rank can go on, and in the same way.

        Raises:
            Together: on all ranks, if one of them is in trouble.
            Refused: on all ranks, if their ways differ.
        """
        code = 0 if trouble is None else 1 if isinstance(trouble, Unforeseen) else 2
        number = zlib.crc32(way.encode())
        worst, high, low = self.greatest(code, number, -number)
        if worst:
            raise Together(trouble, worst == 1)
        if high != -low:
            raise Refused(
                "the ranks' batches take different ways through the model, whose units could not be added "
                "up: pad them to one shape, and let no data decide which units run."
            )

    def from_rank(self, rank: int, value: Any) -> Any:
        """What a rank of the group has, on every rank."""
        if self.ranks == 1:
            return value
        box = [value]
        source = dist.get_global_rank(self.group, rank)
        dist.broadcast_object_list(
            box, source, self.group, self.device if self.device.type == "cuda" else None
        )
        return box[0]

    def recover(self) -> None:
        """After an exception in the middle of a pass: back to shards, and to FSDP's state between passes."""
        gradients = [(p, p.grad) for p in self.shards.values()]
        for module in self.modules:
            _forget_pass(module)
        for p, gradient in gradients:  # which FSDP throws away
            p.grad = gradient


def _forget_pass(module: Any) -> None:
    state = module._get_fsdp_state()
    if state._is_root is None:  # no pass has begun
        module.reshard()
    elif hasattr(module, "reset_iter_state"):
        if state._is_root:
            module.reset_iter_state()
    else:  # older versions of torch
        idle = type(state._training_state).IDLE
        state._state_ctx.iter_forward_root = None
        state._state_ctx.post_backward_final_callback_queued = False
        state._comm_ctx.post_forward_order.clear()
        state._training_state = idle
        if state._fsdp_param_group is not None:
            state._fsdp_param_group._training_state = idle
            state._fsdp_param_group._post_forward_indices.clear()
        module.reshard()


@contextlib.contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Without FSDP's own forward hooks, which would free what is to stay gathered."""
    held = [(module, name, getattr(module, name).copy()) for module in model.modules() for name in HOOKS]
    for module, name, hooks in held:
        now = getattr(module, name)
        for key, hook in hooks.items():
            if (getattr(hook, "__module__", "") or "").startswith("torch.distributed.fsdp"):
                del now[key]
    try:
        yield
    finally:
        for module, name, hooks in held:
            now = getattr(module, name)
            now.clear()
            now.update(hooks)
