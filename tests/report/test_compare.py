"""What became slower is told from what is noise."""

from __future__ import annotations

import dataclasses

import pytest

from dptrain.report import ReportError, compare, compare_folders, compare_paths

from . import made_up
from .made_up import fits, race


def rows(table):
    return {row["Quantity"]: row for _, row in table.iterrows()}


def test_ten_percent_slower_is_found():
    found = rows(compare(race(0.9, seed=1, noise=0.03), race(0.81, seed=2, noise=0.03)))
    for quantity in ("logical step (s)", "time over non-private"):
        row = found[quantity]
        assert row["Verdict"] == "slower" and row["95 % from"] > 1
        assert row["B / A"] == pytest.approx(1 / 0.9, rel=0.04)
    back = rows(compare(race(0.81, seed=2, noise=0.03), race(0.9, seed=1, noise=0.03)))
    assert back["logical step (s)"]["Verdict"] == "faster"


def test_noise_is_no_difference():
    wrong = 0
    for seed in range(20):
        found = rows(compare(race(0.9, seed=seed, noise=0.05), race(0.9, seed=100 + seed, noise=0.05)))
        wrong += found["logical step (s)"]["Verdict"] != "no difference"
    assert wrong <= 3  # one in twenty is expected


def test_a_busy_machine_does_not_change_the_ratio():
    found = rows(compare(race(0.9, base=100, seed=1), race(0.9, base=70, seed=2)))
    assert found["logical step (s)"]["Verdict"] == "slower"
    assert found["time over non-private"]["Verdict"] == "no difference"


def test_one_number_has_no_verdict():
    row = rows(compare(fits(50), fits(60)))["largest batch"]
    assert (row["A"], row["B"], row["Verdict"]) == (50, 60, "too few samples")


def test_a_case_that_no_longer_works():
    works, fails = race(0.9), dataclasses.replace(race(0.9), status="error", results={})
    assert compare(works, fails)["Verdict"].tolist() == ["no longer works"]
    assert compare(fails, works)["Verdict"].tolist() == ["works now"]


def test_other_machines_and_versions_are_told():
    other = made_up.ENVIRONMENT | {"machine": {"processor": "other"}, "versions": {"torch": "2.14.0"}}
    said = " ".join(compare(race(0.9), dataclasses.replace(race(0.9), environment=other)).attrs["warnings"])
    assert "machine" in said and "torch differs: 2.15.0 and 2.14.0" in said and "cases" not in said
    assert compare(race(0.9), race(0.9)).attrs["warnings"] == []
    assert "batch_size 16 and 8" in compare(race(0.9), race(0.9, batch_size=8)).attrs["warnings"][0]


def test_folders(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    made_up.write(a, [race(0.9, seed=1), race(0.5, method="ghost", seed=2)])
    made_up.write(b, [race(0.7, seed=3)])
    found = compare_paths(a, b)
    assert set(found["Case"]) == {race(0.9).id} and (found["Verdict"] == "slower").all()
    assert any("1 case is in" in w for w in found.attrs["warnings"])
    files = [next((folder / "records").glob("*auto*")) for folder in (a, b)]
    assert compare_paths(*files).equals(found)
    with pytest.raises(ReportError, match="two records or two folders"):
        compare_paths(a, files[1])
    made_up.write(tmp_path / "c", [race(0.9, model="vit-base")])
    with pytest.raises(ReportError, match="no case in common"):
        compare_folders(a, tmp_path / "c")
