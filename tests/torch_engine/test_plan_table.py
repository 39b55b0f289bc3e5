"""Folding repeated layers, and text that fits."""

from __future__ import annotations

import pytest

from dptrain.torch import plan_table


def row(parameter: str, **other):
    facts = {
        "operation": "linear",
        "value": (4, 4),
        "examples": "axis 0",
        "positions": 2,
        "pull-back": "alone",
        "norm": "gram",
        "sum": "contract",
        "cost": 0.1,
    }
    return {"parameter": parameter, **facts, **other}


def folded(*names: str) -> dict[str, int]:
    return {r["parameter"]: r["uses"] for r in plan_table.fold([row(name) for name in names])}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([f"blocks.{i}.qkv.weight" for i in range(12)], {"blocks.{0-11}.qkv.weight": 12}),
        (["a.0.w", "a.2.w", "a.3.w"], {"a.{0,2-3}.w": 3}),
        (["head.weight"], {"head.weight": 1}),
        (["w", "w", "w"], {"w": 3}),  # a layer that is called three times
        (["conv1.w", "conv2.w"], {"conv1.w": 1, "conv2.w": 1}),  # a number within a word is a name
        ([f"s.{i}.b.{j}.w" for i in range(2) for j in range(3)], {"s.{0-1}.b.{0-2}.w": 6}),
        (["s.0.b.0.w", "s.1.b.0.w", "s.1.b.1.w"], {"s.0.b.0.w": 1, "s.1.b.{0-1}.w": 2}),
        (["0.A, 0.B", "1.A, 1.B"], {"{0-1}.A, {0-1}.B": 2}),
        (["0.w", "0.w", "1.w"], {"0.w": 2, "1.w": 1}),
    ],
)
def test_names(names, expected):
    assert folded(*names) == expected


def test_rows_that_differ_stay_apart_and_costs_add_up():
    table = [row("0.w"), row("1.w"), row("2.w", norm="materialise")]
    first, second = plan_table.fold(table)
    assert (first["parameter"], first["uses"]) == ("{0-1}.w", 2)
    assert first["cost"] == pytest.approx(0.2)
    assert second["parameter"] == "2.w"
    assert all("uses" not in r for r in table)


def test_names_break_before_dots():
    name = "encoder.block.{0,2-5}.layer.0.SelfAttention.q.weight"
    lines = plan_table.break_name(name, 30).split("\n")
    assert max(map(len, lines)) <= 30
    assert "".join(line.strip() for line in lines) == name
    assert plan_table.break_name("short.name", 30) == "short.name"
    assert plan_table.break_name("a.weight, b.weight", 10).split("\n") == ["a.weight,", "  b.weight"]


def test_text():
    lines = plan_table.describe([row("blocks.0.w"), row("blocks.1.w", cost=0.0)]).splitlines()
    assert lines[0].split() == list(plan_table.COLUMNS)
    assert lines[1].split() == [
        "blocks.{0-1}.w",
        "2",
        "linear",
        "4×4",
        "0",
        "2",
        "alone",
        "gram",
        "contract",
        "10%",
    ]
