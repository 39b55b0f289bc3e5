"""One forward pass in which every meeting of a parameter and data is recorded as a use.

A value is *data* if it depends on an example, *parameter-only* if it depends on parameters and on
no example, and neither if it is a constant. Parameter-only values are computed by ordinary
autograd; where one meets data it enters detached, through an autograd function that hands the
other operand and the gradient of the output to the use. So no parameter receives an ordinary
gradient: nothing is computed twice, and whatever escapes capture shows itself (the escape guard
in ``guards.py``).

The mode only classifies and dispatches; what each operation does is in ``operations``.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from .errors import CARRIED, WRITTEN, Refused
from .shards import is_sharded
from .uses.base import Rule

#: what a use hands on in the backward pass: (use, other operand, gradient of the output)
Sink = Callable[["Use", Tensor | None, Tensor], None]


def ignore(*_: Any) -> None:
    """The sink of a forward pass whose uses are not wanted, or not yet."""


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors that share memory; under tracing (``compile.py``), and before FSDP gathers what
    will lie in it, there is none yet."""
    storage = tensor.untyped_storage()
    none = isinstance(tensor, FakeTensor) or not storage.nbytes()
    return storage._cdata if none else storage.data_ptr()


MARK = "_dptrain_mark"  # on tensors of one forward pass, never on modules


def _writes(name: str) -> bool:
    """Whether an operation of this name writes into its first argument."""
    if name in ("__setitem__", "__set__"):
        return True
    if name.endswith("__"):
        return name.startswith("__i") and name != "__index__"
    return name.endswith("_")


@functools.cache
def _is_ordinary(name: str) -> bool:
    """Whether an operation of this name on data is no concern of ours but for its result, which is data."""
    from . import operations

    return not (_writes(name) or name == "register_hook" or operations.is_special(name))


class Sort(Enum):
    CONSTANT = 0
    PARAMETER = 1
    DATA = 2


class Mark:
    """What a tensor is in one forward pass; in the next one it is another's."""

    def __init__(self, sort: Sort):
        self.sort = sort


@dataclass(eq=False)
class Use:
    """A parameter-only ``value`` met data in the ``index``-th use of this forward pass."""

    index: int
    rule: Rule
    value: Tensor
    operation: str
    #: weak, so that a finished step is freed at once and not when the collector comes by
    capture: weakref.ref[Capture] = field(repr=False)
    #: what the operation yielded, without a bias, where ``Capture.results`` asks for it
    result: Tensor | None = field(default=None, repr=False)

    def arrive(self, a: Tensor | None, g: Tensor) -> None:
        """Called by autograd functions in the backward pass."""
        capture = self.capture()
        if capture is None or not capture.armed:
            raise Refused(
                "the model differentiates within its own forward pass, which cannot be followed: "
                "compute that derivative in closed form or without the parameters."
            )
        capture.sink(self, a, g)


