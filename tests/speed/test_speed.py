"""The benchmarks themselves: what is timed is checked, and bisection finds the edge."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.speed import contestants, race
from benchmarks.speed.cases import Case
from benchmarks.speed.largest import Broken, Search
from benchmarks.speed.measure import Settings, failure, is_exact, measure
from benchmarks.speed.rates import Rates
from benchmarks.speed.roofline import extras


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def labelled(size: int):
    return torch.randn(size, 3, 4, 4), torch.randint(3, (size,))


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


CASE = Case("two layers", two_layers, labelled, losses, 4)
QUICK = Settings(methods=("auto", "ghost"), limit_s=0.0, accumulate=3, poisson_steps=3)


def silent(_: str) -> None:
    """Say nothing."""


def test_a_record_has_the_best_baseline_and_exact_results():
    record = measure(CASE, QUICK, silent)
    results = record["contestants"]
    assert {r["status"] for r in results.values()} == {"ok"}
    ordinary = [r["logical_step_s"] for r in results.values() if r["kind"] == "non-private"]
    assert results[record["baseline"]]["logical_step_s"] == min(ordinary)
    assert results["auto"]["float64"]["verdict"] == "exact"
    close = pytest.approx(0, abs=1e-5)
    assert results["auto"]["as_timed"] == {"examples": 4, "relative_error": close, "rounding": close}
    assert results["auto"]["recompilations"] == 0
    assert len(results["auto"]["raw_end_of_logical_step_s"]) == race.LEAST_ROUNDS
    assert is_exact(record)


def test_a_wrong_sum_is_seen_where_it_is_timed(monkeypatch):
    exact = contestants.dpt.clipped_grad

    def doubled(*args, **kwargs):
        clipped = exact(*args, **kwargs)
        once = type(clipped).__call__

        class Twice(type(clipped)):
            def __call__(self, *inputs, **options):
                out = once(self, *inputs, **options)
                return dataclasses.replace(out, grads={n: 2 * g for n, g in out.grads.items()})

        clipped.__class__ = Twice
        return clipped

    monkeypatch.setattr(contestants.dpt, "clipped_grad", doubled)
    assert not is_exact(measure(CASE, dataclasses.replace(QUICK, methods=("auto",)), silent))


def test_what_does_not_exist_is_said_and_left_out():
    record = measure(CASE, dataclasses.replace(QUICK, methods=("auto", "auto+graphs")), silent)
    assert record["contestants"]["auto+graphs"]["status"] == "unsupported"
    assert record["contestants"]["auto"]["status"] == "ok"


def test_lack_of_memory_is_told_from_errors():
    assert failure(torch.OutOfMemoryError("CUDA out of memory"))["status"] == "out-of-memory"
    said = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
    assert failure(RuntimeError(said))["status"] == "out-of-memory"
    assert failure(RuntimeError("sizes do not match"))["status"] == "error"


def fake(edge: int, fixed: float = 1.0):
    """Fits up to ``edge``; peaks lie on a line that need not lead there."""

    def attempt(size: int) -> dict:
        return {"status": "ok" if size <= edge else "out-of-memory", "peak_bytes": fixed + size}

    return attempt


@pytest.mark.parametrize("edge", [1, 2, 3, 7, 8, 9, 99, 100, 101, 1000])
@pytest.mark.parametrize("limit", [50, 100, 500])
def test_bisection_finds_the_edge(edge, limit):
    assert Search(fake(edge), 8, limit, resolution=0.0).run() == edge


def test_bisection_says_zero_and_stops_at_errors():
    assert Search(fake(0), 8, 100, resolution=0.0).run() == 0
    with pytest.raises(Broken, match="error at batch 8: because"):
        Search(lambda size: {"status": "error", "sentence": "because"}, 8, 100).run()


def test_roofline_takes_the_cheaper_way():
    import dptrain.torch as dpt

    rates = Rates(1e12, 1e9, 1e9, 1e9, 1e9, 1e9, 1e9)
    model = nn.Linear(1000, 1000, bias=False)
    task = dpt.clipped_grad(model, lambda m, x: m(x).square().sum(1), clip_norm=1.0)
    (gram,) = extras(task, torch.randn(2, 1000), 8, rates)
    assert (gram.way, gram.flops) == ("gram", 2 * 8 * 2000)  # T = 1: norms of both operands
    (keep,) = extras(task, torch.randn(2, 1000), 8, dataclasses.replace(rates, flops_per_s=1e3))
    assert keep.way == "keep"
    assert keep.bytes_written == keep.bytes_read == 4 * 8 * 1000 * 1000
