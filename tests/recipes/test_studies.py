"""Every figure and table is there, small enough for two cores, and at full scale the paper's."""

from collections import Counter

import pytest

from dptrain.bench import MEASURES, Case, Records
from dptrain.bench.checking import check
from dptrain.core.methods import resolve
from dptrain.models import build
from dptrain.models.names import PAPER_MODELS
from dptrain.models.small import SMALL
from dptrain.recipes import SCALES, STUDIES, all_cases, estimate_s, manifest, seed_cases, seed_methods, study
from dptrain.training import ConfigError, TrainConfig

NAMES = (
    *(f"fig{n}" for n in range(1, 9)),
    *(f"fig-a{n}" for n in range(1, 5)),
    *("table1", "table2", "table-a1", "table-a2", "table-a3", "table-a4"),
    *("batch-size-accuracy", "tf32-steps", "loader-workers"),
    *("dp-timing", "dp-runtime-profile", "dp-memory"),
    *("naive-momentum", "public-compress", "simulation", "optimizers"),
)
#: of the two projects: clipping modes and flags of the paper's scripts, modes of ml-privacy-exp
SEEDS = (
    *("non-private", "O-flat", "O-ghost", "PV-ghost", "PV-ghost_mixed"),
    *("BK-ghost", "BK-MixGhostClip", "BK-MixOpt", "non-private-virtual", "private-mini", "DP"),
    *("tf32", "torch2", "distributed", "public", "opacus", "functorch_dp", "mixed_ghost"),
)


@pytest.fixture(scope="module", params=SCALES)
def scale(request):
    return request.param


def test_every_figure_and_table_is_there():
    assert tuple(STUDIES) == NAMES
    for name, one in STUDIES.items():
        assert one.name == name and one.title and one.shows.endswith(".") and one.needs.endswith(".")
    with pytest.raises(ConfigError, match="choose from all, fig1"):
        study("fig9")


def test_every_study_has_different_cases_with_ids_of_their_own(scale):
    for one in STUDIES.values():
        cases = one.cases(scale)
        assert cases and len(set(cases)) == len(cases), one.name
    cases = all_cases(scale)
    assert len({case.id for case in cases}) == len(cases)


def test_every_case_can_be_read_back_and_makes_sense_to_an_engine(scale):
    for case in (*all_cases(scale), *seed_cases()):
        assert Case.from_dict(case.to_dict()) == case
        assert case.measure in MEASURES
        check(case)
        assert case.model in PAPER_MODELS or case.model in SMALL or case.model == "gpt2-like"
        assert (case.memory_gib is not None) == (case.measure == "batch-size")


def test_training_runs_have_settings_that_exist(scale):
    for case in all_cases(scale):
        if case.measure == "accuracy":
            own = {"model": case.model, "physical_batch_size": case.batch_size}
            config = TrainConfig.from_dict(own | dict(case.settings))
            config.check()
            assert resolve(case.method)


def test_all_together_fits_into_fifty_minutes_on_two_cores():
    cases = all_cases("small")
    assert estimate_s(cases, "small") < 50 * 60
    assert len(cases) < 135
    on_mnist = [
        case for name in ("naive-momentum", "public-compress") for case in STUDIES[name].cases("small")
    ]
    assert estimate_s(on_mnist, "small") < 20 * 60
    assert sum(one.cost["small"] for one in STUDIES.values()) > estimate_s(cases, "small") / 60  # shared
    assert all(case.device == "cpu" and case.image_size <= 32 for case in cases)


def test_equal_cases_cost_once_and_longer_ones_more():
    case, longer = Case(seconds=2.0), Case(seconds=12.0)
    assert estimate_s([case, case], "small") == estimate_s([case], "small")
    assert estimate_s([longer], "small") == estimate_s([case], "small") + 10
    assert estimate_s([Case(devices=4)], "paper") == 4 * estimate_s([Case()], "paper")


@pytest.mark.parametrize(
    ("model", "size", "classes"),
    sorted({(c.model, c.image_size, c.num_classes) for c in all_cases("small") if c.model != "gpt2-like"}),
)
def test_small_models_can_be_built(model, size, classes):
    channels = 1 if size == 8 else 3
    assert build(model, classes, (channels, size, size))


