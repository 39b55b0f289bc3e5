"""``clipped_grad`` on a model under FSDP2: every rank brings its own rows, and all take the same way.

Gathers and reductions are calls that all ranks must make in the same order. So the ranks probe together, on
the same rows; a rank without examples clips stand-in rows, which contribute exactly nothing; and before a sum
is changed they agree that each of them could do its part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dptrain.core import methods

from . import sharded_baselines
from .batch import clip_batch, replace_rows
from .clipped_sum import ClippedSum
from .errors import Refused, Together
from .fsdp import Sharding, reshard
from .guards import check_model, trainable
from .planner import Plan
from .probe import learn
from .ranks import lost_ranks
from .sharded_sums import Shards
from .sharded_understudy import standing_in
from .stand_ins import isolated_randomness
from .workspace import Workspace

if TYPE_CHECKING:
    from .clipping import ClippedGrad


#: where a signature tells of the model and no more of the batch
MODES = 2
#: in place of a signature, where nothing is planned
ORDINARY = "ordinary"


class ShardedGrad:
    """The ``ClippedGrad`` of a model under FSDP2.

    Raises:
        Refused: an option that it does not have on such a model.
    """

    def __init__(self, whole: ClippedGrad):
        self.whole = whole
        if whole.compiler is not None:
            raise Refused("compile=True is not for models under FSDP: leave it out.")
        if whole.options.memory_budget is not None:
            raise Refused("memory_budget is not for models under FSDP: use smaller physical batches.")
        if whole.grid is not None:
            raise Refused(
                "a hardened mechanism's grid is not for models under FSDP: use mechanism.grid=None."
            )
        self.sharding: Sharding
        self._captures = whole.method.capture in (methods.Capture.USES, methods.Capture.PLANNED)
        self._ordinary = whole.method.capture is methods.Capture.NONE
        self._workspace = Workspace()
        self._trained: dict[str, int] = {}
        #: one row for each signature that is planned
        self._stand_ins: dict[Any, Any] = {}

    @lost_ranks()
    def __call__(
        self, batch: Any, mask: Tensor | None, batch_size: int, into: ClippedSum | None
    ) -> ClippedSum:
        """See ``ClippedGrad.__call__``; collective: all ranks call it, each with its own rows."""
        reshard(self.whole.model)
        self._look()
        self._check(into)
        here = mask is None or bool(mask.any())
        key = self._key(batch)
        wanted = here and self._captures and key not in self.plans
        somewhere, elsewhere, unplanned = self.sharding.greatest(here, not here, wanted)
        if not somewhere:
            return self._result(self._zeros() if into is None else into.grads, batch_size, into)
        try:
            if unplanned:
                self._plan_all(key, batch, mask, wanted)
            if self._captures:
                return self._clip(batch, mask, batch_size, into, here, key)
            if elsewhere and self._ordinary and not self._stand_ins:
                self._keep(ORDINARY, *self._from_first(key, batch, mask, here)[1:])
            return self._baseline(batch, mask, batch_size, into, here)
        except BaseException:
            self.sharding.recover()
            raise

    def _look(self) -> None:
        """At the model's units, once, and again when other parameters are trained."""
        now = trainable(self.whole.model)
        if self._trained != {name: id(p) for name, p in now.items()}:
            if not now:
                raise Refused("the model has no trainable parameter: set requires_grad_(True) on some.")
            self.sharding = Sharding(self.whole.model)
            ranks, mine = self.whole.ranks.size, self.sharding.ranks
            if ranks not in (1, mine):
                raise Refused(
                    f"the model is sharded over {mine} of {ranks} ranks, whose sums nobody would add up: "
                    "shard it over all of them."
                )
            self._trained = {name: id(p) for name, p in self.sharding.shards.items()}

    def _zeros(self) -> dict[str, Tensor]:
        return {name: self.sharding.shard(name, self.sharding.zeros(name)) for name in self.sharding.shards}

    @property
    def plans(self) -> dict[Any, Plan]:
        return self.whole.plans

    def _check(self, into: ClippedSum | None) -> None:
        check_model(self.whole.model, self.sharding.shards, self.whole.method)
        self.whole.check_into(into, self.sharding.shards)

    def _key(self, batch: Any) -> tuple:
        """The signature of a batch, the same on all ranks' devices."""
        from .clipping import signature

        shapes = tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, batch)
        return signature(self.whole.model, self.sharding.shards, shapes)

    # ------------------------------------------------------------------ plans

    def _plan_all(self, key: tuple, batch: Any, mask: Tensor | None, wanted: bool) -> None:
        """Plan for every rank that wants it, one signature after the other."""
        while self.sharding.greatest(wanted)[0]:
            wanted &= self._plan_together(key, batch, mask, wanted) != key

    def _plan_together(self, key: tuple, batch: Any, mask: Tensor | None, wanted: bool) -> tuple:
        """Probe with the rows of the first rank that wants a plan, on all ranks; returns their signature."""
        key, rows, mask = self._from_first(key, batch, mask, wanted)
        batch_size = len(next(t for t in tree_leaves(rows) if isinstance(t, Tensor)))
        with (
            isolated_randomness(rows),
            standing_in(self.sharding, self.whole.loss_fn, rows, mask, batch_size) as understudy,
        ):
            findings, stage = learn(understudy, batch_size)
            if findings.routed or stage.findings.routed:
                raise Refused(
                    "the data decide which rows an operation of the model sees, as with experts or packed "
                    "sequences, and ranks under FSDP must all do the same: use method='per-example-loop'."
                )
            full = self.sharding.full
            self.plans[key] = self.whole.planned(findings, stage, full, batch_size, self.sharding)
        self._keep(key, rows, mask)
        return key

    def _from_first(self, key: tuple, batch: Any, mask: Tensor | None, wanted: bool) -> tuple[Any, Any, Any]:
        """Signature, batch and mask of the first rank that wants it, on all ranks."""
        (most,) = self.sharding.greatest(self.sharding.ranks - self.sharding.rank if wanted else 0)
        source = self.sharding.ranks - int(most)
        mine = source == self.sharding.rank
        rows = tree_map(lambda t: t.detach().cpu() if isinstance(t, Tensor) else t, batch) if mine else None
        found = (key, rows, None if mask is None else mask.cpu()) if mine else None
        key, rows, mask = self.sharding.from_rank(source, found)
        return key, tree_map(self._here, rows), None if mask is None else self._here(mask)

    def _keep(self, key: Any, rows: Any, mask: Tensor | None) -> None:
        """A row to stand in where there are no examples."""
        safe = rows if mask is None else replace_rows(rows, mask)
        self._stand_ins[key] = tree_map(lambda t: t[:1].clone() if isinstance(t, Tensor) else t, safe)

    def _here(self, item: Any) -> Any:
        return item.to(self.sharding.device) if isinstance(item, Tensor) else item

    # ------------------------------------------------------------------ clipping

    def _clip(
        self, batch, mask, batch_size: int, into: ClippedSum | None, here: bool, key: tuple
    ) -> ClippedSum:
        """By capture; once more after another probe, where some rank's examples move what no stand-in did."""
        try:
            return self._clip_by_plan(batch, mask, batch_size, into, here, key)
        except Together as refusal:
            if not refusal.unforeseen:
                raise
            self.sharding.recover()
            self._plan_all(key, batch, mask, refusal.own is not None)
        return self._clip_by_plan(batch, mask, batch_size, into, here, key)

    def _clip_by_plan(self, batch, mask, batch_size: int, into, here: bool, key: tuple) -> ClippedSum:
        rows = lambda: batch if mask is None else replace_rows(batch, mask)  # noqa: E731
        if here:
            return self._clip_rows(rows(), mask, batch_size, into, key)
        alike = [k for k in self._stand_ins if k[MODES:] == key[MODES:]]
        key = key if key in alike else alike[0]
        size = self.plans[key].batch_size
        nobody = torch.zeros(size, dtype=torch.bool, device=self.sharding.device)
        out = self._clip_rows(_repeated(self._stand_ins[key], size), nobody, size, into, key)
        return self._result(out.grads, batch_size, into)

    def _clip_rows(self, rows, mask, batch_size: int, into, key: tuple) -> ClippedSum:
        plan, full = self.plans[key], self.sharding.full
        return clip_batch(
            self.whole, plan, full, rows, mask, batch_size, into, self._workspace, sharding=self.sharding
        )

    def _result(self, grads: dict[str, Tensor], batch_size: int, into: ClippedSum | None) -> ClippedSum:
        """A sum to which this rank has added no example."""
        whole = self.whole
        bound = whole.bound
        zeros = self.sharding.zeros(next(iter(self.sharding.shards))).new_zeros(batch_size)
        before = ClippedSum(grads, zeros[:0], zeros[:0], bound) if into is None else into
        return ClippedSum(grads, before.norms, before.losses, bound).extended(zeros, zeros)

    # ------------------------------------------------------------------ methods that capture nothing

    def _baseline(self, batch, mask, batch_size: int, into: ClippedSum | None, here: bool) -> ClippedSum:
        shards = Shards(self.sharding, into)
        rows = batch if mask is None or not here else replace_rows(batch, mask)
        run = sharded_baselines.one_by_one
        if self._ordinary:
            run = sharded_baselines.non_private
            rows = rows if here else _repeated(self._stand_ins[ORDINARY], batch_size)
        try:
            norms, losses = run(self.whole, shards, rows, mask, batch_size)
        except Together:  # before anything was added
            raise
        except BaseException:
            if into is not None:
                into.spoil()
            raise
        return self._result(shards.grads(), 0, into).extended(norms, losses)


def _repeated(row: Any, size: int) -> Any:
    return tree_map(lambda t: t.repeat_interleave(size, 0) if isinstance(t, Tensor) else t, row)
