"""The closed table of clipping methods."""

import pytest

from dptrain.core.methods import NAMES, TABLE, Capture, Norm, Sum, resolve

PAPER = {
    "non-private": "non-private",
    "public": "non-private",
    "non-private-virtual": "non-private",
    "O-flat": "per-example",
    "opacus": "per-example",
    "functorch_dp": "per-example-vmap",
    "private-mini": "per-example-vmap",
    "DP": "per-example-vmap",
    "O-ghost": "ghost",
    "PV-ghost": "ghost",
    "PV-ghost_mixed": "mixed-ghost",
    "BK-ghost": "bk-ghost",
    "BK-MixGhostClip": "bk-mixed-ghost",
    "BK-MixOpt": "bk-mix-opt",
}


@pytest.mark.parametrize(("alias", "name"), PAPER.items())
def test_the_papers_names_are_known_in_any_case(alias, name):
    for written in (alias, alias.lower(), alias.upper(), f" {alias} "):
        assert resolve(written).name == name


def test_every_name_means_itself_and_no_name_means_two():
    for method in TABLE:
        assert resolve(method.name) is method
    spelled = [{m.name, *(a.lower() for a in m.aliases)} for m in TABLE]
    assert sum(len(names) for names in spelled) == len(set().union(*spelled))


def test_the_table_is_the_designs():
    rows = {m.name: (m.capture.value, m.norm.value, m.sum.value) for m in TABLE}
    assert rows == {
        "non-private": ("none", "none", "none"),
        "per-example": ("uses", "materialise", "reuse"),
        "per-example-vmap": ("vmap", "materialise", "reuse"),
        "per-example-loop": ("loop", "materialise", "running-sum"),
        "fast-gradient": ("uses", "materialise", "second-backward"),
        "ghost": ("uses", "gram", "second-backward"),
        "mixed-ghost": ("uses", "cheaper", "second-backward"),
        "bk-ghost": ("uses", "gram", "contract"),
        "bk-mixed-ghost": ("uses", "cheaper", "contract"),
        "bk-mix-opt": ("uses", "cheaper", "reuse-or-contract"),
        "auto": ("planned", "planned", "planned"),
    }
    assert resolve("ghost").norm is Norm.GRAM
    assert [m.name for m in TABLE if not m.is_private] == ["non-private"]
    assert {m.capture for m in TABLE} == set(Capture)
    assert {m.sum for m in TABLE} == set(Sum)


def test_an_unknown_method_lists_the_names():
    with pytest.raises(ValueError, match="choose one of") as caught:
        resolve("magic")
    assert all(name in str(caught.value) for name in NAMES)
