"""Other libraries: each takes its steps, and its clipped sum is that of single examples."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn

from dptrain.bench.case import Case
from dptrain.bench.contestant import Unsupported
from dptrain.bench.exactness import InFloat64, Reference, distance, judge, median_norm, trains
from dptrain.bench.peers import PEERS, Peer
from dptrain.bench.torch_task import Task
from dptrain.core import methods

pytestmark = [
    # said by libraries about themselves
    pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
    pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]

CASE = Case(model="simple-convnet", image_size=16, num_classes=5, batch_size=4, accumulate=2)
MODES = [
    pytest.param(peer, mode, id=f"{name}-{mode}")
    for name, peer in PEERS.items()
    if peer.framework == "torch"
    for mode in dict.fromkeys(peer.methods.values())
]


@dataclass(frozen=True)
class Small(InFloat64):
    """Remembers the models that it makes, perhaps from given weights, and steps by the gradient itself."""

    made: list[nn.Module] = field(default_factory=list)
    weights: dict[str, torch.Tensor] | None = None

    def model(self) -> nn.Module:
        self.made.append(super().model())
        if self.weights is not None:
            self.made[-1].load_state_dict(self.weights)
        return self.made[-1]

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1.0)


class WithScale(nn.Module):
    """A raw parameter, of which rules for layers know nothing, and an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3 * 8 * 8, 7)
        self.act = nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 7))
        self.head = nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.inner(x.flatten(1))) * self.scale)


def with_batch_norm(inputs: int = 3 * 8 * 8) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 7), nn.BatchNorm1d(7), nn.Linear(7, 5))


@dataclass(frozen=True)
class Given(Small):
    """Another model than those of dptrain."""

    make: Callable[[], nn.Module] = WithScale

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().double().train()


def half_clipped(task: Any) -> Any:
    return replace(task, clip_norm=median_norm(task, 4))


def contestant_of(peer: Peer, task: Task, mode: str) -> Any:
    adapter_of(peer)
    return peer.contestant(task, mode)


def adapter_of(peer: Peer) -> Any:
    try:
        return peer._adapter()
    except Unsupported as error:
        pytest.skip(str(error))


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ---------------------------------------------------------------- what the libraries do


@pytest.mark.parametrize(("peer", "mode"), MODES)
def test_clipped_sum_is_that_of_single_examples(peer, mode):
    task = half_clipped(Small(CASE))
    contestant = contestant_of(peer, task, mode)
    contestant.step()  # what is judged is what begins a run, however far the run has come
    verdict = judge(contestant, task, 3)
    assert verdict["verdict"] == "exact", verdict
    assert verdict["error_of_sum"] < 1e-9
    found = trains(contestant, task)
    assert found["parameters"] == found["of"] == sum(p.numel() for p in task.model().parameters())
    assert found["skipped"] == []


@pytest.mark.parametrize(("peer", "mode"), MODES)
def test_exact_in_float32(peer, mode):
    task = half_clipped(Task(CASE))
    assert judge(contestant_of(peer, task, mode), task, 4)["verdict"] == "exact"


@pytest.mark.parametrize(("peer", "mode"), MODES)
def test_logical_steps_average_what_physical_ones_added(peer, mode):
    """Twice, without noise: parameters move by the clipped gradients at the weights of the time, over L."""
    task = half_clipped(Small(CASE))
    training = adapter_of(peer).Training(task, mode, 0.0)
    for _ in range(2):
        before = weights_of(training.model)
        total = Reference.of(replace(task, weights=before), 4, 1e-6).total
        for _ in range(2):
            training.accumulate(task.batch)
        assert distance(training.clipped_sums(), {n: 2 * g for n, g in total.items()}) < 1e-9
        training.release()
        moved = {name: before[name] - p for name, p in weights_of(training.model).items()}
        assert distance(moved, {n: 2 * g / 8 for n, g in total.items()}) < 1e-9


@pytest.mark.parametrize(("peer", "mode"), MODES)
def test_noise_is_added_once_and_nothing_is_kept(peer, mode):
    task = half_clipped(Small(CASE))
    contestant = contestant_of(peer, task, mode)
    model = task.made[-1]
    for _ in range(2):
        before = weights_of(model)
        total = Reference.of(replace(task, weights=before), 4, 1e-6).total
        contestant.step()
        contestant.step()
        contestant.end()
        after = weights_of(model)
        noise = torch.cat([(2 * total[n] - 8 * (before[n] - after[n])).flatten() for n in total])
        assert float(noise.std()) == pytest.approx(task.clip_norm, rel=0.05)
    leftovers = ("grad", "grad_sample", "summed_grad", "private_grad", "norm_sample")
    for p in model.parameters():
        assert [name for name in leftovers if getattr(p, name, None) is not None] == []
    for module in model.modules():
        assert not getattr(module, "activations", None) and not getattr(module, "backprops", None)


