"""One physical batch by the uses of its parameters: capture, norms, clip factors, sums."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from jax import Array, lax

from dptrain.core import clipping_error
from dptrain.core.clip_rules import ClipRule

from .baselines import in_parts, unless_infinite
from .bookkeeping import Bookkeeping
from .call import Call
from .capture import Capture
from .factors import factors_by_part, norm_type, whole
from .planner import Plan
from .program import rearranged_last, run
from .uses import accumulated


class ByUses:
    """A way to clip: ``(call, mask) -> (sums of the parameters, norms [B], losses [B], aux)``."""

    def __init__(self, capture: Capture, plan: Plan, rule: ClipRule):
        self.capture, self.plan, self.rule = capture, plan, rule

    def __call__(self, call: Call, mask: Array) -> tuple:
        pure, rearranged = rearranged_last(self.capture.split.pure)
        inputs = dict(zip(pure.inputs, [*call.parameters, *call.others], strict=True))
        values = run(pure, inputs.values())

        def some(data: list, mask: Array) -> tuple:
            # Where it is read, a transposed weight costs nothing; what enters a loop is copied to lie so.
            return self._clip(replace(call, data=data), inputs, run(rearranged, values), mask)

        found = in_parts(some, call.data, mask, self.plan.rows)
        return unless_infinite(found, call, mask, self.rule)

    def _clip(self, call: Call, inputs: dict, values: list, mask: Array) -> tuple:
        captured = self.capture(values, call.data)
        part_of = self.rule.partition(call.names)
        books = Bookkeeping(self.plan.parts, captured, call.parameters, inputs, part_of)
        by_part = [
            squared.astype(norm_type(call.parameters))
            for squared in books.squared_norms(len(self.rule.thresholds))
        ]
        squared = whole(by_part)
        within = max((len(part.uses) + len(part.group.values) for part in self.plan.parts), default=1)
        parts = clipping_error.chain(within) + clipping_error.chain(max(1, len(self.plan.parts)))
        factors = factors_by_part(self.rule, by_part, mask, call, parts)
        if self.plan.second_backward:
            # Behind a barrier, or the compiler would find that it has all this already.
            again, factors = lax.optimization_barrier((call.data, factors))
            books = Bookkeeping(
                self.plan.parts, self.capture(values, again), call.parameters, inputs, part_of
            )

        sums = books.sums(factors)
        every = [
            sums[i] if i in sums else jnp.zeros(jnp.shape(p), accumulated(p.dtype))
            for i, p in enumerate(call.parameters)
        ]
        return every, jnp.sqrt(squared), captured.losses, captured.aux
