"""The paper's runs on many GPUs, simulated: fitted to non-private training, then predicting private training.

What is known, and from where (arXiv 2406.17298 and the scripts published with it):

* ViT-Base, 86.6 million parameters (Table 1); V100, four in a node; largest physical batches of 216 and 28
  (Table 2); an A100 is 1.3 times as fast, and 1.46 times with Opacus (section 5.1).
* Seconds of the sections of a physical batch on an A100 (Table A3), with the synchronisation that profiling
  needs. They give the scale, the share of the backward pass and the end of a step.
* Private training is at most 3.1 times slower than non-private, each at its largest batch (section 4.2,
  ViT-Huge), and at least 2.6 times (abstract of the paper's later version). The middle is taken for ViT-Base;
  `RATIOS` are the ends. (Table A3 has 3.3, but synchronisation weighs most where kernels are many and small.)
* The published script wraps non-private training in PyTorch's DistributedDataParallel and never asks it not
  to synchronise: it reduces after every physical batch, in buckets of 25 MB, while the backward pass goes on.
  Opacus reduces once in a logical step, one tensor after another, when all is computed.
* On several GPUs the non-private loader drops the incomplete batch of an epoch, so that one of 50,000
  examples is left, twice the private L of 25,000. All processes start from one seed, so that all draw equally
  many examples.

Assumed beyond that: the nodes are those of CSC's Puhti, which the paper's thanks suggest (two rails of 100
Gbit/s between them, NVLink within); a hop takes 5 microseconds; the slowest GPU takes 4 % longer (GPUs of one
kind vary by 8 %: Sinha et al., Not All GPUs Are Created Equal, SC 2022). The last was added when the model
had missed by 5.1 points without it.

The bandwidth that the fit finds is a hundredth of what the links can carry. So it stands for all that made
GPUs wait for each other, such as loaders without workers, and says nothing of the network. `variants` has
what comes out under other assumptions, some of which miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from dptrain.bench import Record, simulation
from dptrain.bench.simulation import Network, Reduction, Step, Training

GRADIENT_BYTES = 4 * 86.6e6
DEVICES = 80
NON_PRIVATE_EFFICIENCY = 0.533
PRIVATE_EFFICIENCY = 0.692
PARALLEL_FRACTIONS = {"non-private": 0.989, "private": 0.995}
RATIO, RATIOS = 2.85, (2.6, 3.1)
#: of our speed to the non-private one, ViT-Base (docs/performance.md)
OURS = 0.88
#: of Table A3, in seconds on an A100
FORWARD_S, BACKWARD_S, END_S = 0.08114, 0.16385, 0.03817
PRIVATE_FORWARD_S, PRIVATE_BACKWARD_S, CLIP_S, PRIVATE_END_S = 0.10153, 0.68148, 0.02676, 0.09965
#: the batch of Table A3 is not told; the published example has this one, and Opacus fits 35
PROFILED_BATCH = 32
#: V100 for A100
SLOWER, SLOWER_OPACUS = 1.3, 1.46
#: 86.6 million parameters in DistributedDataParallel's buckets of 25 MB, and in tensors
BUCKETS, TENSORS = 14, 152
SPREAD = 1.04
#: of a throughput record
PARTS = ("later_physical_step", "end_of_logical_step")

V100_NODES = Network(
    devices_per_node=4,
    intra_node_bandwidth=130e9,
    inter_node_bandwidth=25e9,
    intra_node_latency_s=5e-6,
    inter_node_latency_s=5e-6,
)
UP_TO_1000 = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 128, 256, 512, 768, 1000)


def non_private() -> Training:
    """Non-private training of the published script on V100s."""
    per_example_s = SLOWER * (FORWARD_S + BACKWARD_S) / PROFILED_BATCH
    backward = BACKWARD_S / (FORWARD_S + BACKWARD_S)
    step = Step(216, 216 * per_example_s, SLOWER * END_S, backward)
    return Training(step, Reduction(GRADIENT_BYTES, "physical", BUCKETS, overlap=1.0), 50_000, SPREAD)


def private(ratio: float = RATIO) -> Training:
    """Opacus on V100s; `ratio`: how many times slower than non-private training it is on an A100."""
    per_example_s = ratio * SLOWER_OPACUS * (FORWARD_S + BACKWARD_S) / PROFILED_BATCH
    backward = PRIVATE_BACKWARD_S / (PRIVATE_FORWARD_S + PRIVATE_BACKWARD_S + CLIP_S)
    step = Step(28, 28 * per_example_s, SLOWER_OPACUS * PRIVATE_END_S, backward)
    return Training(step, Reduction(GRADIENT_BYTES, "logical", TENSORS), 25_000, SPREAD)


def ours(ratio: float = OURS) -> Training:
    """dptrain on V100s: one bucketed reduction in a logical step, as tests count; `ratio`: of its speed on
    one device to that of non-private training. That the reduction hides behind the last physical batch is
    left out."""
    public = non_private()
    step = replace(public.step, physical_step_s=public.step.physical_step_s / ratio)
    return Training(step, Reduction(GRADIENT_BYTES, "logical", BUCKETS), 25_000, SPREAD)


def fitted(training: Training) -> Network:
    """The nodes, with the bandwidth between them at which non-private training has its 53.3 % on 80 GPUs."""
    return simulation.fit_inter_node_bandwidth(training, V100_NODES, DEVICES, NON_PRIVATE_EFFICIENCY)


def predicted(public: Training, secret: Training) -> float:
    """Efficiency of private training on 80 GPUs, once the network explains the non-private one."""
    return simulation.efficiency(secret, fitted(public), DEVICES)


def variants() -> dict[str, float]:
    """What is predicted under other assumptions, those that miss included."""
    public, secret = non_private(), private()
    equal = replace(public, logical_batch=25_000)
    once = replace(equal, reduction=secret.reduction)
    profiled = (PRIVATE_FORWARD_S + PRIVATE_BACKWARD_S + CLIP_S) / (FORWARD_S + BACKWARD_S)

    def alike(training: Training) -> Training:
        return replace(training, spread=1.0)

    return {
        "as published": predicted(public, secret),
        "all GPUs equally fast": predicted(alike(public), alike(secret)),
        "private 2.6 times slower": predicted(public, private(RATIOS[0])),
        "private 3.1 times slower": predicted(public, private(RATIOS[1])),
        "private 3.3 times slower, as in Table A3": predicted(public, private(profiled)),
        "private devices sample independently": predicted(public, replace(secret, sample_rate=0.5)),
        "non-private with the private L": predicted(equal, secret),
        "non-private with the private L, both reduce once in a logical step": predicted(once, secret),
    }


def prediction() -> dict[str, Any]:
    """JSON-ready: what was fitted, what came out, and what the paper measured."""
    public, secret = non_private(), private()
    network = fitted(public)
    return {
        "fitted": {"non-private": NON_PRIVATE_EFFICIENCY, "devices": DEVICES},
        "effective_bandwidth_bytes_per_s": network.inter_node_bandwidth,
        "link_bandwidth_bytes_per_s": V100_NODES.inter_node_bandwidth,
        "private_efficiency": simulation.efficiency(secret, network, DEVICES),
        "paper_private_efficiency": PRIVATE_EFFICIENCY,
        "paper_parallel_fractions": PARALLEL_FRACTIONS,
        "dptrain": {
            "efficiency": simulation.efficiency(ours(), network, DEVICES),
            "efficiency_on_links_as_built": simulation.efficiency(ours(), V100_NODES, DEVICES),
            "times_opacus": simulation.examples_per_s(ours(), network, DEVICES)
            / simulation.examples_per_s(secret, network, DEVICES),
        },
        "variants": variants(),
    }


def curves(devices: Sequence[int] = UP_TO_1000) -> dict[str, list[list[float]]]:
    """``{"private" | "non-private" | "dptrain": [[devices, examples per second], ...]}``, in the paper's
    setting."""
    network = fitted(non_private())
    kinds = {"private": private(), "non-private": non_private(), "dptrain": ours()}
    return {kind: [[n, x] for n, x in simulation.curve(t, network, devices)] for kind, t in kinds.items()}


def measured_curves(record: Record, devices: Sequence[int] = UP_TO_1000) -> dict[str, list[list[float]]]:
    """Curves for a case's throughput and its baseline's, on the paper's nodes as they are built.

    Both reduce once in a logical step of 25,000 examples, of which every device draws its own with q = 1/2.
    """
    results, batch = record.results, record.case.batch_size
    contestants = results["contestants"]
    own = next(c for c in contestants.values() if c["role"] == "case")
    reduction = Reduction(4.0 * results["trains"]["parameters"], messages=BUCKETS)

    def training(contestant: dict[str, Any]) -> Training:
        physical_s, end_s = (median(contestant[f"raw_{part}_s"]) for part in PARTS)
        return Training(Step(batch, physical_s, end_s), reduction, 25_000, SPREAD, sample_rate=0.5)

    kinds = {"private": training(own), "non-private": training(contestants[results["baseline"]])}
    return {kind: [[n, x] for n, x in simulation.curve(t, V100_NODES, devices)] for kind, t in kinds.items()}
