"""docs/accuracy.md says what the records say."""

from __future__ import annotations

import re

import pytest

from benchmarks.summary import accuracy
from benchmarks.summary.__main__ import ROOT, records
from dptrain.recipes import recipe
from dptrain.recipes.table import RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_sound_configuration(name):
    recipe(name).check()


@pytest.mark.parametrize(
    ("block", "made"), [("accuracy on mnist", accuracy.mnist), ("accuracy on cifar100", accuracy.cifar)]
)
def test_the_tables_are_those_of_the_records(block, made):
    page = (ROOT / "docs" / "accuracy.md").read_text()
    shown = re.search(rf"<!-- {block} -->\n(.*?)\n<!-- end -->", page, flags=re.S)
    assert shown is not None
    assert shown[1].splitlines() == made(records())


def test_what_the_tables_tell_was_scored_on_the_test_set():
    told = [r for r in records().values() if r.get("kind") == accuracy.KIND]
    assert told
    for record in told:
        for row in record["rows"]:
            assert row["evaluated_on"] == "test"
            assert row["config"]["validation_fraction"] == 0
            assert len(row["seeds"]) == len(set(row["seeds"])) == len(row["accuracies"])
            if row["private"]:
                assert max(row["epsilons"]) <= row["config"]["epsilon"]