@pytest.mark.parametrize(("peer", "mode"), MODES)
def test_a_parameter_without_a_rule_is_reported(peer, mode):
    task = half_clipped(Given(replace(CASE, image_size=8)))
    contestant = contestant_of(peer, task, mode)
    found, verdict = trains(contestant, task), judge(contestant, task, 4)
    assert verdict["error_of_sum"] < 1e-9
    if peer.name == "opacus":  # which differentiates what it has no rule for
        assert verdict["verdict"] == "exact" and found["skipped"] == []
        return
    assert found["skipped"] == ["scale"] and found["of"] - found["parameters"] == 7
    assert verdict["verdict"] == "WRONG"
    assert verdict["sentence"] == "It skips 1 of 5 trainable parameters."
    contestant.step()
    contestant.end()


@pytest.mark.parametrize(("peer", "mode"), MODES)
def test_batch_normalisation_is_never_called_exact(peer, mode):
    task = Given(replace(CASE, image_size=8), make=with_batch_norm)
    if peer.name == "opacus":
        with pytest.raises(Unsupported, match="opacus refuses this model: BatchNorm cannot support"):
            contestant_of(peer, task, mode)
        return
    verdict = judge(contestant_of(peer, task, mode), task, 4)
    assert verdict["verdict"] == "WRONG" and "mix" in verdict["sentence"]


@pytest.mark.parametrize(("peer", "mode"), MODES)
def test_sections_are_marked(peer, mode):
    contestant = contestant_of(peer, Task(CASE), mode)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        contestant.step()
        contestant.end()
    marked = {e.key.removeprefix("dptrain::") for e in profiler.key_averages() if "dptrain::" in e.key}
    own = {"opacus": {"clip and accumulate", "noise"}, "private-vision": {"noise"}, "fastdp": set()}
    assert marked == {"forward", "backward", "optimizer step"} | own[peer.name]


def test_private_vision_leaves_its_global_mode_as_it_was():
    peer, task = PEERS["private-vision"], Small(CASE)
    contestants = [contestant_of(peer, task, mode) for mode in ("ghost", "ghost_mixed")]
    hooks = importlib.import_module("private_vision.autograd_grad_sample")
    assert hooks.get_hooks_mode() == "default"
    for contestant in contestants + contestants:  # taking turns, each by its own mode
        contestant.step()
        assert hooks.get_hooks_mode() == "default"
    layers = [[m for m in model.modules() if isinstance(m, nn.Linear)] for model in task.made[-2:]]
    assert [all(hasattr(m, "use_gc") for m in found) for found in layers] == [False, True]


def test_fastdp_computes_ordinary_gradients_for_its_origins_alone():
    task = Small(CASE)
    training = adapter_of(PEERS["fastdp"]).Training(task, "MixOpt", 0.0)
    training.accumulate(task.batch)
    assert [n for n, p in training.model.named_parameters() if p.grad is not None] == ["features.0.bias"]


def test_fastdp_has_an_origin_for_each_beginning():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Linear(4, 4)
            self.words, self.places = nn.Embedding(9, 4), nn.Embedding(6, 4)
            self.first, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.first(self.words(x) + self.places(torch.arange(6)))).sum()

    model = Tokens()
    model.frozen.requires_grad_(False)
    kinds = (nn.Linear, nn.Embedding, nn.LayerNorm)
    find = adapter_of(PEERS["fastdp"]).origin_params
    tokens = torch.zeros(2, 6, dtype=torch.long)
    assert find(model, kinds, lambda: model(tokens)) == ["words.weight", "places.weight"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "frozen" not in name}
    assert find(model, (nn.LayerNorm,), lambda: model(tokens)) == ["norm.bias"]


