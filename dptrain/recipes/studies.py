"""Every figure, table and finding, by name."""

from __future__ import annotations

from collections.abc import Callable

from dptrain.bench import Case
from dptrain.recipes import adaptive_and_compressed, ml_privacy_exp, optimizers, paper
from dptrain.recipes.study import SCALES, Extras, Scale, Study, estimate_s, manifest
from dptrain.training import ConfigError

__all__ = ["SCALES", "STUDIES", "Scale", "Study", "all_cases", "estimate_s", "manifest", "study"]

_GPU = "The scale paper needs a GPU with 40 GB."
_V100 = (
    "The scale paper needs a GPU with 40 GB, which stands for both of the paper's by limits of 32 and 40 GiB."
)
_MNIST = "MNIST; the scale paper a GPU, or an afternoon."
_CIFAR = "The scale paper needs a GPU with 40 GB, CIFAR-100 and pre-trained weights."


def _study(
    name: str,
    title: str,
    shows: str,
    cases: Callable[[Scale], list[Case]],
    needs: str = _GPU,
    extras: Extras | None = None,
) -> Study:
    return Study(name, title, shows, needs, cases, extras)


_ALL = (
    _study(
        "fig1",
        "Figure 1: throughput relative to non-private training",
        "How much of the non-private throughput each optimisation keeps, by model size.",
        paper.fig1,
    ),
    _study(
        "fig2",
        "Figure 2: largest physical batch",
        "How many examples fit into memory with and without privacy, by model size.",
        paper.fig2,
    ),
    _study(
        "fig3",
        "Figure 3: the cost of per-example clipping",
        "How many times slower per-example clipping is than non-private training, by model size.",
        paper.fig3,
    ),
    _study(
        "fig4",
        "Figure 4: throughput and physical batch",
        "Throughput as a share of its maximum: a good enough physical batch suffices.",
        paper.fig4,
    ),
    _study(
        "fig5",
        "Figure 5: throughput at the largest batch",
        "Throughput of each clipping method at the largest physical batch that it fits.",
        paper.fig5,
        _V100,
    ),
    _study(
        "fig6",
        "Figure 6: PyTorch and JAX",
        "Throughput of methods of both frameworks by physical batch.",
        paper.fig6,
    ),
    _study(
        "fig7",
        "Figure 7: TF32",
        "Throughput of TF32 over FP32 with and without privacy, by model size.",
        paper.fig7,
        "The scale paper needs a GPU with 40 GB that has TF32 (Ampere or later).",
    ),
    _study(
        "fig8",
        "Figure 8: many GPUs",
        "Throughput by number of devices: private training loses less than non-private.",
        paper.fig8,
        "The scale paper needs up to 80 GPUs; several wait for distributed training.",
    ),
    _study(
        "fig-a1",
        "Figure A.1: compile time in JAX",
        "How long the first step takes by physical batch.",
        paper.fig_a1,
    ),
    _study(
        "fig-a2",
        "Figure A.2: TF32 on several GPUs",
        "Whether the gains of TF32 and of more devices add up.",
        paper.fig_a2,
        "The scale paper needs up to 24 GPUs that have TF32; several wait for distributed training.",
    ),
    _study(
        "fig-a3",
        "Figure A.3: many A100s",
        "Throughput by number of devices up to 24.",
        paper.fig_a3,
        "The scale paper needs up to 24 GPUs; several wait for distributed training.",
    ),
    _study(
        "fig-a4",
        "Figure A.4: Amdahl's law",
        "The parallel fraction of private and of non-private training.",
        paper.fig_a4,
        "The scale paper needs up to 80 GPUs; several wait for distributed training.",
    ),
    _study(
        "table1",
        "Table 1: parameters",
        "How many parameters the models have.",
        paper.table1,
        extras=paper.count_parameters,
    ),
    _study(
        "table2",
        "Table 2: largest physical batch by method",
        "How many examples each clipping method fits into two sizes of memory.",
        paper.table2,
        _V100,
    ),
    _study(
        "table-a1",
        "Table A1: what each library supports",
        "Which library clips exactly, refuses or clips wrongly, by family of models; measured.",
        paper.table_a1,
    ),
    _study(
        "table-a2",
        "Table A2: hyperparameters",
        "The hyperparameters that all runs have, and the accuracy they lead to.",
        paper.table_a2,
        _CIFAR,
        paper.hyperparameters,
    ),
    _study(
        "table-a3",
        "Table A3: time by section",
        "How long forward, backward, clipping and the optimizer take in a step.",
        paper.table_a3,
    ),
    _study(
        "table-a4",
        "Table A4: accuracy",
        "Test accuracy of each clipping method: the method does not matter.",
        paper.table_a4,
        _CIFAR,
    ),
    _study(
        "batch-size-accuracy",
        "Accuracy and physical batch",
        "The same accuracy at every physical batch size.",
        paper.batch_size_accuracy,
        _CIFAR,
    ),
    _study(
        "tf32-steps",
        "TF32 at the optimal number of steps",
        "The same accuracy with TF32, in less time.",
        paper.tf32_steps,
        _CIFAR,
    ),
    _study(
        "loader-workers",
        "Loading of small batches",
        "How much of a step goes into data at small and at large physical batches.",
        paper.loader_workers,
    ),
    _study(
        "dp-timing",
        "ml-privacy-exp: dp_timing",
        "How long an epoch of CIFAR-10 takes with and without privacy, for small networks.",
        ml_privacy_exp.dp_timing,
    ),
    _study(
        "dp-runtime-profile",
        "ml-privacy-exp: dp_runtime_profile",
        "Where the time of a step goes, with traces for TensorBoard and Perfetto.",
        ml_privacy_exp.dp_runtime_profile,
    ),
    _study(
        "dp-memory",
        "ml-privacy-exp: dp_memory",
        "Memory of VGG11 after gradient, clipping and noise.",
        ml_privacy_exp.dp_memory,
    ),
    _study(
        "naive-momentum",
        "ml-privacy-exp: naive_momentum",
        "What momentum makes of private gradients, whole and compressed, at the same epsilon.",
        adaptive_and_compressed.naive_momentum,
        _MNIST,
    ),
    _study(
        "public-compress",
        "ml-privacy-exp: dp_pub_compress",
        "What compression costs, and what public data are worth to it, before clipping and after the noise.",
        adaptive_and_compressed.public_compress,
        _MNIST,
    ),
    _study(
        "simulation",
        "Simulation of up to 1,000 devices",
        "What the paper's non-private scaling predicts for private training, and for more devices.",
        paper.simulation,
        "Nothing beyond one device.",
        paper.predicted,
    ),
    _study(
        "optimizers",
        "Optimizers of private gradients",
        "What momentum, Adam with and without the noise in its second moment, a filter and averages come to.",
        optimizers.optimizers,
        "Nothing beyond a processor; the scale paper trains longer, on a GPU.",
    ),
)

STUDIES: dict[str, Study] = {one.name: one for one in _ALL}


def study(name: str) -> Study:
    """The study called `name`. Raises ConfigError if there is none."""
    if name not in STUDIES:
        raise ConfigError(f"There is no study {name!r}; choose from all, {', '.join(STUDIES)}.")
    return STUDIES[name]


def all_cases(scale: Scale) -> list[Case]:
    """The cases of all studies, each once."""
    return list(dict.fromkeys(case for one in STUDIES.values() for case in one.cases(scale)))
