"""``compile=True``: the private physical step as one graph for Inductor.

Dynamo follows the model and its loss and guards what they read of Python's state, so that a changed
attribute is seen and not served stale; what it hands on is traced once more together with capture,
backward pass, norms, clip factors and sums (``traced.py``), and Inductor compiles the whole. The first
batch is also clipped by the eager engine, and the two must agree before the graph counts. Where anything
does not work out, the eager engine goes on, after one warning.
"""

from __future__ import annotations

import contextlib
import itertools
import types
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

from dptrain.core.clip_rules import ClipRule

from .clipped_sum import ClippedSum, owned
from .full_precision import full_precision
from .guards import listed
from .planner import Plan
from .stand_ins import isolated_randomness
from .traced import Inputs, Untraceable, ordinary_step, private_step
from .uses.base import is_channels_last

#: graphs for one input signature: Python state may change now and then, but not in every step
MOST_GRAPHS = 3
#: input signatures that are compiled
MOST_SIGNATURES = 8
#: random numbers are drawn as the eager engine draws them, so that the two can be compared
OPTIONS: dict[str, Any] = {"fallback_random": True}

#: relative differences of norms and sums that rounding explains
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
#: every layer rounds: how many times what examples that are rounded once more change
ROUNDINGS = 4
#: the largest relative difference that is put down to rounding, however large it is
MOST_ROUNDING = 0.05


class Eager(Protocol):
    """The eager engine on the batch at hand, which may be changed."""

    def __call__(self, into: ClippedSum | None, change: Callable[[Any], Any] | None = None) -> ClippedSum: ...


class Compiler:
    """The compiled steps of one ``ClippedGrad``, by input signature."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor]):
        self.model, self.loss_fn = model, loss_fn
        self.steps: dict[Any, CompiledStep | None] = {}
        #: how many plans there were
        self.plans: Counter = Counter()
        self.warned = False

    @property
    def graphs(self) -> int:
        """How many graphs were compiled so far: one for each input signature, if nothing changes."""
        return sum(len(step.graphs) for step in self.steps.values() if step is not None)

    def clip(
        self,
        key: Any,
        plan: Plan | None,
        parameters: dict[str, Tensor],
        batch: Any,
        mask: Tensor | None,
        rule: ClipRule,
        into: ClippedSum | None,
        eager: Eager,
    ) -> ClippedSum:
        """The clipped sum of a batch, by the graph for it or by ``eager(into)``, added to ``into``.

        Args:
            key: the input signature.
            plan: made for it by the eager engine; None without privacy.
            batch: as it came, masked rows included.

        Raises:
            Refused: what the eager engine raises.
        """
        step = self._step((key, rule), plan, rule)
        if step is None:
            return eager(into)
        if mask is None:
            (size, *_) = next(t.shape for t in tree_leaves(batch) if isinstance(t, Tensor))
            mask = torch.ones(size, dtype=torch.bool, device=next(iter(parameters.values())).device)
        try:
            found = step(parameters, batch, mask)
        except Untraceable as reason:
            self._give_up((key, rule), str(reason))
            return eager(into)
        if found is None:
            return eager(into)
        if not step.called.rehearsed:
            truth = eager(None)
            if wrong := self._wrong(found, truth, int(mask.sum()), eager, batch):
                self._give_up((key, rule), f"{wrong} by the compiled step differ from the eager one's")
            step.called.rehearsed = True
            found = truth
        return found if into is None else into.add_(found)

    def _wrong(self, found: ClippedSum, truth: ClippedSum, examples: int, eager: Eager, batch: Any) -> str:
        """What of a compiled step cannot be put down to rounding, "" if nothing."""
        if not difference(found, truth, examples):
            return ""
        # Deep models may amplify rounding: see what it does to the eager engine.
        with isolated_randomness(batch):
            before = eager(None)
        with isolated_randomness(batch):
            after = eager(None, rounded_once_more)
        return difference(found, truth, examples, (before, after))

    def _step(self, key: Any, plan: Plan | None, rule: ClipRule) -> CompiledStep | None:
        """The step for this input signature and plan; None where there is none to be had."""
        if key not in self.steps and len(self.steps) >= MOST_SIGNATURES:
            self._give_up(key, f"it has met {MOST_SIGNATURES} input signatures: pad batches to fewer shapes")
        step = self.steps.get(key)
        if key in self.steps and (step is None or step.plan is plan):
            return step
        self.plans[key] += 1
        # beyond some plans without a word: what changed them may be private
        fresh = self.plans[key] <= MOST_GRAPHS
        self.steps[key] = CompiledStep(self.model, self.loss_fn, plan, rule) if fresh else None
        return self.steps[key]

    def _give_up(self, key: Any, reason: str) -> None:
        self.steps[key] = None
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"compile=True has no effect on this model, which runs uncompiled: {reason}.", stacklevel=5
            )


class CompiledStep:
    """A step for one input signature and one plan: a graph for each state that Dynamo's guards tell apart."""

    def __init__(self, model, loss_fn, plan: Plan | None, rule: ClipRule):
        self.plan, self.rule = plan, rule
        self.graphs: list[Graph] = []
        #: what is under way
        self.parameters: dict[str, Tensor] = {}
        self.examples: frozenset[int] = frozenset()
        self.mask: Tensor
        #: which graph was called, and what it returned
        self.called: Graph | None = None
        self.found: list[Tensor] = []

        def losses(batch: Any) -> Tensor:
            return loss_fn(model, batch)

        self._losses = torch.compile(
            _with_code_of_its_own(losses), backend=self._backend, fullgraph=True, dynamic=False
        )

    def __call__(self, parameters: dict[str, Tensor], batch: Any, mask: Tensor) -> ClippedSum | None:
        """The clipped sum; None for a batch that is for the eager engine.

        Raises:
            Untraceable: there is no graph for it, and there will be none.
        """
        if mask.is_cuda and torch.get_float32_matmul_precision() != "highest":
            raise Untraceable("TF32 is on, and one graph cannot keep it from the norms")
        batch = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, batch)
        self.examples = frozenset(id(t) for t in tree_leaves(batch) if isinstance(t, Tensor))
        self.parameters, self.mask, self.called = parameters, mask, None
        try:
            with torch.enable_grad():
                losses = self._losses(batch)
        except (Untraceable, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise Untraceable(f"torch.compile cannot trace it ({_first_line(error)})") from error
        finally:
            found, self.found, self.parameters = self.found, [], {}
        if self.called is None or losses is not found[-2]:
            raise Untraceable("torch.compile is switched off, or the losses are not what its graph returns")
        *sums, norms, values, ordinary = found
        if not bool(ordinary):
            return None
        bound = self.rule.sensitivity if self.plan is not None else float("inf")
        return ClippedSum(owned(dict(zip(parameters, sums))), norms, values, bound)

    def _backend(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Graph:
        """What Dynamo hands its graph to; nothing is compiled before it is first called."""
        self.graphs.append(Graph(self, graph))
        return self.graphs[-1]


class Graph:
    """One graph of Dynamo's and the private step made of it. Dynamo calls it in the model's place."""

    def __init__(self, step: CompiledStep, forward: torch.fx.GraphModule):
        self._step = weakref.proxy(step)
        self._forward = forward
        self._inputs: Inputs
        self._compiled: Callable[..., Any] | None = None
        #: whether a batch has been clipped in both ways, and they agreed
        self.rehearsed = False

    def __call__(self, *tensors: Any) -> tuple[Tensor, ...]:
        step = self._step
        if self._compiled is None:
            self._compiled = self._compile(tensors)
        given = self._inputs.parameters_among(tensors)
        if any(given.get(name) is not p for name, p in step.parameters.items()):
            raise Untraceable("its parameters are exchanged for others between the steps")
        # until it is rehearsed, the eager engine will draw the same random numbers
        alone = contextlib.nullcontext() if self.rehearsed else isolated_randomness(tensors)
        with alone, torch.no_grad(), full_precision(step.mask.device):
            step.found = list(self._compiled(step.mask, *[t.detach() for t in tensors]))
        step.called = self
        return (step.found[-2],)

    def _compile(self, tensors: tuple[Any, ...]) -> Callable[..., Any]:
        """Trace the private step on fake tensors, under the caller's autocast, and compile what came out."""
        step = self._step
        if len(step.graphs) > MOST_GRAPHS:
            raise Untraceable("what it reads of Python's state changes from step to step")
        if not all(isinstance(t, Tensor) for t in tensors):
            raise Untraceable("its forward pass depends on numbers that change")
        names = {id(p): name for name, p in step.parameters.items()}
        self._inputs = Inputs(
            tuple(names.get(id(t)) for t in tensors), tuple(id(t) in step.examples for t in tensors)
        )
        if missing := set(step.parameters) - set(self._inputs.parameters):
            raise Untraceable(f"{listed(sorted(missing))} takes no part in the graph")
        order = tuple(step.parameters)
        if step.plan is None:
            function = ordinary_step(self._forward, self._inputs, order, len(step.mask))
        else:
            function = private_step(self._forward, self._inputs, order, step.plan, len(step.mask), step.rule)
        with warnings.catch_warnings(), isolated_randomness(tensors):
            warnings.simplefilter("ignore")  # of torch's own making
            trace = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)
            graph = trace(step.mask, *tensors)
            with torch.no_grad(), full_precision(step.mask.device):
                return by_inductor(graph, [step.mask, *(t.detach() for t in tensors)])


def by_inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A graph of aten operations, compiled for inputs like these."""
    # On a CPU Inductor would lay all images out with channels last, which is not always faster.
    on_cpu = all(t.device.type == "cpu" for t in inputs)
    layouts = {} if not on_cpu or channels_lie_last(graph) else {"layout_optimization": False}
    return torch._inductor.compile(graph, inputs, options=OPTIONS | layouts)


def channels_lie_last(graph: torch.fx.GraphModule) -> bool:
    """Whether most of what is convolved lies so, as the model computes it."""
    nodes = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
    images = [node.args[0].meta["val"] for node in nodes]
    last = sum(x.numel() for x in images if is_channels_last(x))
    return 2 * last > sum(x.numel() for x in images)


def difference(
    found: ClippedSum, truth: ClippedSum, examples: int, rounding: tuple[ClippedSum, ClippedSum] | None = None
) -> str:
    """What of a compiled step differs from the eager one by more than rounding, "" if nothing does.

    Args:
        rounding: two eager steps between which the examples were rounded once more.
    """
    kinds = {g.dtype for g in found.grads.values()} | {found.losses.dtype}
    tolerance = max(TOLERANCE.get(kind, 0.1) for kind in kinds)
    before, after = rounding or (truth, truth)
    moved = (after.norms - before.norms).abs() * ROUNDINGS
    allowed = tolerance * truth.norms + moved.clamp(max=MOST_ROUNDING * truth.norms)
    close = (found.norms - truth.norms).abs() <= allowed
    if not bool((close | (found.norms.isnan() & truth.norms.isnan())).all()):
        return "the norms"
    bound = truth.clip_norm * examples
    if bound == float("inf"):  # without privacy
        bound = max(float(g.norm()) for g in truth.grads.values())
    for name, want in truth.grads.items():
        scale = float(want.norm()) + 1e-2 * bound
        amplified = ROUNDINGS * float((after.grads[name] - before.grads[name]).norm())
        allowed = tolerance * scale + min(amplified, MOST_ROUNDING * scale)
        if not float((found.grads[name] - want).norm()) <= allowed:
            return f"the sums of {name}"
    return ""


def rounded_once_more(batch: Any) -> Any:
    """The batch with each floating-point number moved by as much as rounding may move it."""

    def moved(t: Any) -> Any:
        if not (isinstance(t, Tensor) and t.is_floating_point()):
            return t
        up = torch.arange(t.numel(), device=t.device).reshape(t.shape) % 3 - 1  # down, not at all, up
        return t * (1 + up * torch.finfo(t.dtype).eps).to(t.dtype)

    return tree_map(moved, batch)


def _with_code_of_its_own(function: types.FunctionType) -> types.FunctionType:
    """A copy that Dynamo, which keeps graphs and their limit by code object, tells from others."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_count)}")
    return types.FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)


_count = itertools.count()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")
