"""A run on the terminal: what it will do, how far it is, what it guarantees."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dptrain.core.mechanism import Mechanism
from dptrain.torch.physical_batch import Trial
from dptrain.training import Outcome, Run, RunFolder, Score, TrainConfig
from dptrain.training.loop import Step, Unprotected
from dptrain.training.outcome import compression
from dptrain.training.run_folder import CONFIG

NO_GUARANTEE = "the mask comes from private gradients, and the noise does not hide it"
UNPROTECTED = "UNPROTECTED (not covered by epsilon)"


class RunDisplay:
    """A listener that shows a run. Use it as a context manager."""

    def __init__(self, console: Console, config: TrainConfig) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._status = console.status(
            escape(f"Loading {config.data} and {config.model}, calibrating the noise ...")
        )
        self._task: TaskID | None = None
        self._accuracy = ""

    def __enter__(self) -> RunDisplay:
        self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._status.stop()
        self._progress.stop()

    def prepared(self, run: Run, folder: RunFolder) -> None:
        self._status.stop()
        show_plan(self._console, run, folder)
        self._status.update("Planning and measuring the clipping of this model ...")
        self._status.start()
        self._steps = run.mechanism.steps
        self._held_out_name = run.held_out_name

    def compiles(self) -> None:
        self._status.update("Compiling the private step, which can take a minute or two ...")

    def chose_physical_batch_size(self, size: int, trials: list[Trial]) -> None:
        self._status.stop()
        if trials:
            seen = ", ".join(f"{trial.size}: {trial.examples_per_s:,.0f}/s" for trial in trials)
            self._console.print(
                f"Physical batch size {size} (measured on stand-in data: {seen}).", highlight=False
            )
        self._console.print("Speed below is steps/s times the public expected batch size.", style="dim")
        self._task = self._progress.add_task("training", total=self._steps, state="")
        self._progress.start()

    def resumed(self, taken: int, lost: int, repeats: bool) -> None:
        assert self._task is not None
        self._progress.update(self._task, completed=taken)
        text = f"Goes on after step {taken}"
        if lost:
            how = "repeated bit for bit" if repeats else "drawn afresh and paid for again"
            text += f"; {lost} releases after it were lost, and are {how}"
        self._progress.console.print(f"{text}.", highlight=False)

    def noted(self, note: str) -> None:
        self._progress.console.print(f"[bold yellow]note:[/] {escape(note)}", highlight=False)

    def stepped(self, step: Step, epsilon: float, examples_per_s: float) -> None:
        assert self._task is not None
        state = f"{_epsilon(epsilon)}  {examples_per_s:,.0f}/s{self._accuracy}"
        self._progress.update(self._task, completed=step.number, state=state)
        if step.unprotected is not None:
            self._progress.console.print(_unprotected(step.number, step.unprotected), highlight=False)

    def evaluated(self, step: int, score: Score, epsilon: float) -> None:
        self._accuracy = f"  {self._held_out_name} {score.accuracy:.1%}"


CLIPPING = {
    "flat": "to an L2 norm of {}",
    "automatic": "normalised to an L2 norm of {}",
    "per-layer": "layer by layer, to an L2 norm of {} in all",
    "quantile": "to an L2 norm that begins at {} and follows a quantile",
}


def _over_steps(mechanism: Mechanism, name: str) -> str:
    """A quantity of the steps: one number, or the first and the last."""
    first, last = (getattr(mechanism.step(i), name) for i in (0, mechanism.steps - 1))
    return f"{first:.4g}" if first == last else f"{first:.4g} to {last:.4g}"


def show_plan(console: Console, run: Run, folder: RunFolder) -> None:
    """Everything that the run is about to do."""
    config, mechanism = run.config, run.mechanism
    table = _table("What this run does")
    table.add_row(
        "data",
        escape(
            f"{run.train.name}: {len(run.train):,} examples {list(run.train.input_shape)}, "
            f"{run.train.num_classes} classes"
        ),
    )
    table.add_row("model", escape(f"{config.model}, training {run.trainable}"))
    if run.weights is not None:
        table.add_row("weights", escape(f"{config.weights or config.model}: {run.weights}"))
    if run.conversion is not None:
        converted, left = len(run.conversion.converted), len(run.conversion.left_alone)
        table.add_row("converted", f"{converted} BatchNorm layers to GroupNorm, {left} left alone")
    average = f", weights averaged ({config.weight_average:g})" if config.weight_average else ""
    table.add_row("optimizer", f"{config.optimizer}, lr {config.lr:g} {config.lr_schedule}{average}")
    most = f", at most {config.max_logical_batch_size}" if config.max_logical_batch_size else ""
    size, rate = (_over_steps(mechanism, name) for name in ("expected_batch_size", "sample_rate"))
    table.add_row("batches", f"Poisson, {size} expected (q = {rate}){most}, {mechanism.steps:,} steps")
    if config.augmentations:
        table.add_row("views", f"{config.augmentations} of each image, averaged before clipping")
    if run.public is not None:
        table.add_row("public data", f"{len(run.public):,} training examples, which epsilon does not cover")
    if kept := compression(run):
        table.add_row("compression", kept)
    if run.is_private:
        rule = CLIPPING[mechanism.step(0).clip_rule.name]
        table.add_row("clipping", f"{run.method}, {rule.format(_over_steps(mechanism, 'sensitivity'))}")
        noise = _over_steps(run.in_vain or mechanism, "noise_multiplier")
        table.add_row("noise", f"{noise} x clip norm")
    if run.in_vain is not None:
        table.add_row("privacy", f"[bold red]NONE[/]: {NO_GUARANTEE}, epsilon = inf")
    if not run.is_private:
        table.add_row(
            "privacy", "[bold red]NONE[/]: non-private method, no clipping, no noise, epsilon = inf"
        )
    table.add_row("randomness", _randomness(run))
    table.add_row("device", f"{_device(run)}, {config.precision}{', compiled' if config.compile else ''}")
    table.add_row("run folder", escape(str(folder.path)))
    console.print(table)
    if run.is_private and mechanism.delta is not None and mechanism.delta * len(run.train) >= 1:
        console.print(
            f"[bold yellow]note:[/] delta = {mechanism.delta:g} is not below 1/N = "
            f"{1 / len(run.train):.2g}; choose a smaller --delta."
        )
    if config.show_unprotected:
        console.print(
            f"[bold yellow]note:[/] values marked {UNPROTECTED} reveal private data; keep them to yourself."
        )


def show_outcome(console: Console, outcome: Outcome) -> None:
    """The closing table: the result, and every quantity of the guarantee."""
    run, score = outcome.run, outcome.score
    title = "Interrupted: spent so far" if outcome.interrupted else "Result"
    table = _table(title)
    table.add_row(
        f"{run.held_out_name} accuracy",
        f"[bold]{score.accuracy:.2%}[/] of {score.examples:,} examples",
    )
    table.add_row(f"{run.held_out_name} loss", f"{score.loss:.4f}")
    table.add_row("training time", f"{outcome.training_s:.1f} s")
    table.add_row("method", run.method)
    if run.public is not None:
        table.add_row("public data", f"{len(run.public):,} training examples, declared so")
    if kept := compression(run):
        wire = outcome.wire
        table.add_row("compression", kept)
        table.add_row(
            "bytes per step",
            f"{wire.sum_bytes:,} for the sum, {wire.release_bytes:,} for the noisy gradient; "
            f"{wire.dense_bytes:,} each without compression",
        )
    if run.in_vain is not None:
        table.add_row("privacy", f"[bold red]none: epsilon = inf[/]: {NO_GUARANTEE}")
    elif run.is_private:
        table.add_section()
        table.add_row("epsilon spent", f"[bold]{outcome.epsilon:.4g}[/] for {_releases(outcome)}")
        for name, value in run.mechanism.describe(run.config.accountant).items():
            if name == "epsilon":
                name = "epsilon of the whole run"
            table.add_row(name, value)
        table.add_row("randomness", _randomness(run))
        table.add_row("covered by epsilon", "the saved weights and every value shown without a mark")
    else:
        table.add_row("privacy", "[bold red]none: epsilon = inf[/]")
    table.add_section()
    table.add_row("run folder", escape(str(outcome.folder.path)))
    again = (
        f"--resume {outcome.folder.path}"
        if outcome.interrupted
        else f"--config {outcome.folder.path / CONFIG}"
    )
    table.add_row("go on with" if outcome.interrupted else "repeat with", escape(f"dptrain train {again}"))
    console.print(table)


def _randomness(run: Run) -> str:
    if run.key.reproducible:
        return "from --seed: reproducible; whoever knows the seed can remove the noise"
    kept = "; while it runs, its key is kept outside the run folder" if run.config.restart == "replay" else ""
    return f"operating system{kept}"


def _releases(outcome: Outcome) -> str:
    lost = outcome.releases - outcome.steps
    return f"{outcome.steps:,} steps" + (f" and {lost:,} that were lost and drawn again" if lost else "")


def _device(run: Run) -> str:
    asked = run.config.device
    if run.config.engine == "torch":
        return str(run.device)
    return "JAX's default device" if asked == "auto" else f"JAX on {asked}"


def _table(title: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        show_header=False,
        box=None,
        pad_edge=False,
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _epsilon(epsilon: float) -> str:
    return f"epsilon {epsilon:.3f}" if epsilon < float("inf") else "epsilon inf"


def _unprotected(number: int, values: Unprotected) -> str:
    return (
        f"[red]{UNPROTECTED}[/] step {number}: loss {values.mean_loss:.4f}, median norm "
        f"{values.median_norm:.4g}, "
        f"{values.clipped_share:.0%} clipped, batch {values.batch_size}"
    )