@pytest.mark.parametrize("factor", [2.0, float("nan"), 0.0])
def test_a_wrong_sum_in_jax_is_seen(factor):
    jax = pytest.importorskip("jax")
    from dptrain.bench.contestant import Contestant
    from dptrain.bench.jax_engine import judge
    from dptrain.bench.jax_task import JaxTask

    task = JaxTask(Case(engine="jax", model="linear", image_size=8, num_classes=4, batch_size=1), 1e6)

    def scaled(n):
        example = next(task.examples())
        return jax.tree.map(lambda g: factor * g, jax.grad(task.loss)(task.params, example))

    verdict = judge(Contestant("scaled", "case", int, int, scaled), task)
    assert verdict["verdict"] == "WRONG" and verdict["sentence"]


def test_jax_privacy_is_exact():
    pytest.importorskip("jax_privacy")
    jax = pytest.importorskip("jax")
    from dptrain.bench.jax_engine import judge, median_norm
    from dptrain.bench.jax_task import JaxTask

    task = JaxTask(replace(CASE, model="mlp", image_size=8))
    task = replace(task, clip_norm=median_norm(task))
    contestant = PEERS["jax-privacy"].contestant(task, "DP")
    verdict = judge(contestant, task)
    assert verdict["verdict"] == "exact" and verdict["error_of_sum"] < 1e-4
    one = contestant.clipped_sum(1)
    assert float(sum((g**2).sum() for g in jax.tree.leaves(one)) ** 0.5) <= task.clip_norm * 1.001
    for _ in range(2):
        contestant.step()
        contestant.step()
        contestant.end()


# ---------------------------------------------------------------- what is said of them


def test_the_seeds_names_are_there_and_mean_what_the_table_of_methods_says():
    names = {name for peer in PEERS.values() for name in peer.methods}
    seeds = {"O-flat", "O-ghost", "functorch_dp", "PV-ghost", "PV-ghost_mixed", "private-mini", "DP"}
    assert names >= seeds | {"BK-ghost", "BK-MixGhostClip", "BK-MixOpt"}
    for peer in PEERS.values():
        for name in peer.methods.keys() - {"functorch"}:
            assert peer.mode(name) == peer.mode(methods.resolve(name).name)


@pytest.mark.parametrize("name", PEERS)
def test_an_unknown_method_is_refused_with_those_that_there_are(name):
    with pytest.raises(
        ValueError, match=f"{name} has no method 'auto'; it has .*, {list(PEERS[name].methods)[-1]}"
    ):
        PEERS[name].contestant(Task(CASE), "auto")


@pytest.mark.parametrize("name", PEERS)
def test_a_missing_library_is_unsupported_and_the_sentence_says_how_to_get_it(name, monkeypatch):
    peer = PEERS[name]
    monkeypatch.setitem(sys.modules, peer.packages[0], None)
    monkeypatch.delitem(sys.modules, f"dptrain.bench.peers.{peer.adapter}", raising=False)
    with pytest.raises(Unsupported) as found:
        peer.contestant(Task(CASE), next(iter(peer.methods)))
    assert f"{name} cannot be imported" in str(found.value) and peer.install in str(found.value)


def test_a_bug_of_ours_is_not_taken_for_a_missing_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "dptrain.bench.peers.opacus", None)
    with pytest.raises(ImportError):
        PEERS["opacus"].contestant(Task(CASE), "hooks")


def test_errors_that_are_no_refusals_are_let_through():
    pytest.importorskip("opacus")

    def unheard_of() -> nn.Module:
        raise NotImplementedError("a model of ours")

    with pytest.raises(NotImplementedError, match="a model of ours"):
        PEERS["opacus"].contestant(Given(CASE, make=unheard_of), "hooks")


def test_opacus_word_on_tied_weights_is_a_refusal_when_it_is_asked_to_step():
    pytest.importorskip("opacus")

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.head = nn.Linear(192, 192), nn.Linear(192, 192), nn.Linear(192, 5)
            self.other.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.other(self.one(x.flatten(1))))

    contestant = PEERS["opacus"].contestant(Given(replace(CASE, image_size=8), make=Tied), "ghost")
    with pytest.raises(Unsupported, match="Parameter tying is not supported with Ghost Clipping"):
        contestant.step()
    assert judge(contestant, Task(CASE), 2)["verdict"] == "refused"


def test_compilation_is_no_part_of_their_guides():
    with pytest.raises(Unsupported, match=r"not run under torch\.compile"):
        PEERS["opacus"].contestant(Task(replace(CASE, compile=True)), "hooks")


def test_versions():
    pytest.importorskip("opacus")
    assert set(PEERS["opacus"].versions()) == {"opacus"}


def test_the_table_imports_no_library():
    code = "import sys, dptrain.bench.peers; print({'torch', 'jax', 'opacus'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