def test_what_a_laptop_lacks_is_asked_for_sparingly():
    lacking = [c for c in all_cases("small") if c.precision == "tf32" or c.devices > 1]
    assert 5 < len(lacking) < 15


def test_a_manifest_lists_the_cases(scale):
    for name in ("fig5", "table-a2"):
        stated = manifest(STUDIES[name], scale)
        assert stated["name"] == name and stated["scale"] == scale
        assert stated["cases"] == [case.id for case in STUDIES[name].cases(scale)]
    assert manifest(STUDIES["table-a2"], scale)["hyperparameters"]["bit"]["clip_norm"] == 6.53


def test_the_simulation_says_what_it_predicts(tmp_path):
    stated = manifest(STUDIES["simulation"], "small", Records(tmp_path))
    assert stated["curves"]["private"][-1][0] == 1000
    assert stated["predicted"]["share of ideal on 80 GPUs"] == pytest.approx(0.692, abs=0.05)
    assert "measured_curves" not in stated


def test_parameters_are_those_of_table_1():
    """Table 1, in millions; the heads differ."""
    counted = manifest(STUDIES["table1"], "small")["parameters"]
    paper = dict(zip(counted, (5.7, 22.1, 86.6, 304.3, 630.8, 23.7, 42.7, 211.8, 382.4, 929.2)))
    assert {name: n / 1e6 for name, n in counted.items()} == pytest.approx(paper, rel=0.03)


def test_full_scale_is_the_papers():
    """Table A2; Table 2: two memories, ViT-Base; Figure 8: up to 80 GPUs; section 2.1: L = 25,000."""
    settings = {case.model: dict(case.settings) for case in STUDIES["table-a2"].cases("paper")}
    vit, bit = settings["vit-base"], settings["bit-50x1"]
    assert (vit["epsilon"], vit["delta"], vit["lr"], vit["clip_norm"]) == (8, 2.04e-5, 0.0003, 4.63)
    assert (bit["epsilon"], bit["delta"], bit["lr"], bit["clip_norm"]) == (8, 2.04e-5, 0.00098, 6.53)
    assert vit["logical_batch_size"] == 25_000 and vit["epochs"] == 2 and vit["optimizer"] == "adam"

    table2 = STUDIES["table2"].cases("paper")
    assert {case.memory_gib for case in table2} == {32, 40} and {case.model for case in table2} == {
        "vit-base"
    }
    peers = {(c.engine, c.method) for c in table2}
    assert {("opacus", "O-flat"), ("private-vision", "PV-ghost_mixed"), ("fastdp", "BK-MixOpt")} <= peers

    fig2 = {case.model for case in STUDIES["fig2"].cases("paper")}
    assert fig2 == set(PAPER_MODELS) and len(fig2) == 10
    assert max(case.devices for case in STUDIES["fig8"].cases("paper")) == 80
    assert max(case.devices for case in STUDIES["fig-a3"].cases("paper")) == 24
    for case in STUDIES["fig3"].cases("paper"):
        assert case.batch_size * case.accumulate == pytest.approx(25_000, rel=0.01)
    everywhere = [case for case in all_cases("paper") if case.model in PAPER_MODELS and case.image_size != 32]
    assert {case.image_size for case in everywhere} == {224} and {c.device for c in everywhere} == {"cuda"}


def test_opacus_is_not_asked_for_more_than_it_fits():
    """Table 2: 35 examples of ViT-Base on an A100."""
    sizes = [
        case.batch_size
        for case in all_cases("paper")
        if case.engine == "opacus" and case.model == "vit-base" and case.measure == "throughput"
    ]
    assert max(sizes) == 35


def test_every_seed_method_is_a_case_by_its_name():
    assert set(seed_methods()) == set(SEEDS)
    cases = seed_methods()
    for name in SEEDS[:11]:
        assert cases[name].method == name
    assert {cases[n].engine for n in ("non-private-virtual", "private-mini", "DP")} == {"jax"}
    assert {cases[n].measure for n in ("non-private-virtual", "private-mini")} == {"compile"}
    assert cases["tf32"].precision == "tf32" and cases["torch2"].compile and cases["distributed"].devices > 1
    engines_of = Counter(case.engine for case in seed_cases())
    assert engines_of["fastdp"] == 3 and engines_of["private-vision"] == 2
    assert estimate_s(seed_cases(), "small") < 6 * 60
