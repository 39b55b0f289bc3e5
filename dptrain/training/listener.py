"""What a run tells while it goes on."""

from __future__ import annotations

from typing import Protocol

from dptrain.torch.physical_batch import Trial
from dptrain.training.evaluation import Score
from dptrain.training.loop import Step
from dptrain.training.prepare import Run
from dptrain.training.run_folder import RunFolder


class Listener(Protocol):
    """Hears of a run; it cannot change it. Everything it hears but `Step.unprotected` is public."""

    def prepared(self, run: Run, folder: RunFolder) -> None:
        """Before the first step."""

    def compiles(self) -> None:
        """Before the step is compiled, which can take a minute."""

    def chose_physical_batch_size(self, size: int, trials: list[Trial]) -> None:
        """`trials` is empty if the size was given."""

    def resumed(self, taken: int, lost: int, repeats: bool) -> None:
        """The run goes on after `taken` steps; `lost` releases after them are made again."""

    def noted(self, note: str) -> None:
        """Something that whoever runs this should know, in a sentence."""

    def stepped(self, step: Step, epsilon: float, examples_per_s: float) -> None:
        """examples_per_s: steps per second times the public L."""

    def evaluated(self, step: int, score: Score, epsilon: float) -> None: ...


class Silent:
    """A listener that says nothing."""

    def prepared(self, run: Run, folder: RunFolder) -> None: ...

    def compiles(self) -> None: ...

    def chose_physical_batch_size(self, size: int, trials: list[Trial]) -> None: ...

    def resumed(self, taken: int, lost: int, repeats: bool) -> None: ...

    def noted(self, note: str) -> None: ...

    def stepped(self, step: Step, epsilon: float, examples_per_s: float) -> None: ...

    def evaluated(self, step: int, score: Score, epsilon: float) -> None: ...
