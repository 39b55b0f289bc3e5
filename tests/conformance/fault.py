"""A seeded fault: what it does, what that costs, and how it is planted."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from .plants.common import Patch


@dataclass(frozen=True)
class Fault:
    """A way to be wrong.

    Attributes:
        name: short, with hyphens.
        what: what the library then does.
        engines: where it can be planted, of "torch" and "jax".
        epsilon_factor: true ε over stated ε for a typical mechanism; infinite where nothing is promised
            any more, 1 where utility or the letter of the mechanism suffers and ε hardly.
        why: one line of argument for that number, and who sees the fault where not everyone does.
        caught_by: the tests of the conformance suite that must fail.
    """

    name: str
    what: str
    engines: tuple[str, ...]
    epsilon_factor: float
    why: str
    caught_by: tuple[str, ...]
    _plants: Mapping[str, Callable[..., None]] = field(repr=False)

    @property
    def is_shared(self) -> bool:
        """Whether it lies in code that both engines run."""
        return "core" in self._plants

    @contextmanager
    def planted(self, engine: str | None = None) -> Iterator[None]:
        """dptrain with this fault; what JAX compiled before does not have it, so make everything anew.

        engine: plant it there only; by default wherever it can be. Nothing else is imported.
        """
        with ExitStack() as undo:
            patch = Patch(undo)
            if "core" in self._plants:
                self._plants["core"](patch)
            for name in self.engines:
                if name in self._plants and name == (engine or name) and importlib.util.find_spec(name):
                    self._plants[name](patch)
            yield