class Capture(TorchFunctionMode):
    """Use as a context around a forward pass; then back-propagate to ``anchor`` alone.

    Args:
        parameters: the trainable leaves by name.
        sink: receives each use in the backward pass.
        layouts: where the examples lie by use index, once the probe has learnt it; the generic
            rule needs it in the forward pass.
        batch_size: number of examples.
        others: further parameters, into which no data may be written either.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        batch_size: int,
        sink: Sink,
        layouts: dict[int, Any] | None = None,
        others: Iterable[Tensor] = (),
    ):
        super().__init__()
        self.names = {id(p): name for name, p in parameters.items()}
        guarded = [*parameters.values(), *others]
        # where they lie and, for those that FSDP gathers in between, what holds them
        self._guarded = {storage_key(p) for p in guarded} | {p.untyped_storage()._cdata for p in guarded}
        self.batch_size = batch_size
        self.sink = sink
        self.layouts = layouts
        self.uses: list[Use] = []
        self._reference = weakref.ref(self)
        #: output shapes of the generic rule by its index, so that the probe can compare two sizes
        self.generic: list[Any] = []
        first = next(iter(parameters.values()))
        self.anchor = torch.zeros((), device=first.device, dtype=first.dtype, requires_grad=True)
        #: whether a backward pass of ours is under way
        self.armed = False
        #: uses, by index, that want to see the result of their operation in the backward pass
        self.results: frozenset[int] = frozenset()
        self._data, self._parameter = Mark(Sort.DATA), Mark(Sort.PARAMETER)
        self._replay: list[Use] | None = None
        #: whether rows may have been sent from one example's place to another's
        self.scattered = False
        #: whether the model hooks the gradient of an activation
        self.hooked = False
        #: whether something intercepted saved tensors, as activation checkpointing does
        self.checkpointed = False

    # ------------------------------------------------------------------ what a tensor is

    def mark_data(self, out: Any) -> Any:
        """Declare every tensor in ``out`` to depend on the examples."""
        if isinstance(out, Tensor):
            setattr(out, MARK, self._data)
        elif isinstance(out, (list, tuple)):
            for item in out:
                self.mark_data(item)
        elif isinstance(out, dict):
            for item in out.values():
                self.mark_data(item)
        return out

    def sort(self, tensor: Tensor) -> Sort:
        mark = getattr(tensor, MARK, None)
        if mark is self._data:
            return Sort.DATA
        if isinstance(mark, Mark) and mark.sort is Sort.DATA:
            raise Refused(CARRIED)
        if not tensor.requires_grad or tensor is self.anchor:
            return Sort.CONSTANT
        if mark is self._parameter or id(tensor) in self.names:
            return Sort.PARAMETER
        if tensor.grad_fn is None:
            if tensor._base is not None:  # a view made under no_grad, which hands no gradient on
                return Sort.CONSTANT
            if is_sharded(tensor):  # FSDP at work: what it gathers is known
                return Sort.CONSTANT
            raise Refused(
                f"the forward pass uses a tensor of shape {tuple(tensor.shape)} that requires a "
                "gradient but is no parameter of the model: register it on the model, or call "
                "requires_grad_(False) on it."
            )
        # made out of our sight, for example by a custom autograd function: its graph tells
        if self._reaches_anchor(tensor):
            setattr(tensor, MARK, self._data)
            return Sort.DATA
        setattr(tensor, MARK, self._parameter)
        return Sort.PARAMETER

    def _reaches_anchor(self, tensor: Tensor) -> bool:
        stack, seen = [tensor.grad_fn], set()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if getattr(node, "variable", None) is self.anchor:
                return True
            stack += [parent for parent, _ in node.next_functions]
        return False

    def holds_data(self, tensor: Tensor) -> bool:
        """Whether this forward pass has put data into a tensor; unlike ``sort`` it asks no further."""
        return getattr(tensor, MARK, None) is self._data

    def is_parameter(self, item: Any) -> bool:
        return isinstance(item, Tensor) and self.sort(item) is Sort.PARAMETER

    def is_data(self, item: Any) -> bool:
        return isinstance(item, Tensor) and self.sort(item) is Sort.DATA

    def _sorts(self, items: Iterable[Any], depth: int = 3) -> tuple[bool, bool]:
        """(any data, any parameter-only) among the arguments of a call."""
        data = parameter = False
        for item in items:
            if isinstance(item, Tensor):
                kind = self.sort(item)
                data |= kind is Sort.DATA
                parameter |= kind is Sort.PARAMETER
            elif depth and isinstance(item, (list, tuple)):
                d, p = self._sorts(item, depth - 1)
                data, parameter = data | d, parameter | p
            elif depth and isinstance(item, dict):
                d, p = self._sorts(item.values(), depth - 1)
                data, parameter = data | d, parameter | p
        return data, parameter

    # ------------------------------------------------------------------ recording

    def use(self, rule: Rule, value: Tensor, operation: str) -> Use:
        """Record the next use; in a recomputation, the one that was recorded at first."""
        if value.is_complex():
            raise Refused(
                f"{operation} uses a complex value made of parameters, for which there is no rule: "
                "write it with real and imaginary parts."
            )
        if self._replay is not None:
            # the graph of a recomputation is thrown away: only what it saves is wanted
            return Use(-1, rule, value.detach(), operation, self._reference)
        if not self.checkpointed:
            self.checkpointed = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        use = Use(len(self.uses), rule, value, operation, self._reference)
        self.uses.append(use)
        return use

    # ------------------------------------------------------------------ dispatch

    def __torch_function__(self, func, types_, args=(), kwargs=None):
        kwargs = kwargs or {}
        data, parameter = self._sorts(args)
        if kwargs:
            d, p = self._sorts(kwargs.values())
            data, parameter = data | d, parameter | p
        return self.call(func, args, kwargs, data, parameter)

    def call(self, func, args, kwargs, data: bool, parameter: bool) -> Any:
        if data and not parameter and _is_ordinary(getattr(func, "__name__", "")) and "out" not in kwargs:
            out = func(*args, **kwargs)
            if type(out) is Tensor:
                setattr(out, MARK, self._data)
                return out
            return self._marked_results(out)
        return self._call(func, args, kwargs, data, parameter)

    def _call(self, func, args, kwargs, data: bool, parameter: bool) -> Any:
        from . import operations

        if data and not self.scattered:
            self.scattered = operations.scatters(self, func, args, kwargs)
        if parameter and torch._C._functorch.maybe_current_level() is not None:
            raise Refused(
                "parameters are used under a transform of torch.func (vmap, grad, jvp), which cannot be "
                "followed: write it with ordinary operations."
            )
        if (data or parameter) and getattr(func, "__name__", "") in operations.METADATA:
            return operations.metadata(self, func, args, kwargs)
        if data and parameter and (settled := operations.chosen(self, func, args)) is not None:
            return operations.parameter_only(self, func, settled, kwargs)
        if data and parameter and torch.is_grad_enabled():
            return self.mark_data(operations.mixed(self, func, args, kwargs))
        if parameter and not data:
            return operations.parameter_only(self, func, args, kwargs)
        if data:
            operations.refuse_batch_statistics(func, args, kwargs)
        out = func(*args, **kwargs)
        if data:
            self.hooked |= getattr(func, "__name__", "") == "register_hook"
            self._mark_targets(func, args, kwargs)
            out = self._marked_results(out)
        return out

    def _marked_results(self, out: Any) -> Any:
        if isinstance(out, Iterator):  # ``for row in tensor``
            return iter(self.mark_data(list(out)))
        return self.mark_data(out)

    def _mark_targets(self, func, args, kwargs) -> None:
        """Declare that an operation has written data into some of its arguments, if it has."""
        if _writes(getattr(func, "__name__", "")):
            target = args[0]
            self._check_target(target)
            self.mark_data(target)
            if isinstance(target, Tensor) and target._base is not None:
                self.mark_data(target._base)
        if "out" in kwargs:
            self.mark_data(kwargs["out"])

    def _check_target(self, target: Any) -> None:
        """Data written into a parameter would be released as it is; ``.data`` hides it from autograd."""
        if isinstance(target, Tensor):
            storage = target.untyped_storage()
            if storage._cdata in self._guarded or storage_key(target) in self._guarded:
                raise Refused(WRITTEN)

    def __call__(self, func, *args, **kwargs) -> Any:
        """Call ``func`` as the model would: rules are written in terms of other operations."""
        return self.__torch_function__(func, (), args, kwargs)

    def reenter(self, func: types.FunctionType, args, kwargs) -> Any:
        """Run a Python function of torch so that the calls inside it are seen one by one.

        Such functions begin with ``if has_torch_function(...)``, which is true under a mode and
        would send us round in circles; we run a copy that finds it false.
        """
        with self:
            return _transparent(func)(*args, **kwargs)

    # ------------------------------------------------------------------ recomputation

    @property
    def replaying(self) -> bool:
        """Whether an activation checkpoint is being recomputed."""
        return self._replay is not None

    def differentiate(self, outputs, inputs, grad_outputs=None, **options) -> tuple[Tensor | None, ...]:
        """``torch.autograd.grad``, in which activation checkpoints recompute as they computed."""
        context = _Recomputation(self) if self.checkpointed else contextlib.nullcontext()
        with context:
            return _transparent(torch.autograd.grad)(outputs, inputs, grad_outputs, **options)


class _Recomputation(TorchFunctionMode):
    def __init__(self, capture: Capture):
        super().__init__()
        self.capture = capture

    def __torch_function__(self, func, types_, args=(), kwargs=None):
        self.capture._replay = []
        try:
            return self.capture.__torch_function__(func, types_, args, kwargs or {})
        finally:
            self.capture._replay = None


@functools.cache
def _transparent(func: types.FunctionType) -> types.FunctionType:
    scope = dict(func.__globals__)
    for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
        scope[name] = lambda *a, **k: False
    copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy
