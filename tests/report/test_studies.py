"""Every study renders whatever its records are, and judges clear cases rightly."""

from __future__ import annotations

import dataclasses

import plotly.graph_objects as go
import pytest

from dptrain.core import methods
from dptrain.report import STUDIES, show
from dptrain.report import names as report_names
from dptrain.report.draw import draw
from dptrain.report.interactive import figure
from dptrain.report.studies.scaling import amdahl, parallel_fraction
from dptrain.report.tables import latex, markdown

from . import made_up
from .made_up import fits, profile, race, record, scaled, study, trained

PLAUSIBLE = made_up.plausible()
WITHOUT_CHARTS = {"table-a1", "table-a2"}


def verdicts(name, records, scale="small", **extra):
    return [f.verdict for f in show(study(name, records, scale, **extra)).findings]


def test_there_are_records_for_every_study():
    assert PLAUSIBLE.keys() == STUDIES.keys()


@pytest.mark.parametrize("name", STUDIES)
def test_plausible_records_are_shown(name):
    records = PLAUSIBLE[name]
    shown = show(study(name, records, **(made_up.curves() if name == "simulation" else {})))
    assert len(shown.table) and bool(shown.panels) != (name in WITHOUT_CHARTS)
    assert any(f.verdict != "not measured" for f in shown.findings)
    assert markdown(shown.table).count("\n") == len(shown.table) + 2
    assert "toprule" in latex(shown.table, shown.title, name)
    for panel in shown.panels:
        made = figure(panel)
        traces = go.Figure(
            made["data"], _validatable(made["layout"])
        ).data  # raises for what plotly does not know
        assert len(traces) == sum(bool(line.x) for line in panel.series)


def _validatable(layout):
    """Without colours by name, which the page's script resolves."""
    if isinstance(layout, dict):
        return {k: _validatable(v) for k, v in layout.items() if not str(v).startswith("var(")}
    return layout


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("scale", ["small", "paper"])
def test_nothing_is_shown_as_nothing(name, scale):
    shown = show(study(name, [], scale))
    assert not shown.panels and shown.findings
    assert {f.verdict for f in shown.findings} == {"not measured"}
    assert list(shown.table.columns)


@pytest.mark.parametrize("name", STUDIES)
def test_failures_are_in_the_table_and_in_no_figure(name):
    shown = show(study(name, made_up.failures()))
    text = shown.table.to_csv() + " ".join(shown.notes)
    assert not shown.panels
    assert {f.verdict for f in shown.findings} == {"not measured"}
    if name not in ("simulation", "table1"):  # the one has curves, the other a row for each model
        assert "does not fit" in text and "alert(1)" in text


@pytest.mark.parametrize("name", STUDIES)
def test_results_that_lack_everything_prove_nothing(name):
    empty = [dataclasses.replace(r, results={}) for r in PLAUSIBLE[name]]
    shown = show(study(name, empty))
    # That a library works is seen from the status, and a setting from the case.
    judged = {"table-a1", "table-a2"}
    assert name in judged or {f.verdict for f in shown.findings} == {"not measured"}
    assert not shown.panels


def test_optimizers_are_told_apart_and_judged_in_pairs():
    found = made_up.compared()
    shown = show(study("optimizers", found))
    names = ["adam", "adam, averaged", "adam-bc", "sgd", "sgd, DiSK 0.5"]
    assert list(shown.charts[0].series[0].x) == names
    assert [f.verdict for f in shown.findings] == ["confirmed", "confirmed", "refuted"]
    assert verdicts("optimizers", made_up.compared(corrected=0.89))[1] == "refuted"
    assert verdicts("optimizers", found[:1]) == ["not measured"] * 3


def test_records_of_no_study_are_shown_by_measure():
    for measure in ("throughput", "batch-size", "memory", "profile", "compile", "scaling", "accuracy"):
        records = [r for group in PLAUSIBLE.values() for r in group if r.measure == measure]
        shown = show(study(f"bench-{measure}", records[:6]))
        assert shown.panels and len(shown.table) and not shown.findings, measure


def test_fig5_confirmed_and_refuted():
    assert verdicts("fig5", made_up.fig5(book_keeping=0.8, ghost=0.7))[0] == "confirmed"
    assert verdicts("fig5", made_up.fig5(book_keeping=0.6, ghost=0.7))[0] == "refuted"
    assert verdicts("fig5", made_up.fig5(book_keeping=0.4))[1] == "refuted"


def test_evidence_says_at_which_scale():
    small, paper = (
        show(study("fig5", made_up.fig5(), scale)).findings[0].evidence for scale in ("small", "paper")
    )
    assert small.startswith("At small scale: ") and "small" not in paper


def test_a_claim_about_hardware_is_not_judged_at_small_scale():
    records = [race(1 / 3.1, engine="opacus", method="per-example", model="vit-huge")]
    assert verdicts("fig3", records)[1] == "not measured"
    assert verdicts("fig3", records, "paper")[1] == "confirmed"
    cheap = [race(1 / 1.5, engine="opacus", method="per-example", model="vit-huge")]
    assert verdicts("fig3", cheap, "paper")[1] == "refuted"


def test_fig1_reaches_plain_non_private():
    fast, slow = ([race(s, method="auto"), race(0.4, method="per-example")] for s in (0.95, 0.6))
    assert verdicts("fig1", fast)[0] == "confirmed"
    assert verdicts("fig1", slow)[0] == "refuted"


def test_a_speed_with_parameters_left_out_proves_nothing():
    fast = race(1.2, engine="fastdp", method="bk-ghost")
    cheat = dataclasses.replace(
        fast,
        results=fast.results
        | {"trains": {"parameters": 150, "of": 152, "skipped": ["cls_token", "pos_embed"]}},
    )
    assert verdicts("fig1", [fast])[0] == "confirmed"
    assert verdicts("fig1", [cheat])[0] == "not measured"
    shown = show(study("fig1", [cheat]))
    assert "cls_token and 1 more" in shown.table["Status"][0]
    assert "†" in shown.panels[0].series[0].x[0]


@pytest.mark.parametrize(("last", "verdict"), [(20, "confirmed"), (100, "refuted")])
def test_fig2_gap(last, verdict):
    sizes = {"vit-tiny": (400, 200), "vit-base": (200, last)}
    records = [
        fits(n, method=m, engine=e, model=model)
        for model, pair in sizes.items()
        for n, m, e in zip(pair, ("non-private", "per-example"), ("torch", "opacus"))
    ]
    assert verdicts("fig2", records)[0] == verdict


def test_scaling():
    assert verdicts("fig8", scaled(private=0.99, plain=0.9))[0] == "confirmed"
    assert verdicts("fig8", scaled(private=0.9, plain=0.99))[0] == "refuted"
    assert verdicts("fig-a4", scaled(0.995, 0.989), "paper") == ["confirmed", "confirmed"]
    points = {n: 7.0 * amdahl(0.97, n) for n in (1, 2, 4, 8)}
    assert parallel_fraction(points) == pytest.approx(0.97)


@pytest.mark.parametrize(("share", "verdict"), [(0.70, "confirmed"), (0.60, "refuted")])
def test_simulation(share, verdict):
    assert verdicts("simulation", [], **made_up.curves(share))[0] == verdict


def test_accuracy():
    apart = [trained(0.71, method="ghost"), trained(0.60, method="bk-ghost")]
    assert verdicts("table-a4", PLAUSIBLE["table-a4"]) == ["confirmed", "confirmed", "refuted", "refuted"]
    assert verdicts("table-a4", apart)[0] == "refuted"
    steps = [trained(0.7, batch_size=8), trained(0.6, batch_size=16)]
    assert verdicts("batch-size-accuracy", steps) == ["refuted"]
    assert verdicts("batch-size-accuracy", PLAUSIBLE["batch-size-accuracy"]) == ["confirmed"]


def test_sections():
    assert (
        verdicts("table-a3", [profile(0.67, engine="opacus", method="per-example")], "paper")[:2]
        == ["confirmed"] * 2
    )
    assert (
        verdicts("table-a3", [profile(0.17, engine="opacus", method="per-example")], "paper")[:2]
        == ["refuted"] * 2
    )


@pytest.mark.parametrize(("data", "verdict"), [((0.05, 0.01), "confirmed"), ((0.01, 0.05), "refuted")])
def test_loading_of_small_batches(data, verdict):
    records = []
    for batch, seconds in zip((4, 64), data):
        one = profile(batch_size=batch)
        one.results["sections_s"]["data"] = seconds
        records.append(one)
    shown = show(study("loader-workers", records))
    assert shown.findings[0].verdict == verdict and len(shown.panels) == 1


def test_parameters_as_the_recipe_counts_them():
    shown = show(study("table1", [], parameters={"vit-base": 85_900_000, "vit-tiny": 5_550_000}))
    assert (
        shown.table["Model"].tolist() == ["ViT-Tiny", "ViT-Base"] and shown.findings[0].verdict == "confirmed"
    )


def test_precisions_have_a_line_each():
    records = [race(0.8, model=m, precision=p) for m in made_up.VITS for p in ("fp32", "tf32")]
    (panel,) = show(study("fig1", records)).panels
    assert [line.name for line in panel.series] == ["dptrain auto", "dptrain auto, TF32"]


def test_a_library_that_is_not_installed_refutes_nothing():
    absent = record(
        None, "unsupported", "fastdp is not installed; pip install it.", engine="fastdp", method="bk-ghost"
    )
    broken = record(None, "unsupported", "it does not know this layer.", engine="fastdp", method="bk-ghost")
    assert verdicts("table-a1", [absent])[0] == "not measured"
    assert verdicts("table-a1", [broken])[0] == "refuted"


def test_missing_records_are_told():
    found = dataclasses.replace(study("fig5", made_up.fig5()), missing=("a", "b"))
    assert any(note.startswith("2 of ") for note in show(found).notes)


def test_methods_have_the_names_of_the_engines():
    for method in methods.TABLE:
        assert {report_names.method(name) for name in (method.name, *method.aliases)} == {method.name}
    assert list(report_names.METHODS) == list(methods.NAMES)


@pytest.mark.parametrize(
    "name", ["opacus", "opacus-hooks", "private_vision", "private-vision", "jax_privacy"]
)
def test_libraries_are_known_however_they_are_written(name):
    assert report_names.engine(name) in report_names.LIBRARIES


def test_a_method_has_one_colour_everywhere():
    looks = {}
    for name in ("fig1", "fig6", "fig8"):
        for panel in show(study(name, PLAUSIBLE[name])).panels:
            for line in panel.series:
                looks.setdefault(line.name, set()).add(line.look)
    assert all(len(found) == 1 for found in looks.values())


@pytest.mark.parametrize("name", ["fig1", "fig5", "table-a3"])
def test_figures_are_drawn(name, tmp_path):
    draw(show(study(name, PLAUSIBLE[name])), [tmp_path / "a.png", tmp_path / "a.pdf"])
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "a.pdf").read_bytes()[
        :4
    ] == b"%PDF"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(STUDIES.keys() - WITHOUT_CHARTS))
def test_every_figure_is_drawn(name, tmp_path):
    extra = made_up.curves() if name == "simulation" else {}
    draw(show(study(name, PLAUSIBLE[name], **extra)), [tmp_path / "a.png"])
    assert (tmp_path / "a.png").stat().st_size > 5000
