"""Every measure on tiny models, through processes and records as the commands do it."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
import torch

from dptrain.bench import Case, Records, torch_engine
from dptrain.bench import race as racing
from dptrain.bench import run as runs
from dptrain.bench.contestant import Contestant
from dptrain.bench.measures.accuracy import interval95 as interval_of_mean
from dptrain.bench.measures.batch_size import Search
from dptrain.bench.measures.throughput import throughput
from dptrain.bench.outcome import Outcome
from dptrain.bench.processes import Ended
from dptrain.bench.race import best, interval95, logical_s, paired_ratios, race
from dptrain.bench.timeline import sections
from dptrain.bench.torch_task import Task
from dptrain.cli import main
from dptrain.torch.products import onednn_is_faster

TINY = {
    "model": "convnet",
    "image_size": 8,
    "num_classes": 4,
    "batch_size": 4,
    "accumulate": 2,
    "seconds": 0.1,
}


def measured(tmp_path, **changes):
    (record,) = runs.run([Case(**TINY | changes)], tmp_path)
    assert record.status == "ok", (record.sentence, record.traceback)
    return record.results


def test_throughput(tmp_path):
    found = measured(tmp_path)
    assert found["exactness"]["verdict"] == "exact" and found["exactness"]["error_of_sum"] < 1e-9
    assert found["trains"]["parameters"] == found["trains"]["of"] > 0 and not found["trains"]["skipped"]
    contestants = found["contestants"]
    assert {c["role"] for c in contestants.values()} == {"case", "baseline"}
    baselines = {n: c["logical_step_s"] for n, c in contestants.items() if c["role"] == "baseline"}
    same_products = onednn_is_faster()  # ordinary training by our products takes part then
    assert found["baseline"] == min(baselines, key=baselines.get) and len(baselines) == 2 + same_products
    own = contestants["torch auto"]
    assert len(own["raw_later_physical_step_s"]) >= 5
    assert own["examples_per_s"] == pytest.approx(8 / own["logical_step_s"])
    assert found["ratio_to_non_private"] == pytest.approx(min(baselines.values()) / own["logical_step_s"])


def test_several_devices_race_side_by_side(tmp_path):
    found = measured(tmp_path, measure="scaling", devices=2, method="bk-ghost", accumulate=3)
    assert found["exactness"]["verdict"] == "exact" and found["baseline"] == "non-private DDP"
    own = found["contestants"]["torch bk-ghost"]
    assert own["examples_per_s"] == pytest.approx(2 * 4 * 3 / own["logical_step_s"])
    rounds = {len(c["raw_end_of_logical_step_s"]) for c in found["contestants"].values()}
    assert len(rounds) == 1 and rounds.pop() >= 5


def test_what_there_is_not_is_not_measured(tmp_path):
    for changes in ({"devices": 999}, {"devices": 2, "engine": "jax"}):
        (record,) = runs.run([Case(**TINY | {"measure": "scaling"} | changes)], tmp_path)
        assert record.status == "unsupported" and record.sentence


def test_a_wrong_sum_is_seen_where_it_is_timed(monkeypatch):
    """Also one that is exact in float64: the contestant that is timed is judged itself."""
    ours = torch_engine.dpt.clipped_grad

    def doubled(model, *args, **options):
        clipped = ours(model, *args, **options)
        if next(model.parameters()).dtype == torch.float64:
            return clipped

        class Twice(type(clipped)):
            def __call__(self, *inputs, **wishes):
                out = super().__call__(*inputs, **wishes)
                return dataclasses.replace(out, grads={n: 2 * g for n, g in out.grads.items()})

        clipped.__class__ = Twice
        return clipped

    monkeypatch.setattr(torch_engine.dpt, "clipped_grad", doubled)
    found = throughput(Case(**TINY))["exactness"]
    assert found["verdict"] == "WRONG" and found["error_as_timed"] > 0.5 and found["error_of_sum"] < 1e-9


def test_what_is_timed_has_its_noise(monkeypatch):
    released = []
    monkeypatch.setattr(
        torch_engine.dpt, "apply", lambda optimizer, model, gradient: released.append(gradient)
    )
    task = Task(Case(**TINY), clip_norm=0.5)
    contestant = torch_engine.private(task)
    contestant.step()
    contestant.end()
    sums = contestant.clipped_sum(task.case.batch_size)
    noise = torch.cat([(g * 8 - sums[n]).flatten() for n, g in released[0].grads.items()])  # L = 8
    assert len(noise) > 500 and float(noise.std()) == pytest.approx(0.5, rel=0.15)


def test_what_is_not_private_is_its_own_baseline(tmp_path):
    found = measured(tmp_path, method="public")
    assert found["ratio_to_non_private"] == 1 and found["exactness"]["verdict"] == "non-private"


def test_memory_and_its_anatomy(tmp_path):
    found = measured(tmp_path, measure="memory", model="mlp", image_size=32, method="per-example")
    size = 4 * (3 * 32 * 32 * 128 + 128 + 128 * 4 + 4)
    parts = found["anatomy_bytes"]
    assert parts["parameters"] == parts["gradients"] == size and parts["optimizer"] == 2 * size
    assert parts["per-example gradients"] >= 4 * size * 0.9  # one for each of four examples
    assert found["peak_bytes"] > 3 * size and found["baseline_peak_bytes"] > 3 * size
    assert list(found["snapshots_bytes"]) == ["after gradient", "after clip", "after noise", "after step"]


@pytest.mark.parametrize("method", ["per-example-vmap", "per-example-loop", "ghost"])
def test_peaks_of_methods_of_every_capture(tmp_path, method):
    found = measured(tmp_path, measure="memory", method=method)
    assert found["peak_bytes"] > 0 and ("anatomy_bytes" in found) == (method == "ghost")


def test_profile_and_traces(tmp_path):
    found = measured(tmp_path, measure="profile")
    ordinary = {"data", "forward", "backward", "optimizer step"}
    assert found["baseline_sections_s"].keys() == ordinary
    assert found["sections_s"].keys() == ordinary | {"norms", "clip and accumulate", "noise"}
    for name in found["traces"]:
        assert json.loads((tmp_path / "traces" / name).read_text())["traceEvents"]


def test_compile(tmp_path):
    found = measured(tmp_path, measure="compile")
    assert found["first_step_s"] == pytest.approx(found["compile_s"] + found["later_step_s"])


def test_accuracy_over_seeds(tmp_path):
    settings = (("data", "digits"), ("steps", 2))
    found = measured(tmp_path, measure="accuracy", model="linear", seeds=2, batch_size=64, settings=settings)
    assert len(found["accuracies"]) == len(found["epsilons"]) == 2
    low, high = found["interval95"]
    assert low <= found["mean"] <= high


def test_interval_of_a_mean():
    # Student's t with two degrees of freedom: 4.303 s / sqrt(3).
    low, high = interval_of_mean([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4)
    assert interval_of_mean([1.0]) is None


@pytest.mark.slow
def test_batch_size_under_a_limit(tmp_path):
    found = measured(
        tmp_path, measure="batch-size", model="mlp", image_size=64, method="per-example", memory_gib=0.6
    )
    tried = {t["batch_size"]: t["status"] for t in found["tries"]}
    assert tried[found["largest"]] == "ok" and "out-of-memory" in tried.values()
    # An example's gradient alone takes 6.3 MB.
    assert 4 < found["largest"] < 0.6 * 2**30 / 6.3e6


@pytest.mark.parametrize("limit", [0, 1, 7, 8, 9, 1000, 1003])
def test_bisection_finds_the_edge(limit):
    def attempt(size):
        fits = size <= limit
        return Outcome("ok", {"peak_bytes": 10 * size}) if fits else Outcome("out-of-memory")

    search = Search(attempt, 8, 10 * limit)
    assert limit - max(1, 0.03 * limit) <= search.run() <= limit
    assert len(search.tries) < 15


def test_bisection_ends_at_errors():
    with pytest.raises(Ended, match="a bug"):
        Search(lambda size: Outcome("error", sentence="a bug"), 8, 100).run()


def test_finished_cases_are_not_measured_again(tmp_path, monkeypatch):
    measured_cases = []
    statuses = {4: "ok", 8: "out-of-memory", 16: "unsupported", 32: "error"}

    def measure(case, folder, timeout_s):
        measured_cases.append(case.batch_size)
        return runs.Record(case, statuses[case.batch_size])

    monkeypatch.setattr(runs, "measure", measure)
    cases = [Case(**TINY | {"batch_size": size}) for size in statuses]
    assert [r.status for r in runs.run([*cases, cases[0]], tmp_path)] == list(statuses.values())
    runs.run(cases, tmp_path)
    assert measured_cases == [4, 8, 16, 32, 16, 32]
    assert len(list(Records(tmp_path))) == 4


def test_all_cases_are_checked_before_the_first_is_measured(tmp_path):
    with pytest.raises(ValueError, match="no engine"):
        runs.run([Case(**TINY), Case(engine="nobody")], tmp_path)
    assert not (tmp_path / "records").exists()


def test_what_is_not_there_is_unsupported(tmp_path):
    cases = [
        Case(**TINY | {"device": "cuda:7"}),
        Case(**TINY | {"precision": "tf32"}),
        Case(**TINY, devices=2),
    ]
    sentences = [record.sentence for record in runs.run(cases, tmp_path)]
    assert sentences == [
        "there is no device cuda:7 here.",
        "tf32 is for a GPU.",
        "several devices are for the measure scaling, and for the PyTorch engine.",
    ]


def test_ratios_are_of_medians_and_of_rounds():
    def never():
        raise AssertionError

    base = Contestant("a", "baseline", never, never, first_s=[1, 1, 9], later_s=[1, 1, 1], end_s=[0, 0, 0])
    slower = Contestant("b", "case", never, never, first_s=[2, 2, 2], later_s=[2, 2, 2], end_s=[0, 0, 0])
    assert logical_s(base, 4) == 4 and logical_s(slower, 4) == 8
    assert best([slower, base], 4) is base
    assert paired_ratios(base, slower, 4) == [0.5, 0.5, 1.5]
    low, high = interval95(base, slower, 4)
    assert low == 0.5 and 0.5 <= high <= 1.5


def test_contestants_take_turns():
    turns = []

    def contestant(name, role):
        return Contestant(name, role, lambda: turns.append(name), lambda: time.sleep(0.001))

    race([contestant(*c) for c in (("a", "case"), ("b", "baseline"), ("c", "peer"))], 2, limit_s=0.01)
    passes = ["".join(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert len(passes) >= 10 and {"".join(sorted(each)) for each in passes} == {"abc"}
    assert len(set(passes)) > 3, "nobody always comes after the same other"


class Event:
    def __init__(self, name, start, end=0, size=0):
        self._name, self._start, self._end, self._size = name, start, end, size

    def name(self):
        return self._name

    def start_ns(self):
        return self._start

    def duration_ns(self):
        return self._end - self._start

    def nbytes(self):
        return self._size

    def device_type(self):
        return "DeviceType.CPU"


def test_sections_count_what_is_within_them_once():
    found = sections(
        [
            Event("dptrain::backward", 10, 100),
            Event("dptrain::norms", 20, 50),
            Event("dptrain::deeper", 30, 40),
            Event("dptrain::norms", 60, 70),
            Event("other", 0, 1000),
            Event("[memory]", 5, size=100),
            Event("[memory]", 25, size=50),
            Event("[memory]", 35, size=-20),
            Event("[memory]", 95, size=-100),
        ],
        "cpu",
    )
    alone = [(s.name, round(s.alone_s * 1e9)) for s in found]
    assert alone == [("backward", 50), ("norms", 20), ("deeper", 10), ("norms", 10)]
    backward, norms = found[0], found[1]
    assert (backward.before, backward.peak, backward.after) == (100, 150, 30)
    assert (norms.before, norms.peak, norms.after) == (100, 150, 130)


def test_the_command(tmp_path, capsys):
    options = ["--model", "linear", "--image-size", "8", "--batch-size", "4", "--seconds", "0.1"]
    command = ["bench", "compile", "--method", "auto", "opacus:O-flat", "--engine", "torch", *options]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert len(list((tmp_path / "records").glob("*.json"))) == 2
    assert main(["bench", "throughput", "--method", "nonsense", *options, "--out", str(tmp_path)]) == 2
    assert "clipping method 'nonsense' is unknown" in capsys.readouterr().err


def test_everything_is_listed(capsys):
    assert main(["bench", "--list"]) == 0
    listed = capsys.readouterr().out
    for name in (
        "O-flat",
        "O-ghost",
        "PV-ghost_mixed",
        "BK-MixOpt",
        "private-mini",
        "functorch_dp",
        "batch-size",
    ):
        assert name in listed


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished(tmp_path):
    """The process of a case does not hear of it; its parent ends it and says what there is."""
    options = ["compile", "--model", "linear", "vit-base", "--image-size", "32", "--batch-size", "4"]
    # A shell that runs the tests in the background has its children ignore Ctrl-C; this one is to hear it.
    hears = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    calls = f"from dptrain.cli import main; sys.exit(main({['bench', *options, '--out', str(tmp_path)]}))"
    command = [sys.executable, "-c", f"{hears}; {calls}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob("records/*linear*")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(2)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Interrupted" in err and "1 records" in out
    assert [path.name for path in (tmp_path / "records").iterdir()] == [next(tmp_path.glob("records/*")).name]


def test_baselines_that_cannot_be_the_best_leave_the_race(monkeypatch):
    monkeypatch.setattr(racing, "seconds", lambda run: run())
    monkeypatch.setattr(racing, "PRECISE", -1.0)  # until the time is up
    monkeypatch.setattr(racing.gc, "collect", int)

    def contestant(role: str, much: float) -> Contestant:
        return Contestant(role, role, lambda: much, lambda: much)

    own, fast, near, slow = (
        contestant(*each) for each in [("case", 9.0), ("baseline", 1.0), ("baseline", 1.1), ("baseline", 1.2)]
    )
    race([own, fast, near, slow], 2, 0.1)
    assert len(slow.first_s) == len(slow.end_s) == racing.LEAST_ROUNDS
    assert len(own.first_s) == len(fast.first_s) == len(near.later_s) > racing.LEAST_ROUNDS
    assert best([own, fast, near, slow], 2) is fast
