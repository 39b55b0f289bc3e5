"""Models under FSDP2: as many ranks as you like take the steps of one process."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import fsdp_scenes
from tests.distributed.launch import launch

WORKER = Path(__file__).parent / "fsdp_worker.py"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
Found = dict[str, torch.Tensor]


def found_by(ranks: int, cases: str, folder: Path) -> list[Found]:
    launch(WORKER, ranks, folder, cases)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(ranks)]


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory) -> list[Found]:
    """What two ranks find."""
    return found_by(2, "QUICK", tmp_path_factory.mktemp("fsdp"))


def same(found: Found, wanted: Found, prefix: str = "") -> None:
    for name, want in wanted.items():
        error = float((found[prefix + name] - want).abs().max()) / max(float(want.abs().max()), 1e-30)
        assert error <= TOLERANCE[want.dtype], f"{prefix}{name} is off by {error:.1e}"


def takes_the_steps_of_one_process(found: Found, cases: str) -> None:
    same(found, {name: g for case in getattr(fsdp_scenes, cases) for name, g in fsdp_scenes.steps(case)})


def test_every_method_takes_the_steps_of_one_process(by_rank):
    takes_the_steps_of_one_process(by_rank[0], "QUICK")


def test_make_private_trains_what_it_does_on_one(by_rank):
    same(by_rank[0], fsdp_scenes.trained())


def test_no_more_calls_than_there_must_be(by_rank):
    for found, method, who in itertools.product(by_rank, fsdp_scenes.EXPECTED, fsdp_scenes.WHO):
        calls = tuple(found[f"calls of {method}, {who}"].tolist())
        assert calls == fsdp_scenes.EXPECTED[method], f"{method}, {who}: {calls}"


def test_what_one_rank_alone_has_is_probed_by_all(by_rank):
    same(by_rank[0], fsdp_scenes.flagged_sum(False, slice(0, 4)), "flagged ")


@pytest.mark.parametrize("method", ["auto", "ghost"])
def test_units_that_are_called_twice_and_recompute(by_rank, method):
    same(by_rank[0], fsdp_scenes.again(method))


def test_a_refusal_is_all_ranks_and_leaves_nothing_behind(by_rank):
    assert all(found["refused"].item() == 1 for found in by_rank)
    once = fsdp_scenes.flagged_sum(True, slice(0, 2))
    same(by_rank[0], {name: 2 * g for name, g in once.items()}, "after refusal ")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_method_and_type_takes_the_steps_of_one_process(ranks, tmp_path):
    found = found_by(ranks, "ALL", tmp_path)[0]
    takes_the_steps_of_one_process(found, "ALL")
    if ranks > 1:
        same(found, fsdp_scenes.again("auto"))
