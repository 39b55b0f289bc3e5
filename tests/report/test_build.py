"""From files to files: what is read, written, refused and escaped."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import sys

import pytest

from dptrain.report import ReportError, build, frame, page, read
from dptrain.report.tables import latex, markdown
from dptrain.report.words import written

from . import made_up
from .conftest import fill


def test_everything_is_written(tmp_path):
    folder = fill(tmp_path, ("fig5",))
    paths = build(folder)
    names = {str(p.relative_to(folder)) for p in paths}
    assert {
        "report.html",
        "figures/fig5.png",
        "figures/fig5.pdf",
        "tables/fig5.md",
        "tables/fig5.tex",
    } <= names
    assert all(p.stat().st_size > 100 for p in paths)
    with (folder / "tables/fig5.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + len(made_up.fig5())


def test_formats_are_chosen(folder):
    assert {p.suffix for p in build(folder, ["md", "csv"])} == {".md", ".csv"}
    assert not (folder / "figures").exists()
    with pytest.raises(ReportError, match="no format 'doc'"):
        build(folder, ["doc"])


def test_records_without_a_study_are_reported(tmp_path):
    made_up.write(tmp_path, [made_up.race(0.9), *made_up.failures()])
    assert (tmp_path / "tables/bench-throughput.md") in build(tmp_path, ["md"])
    text = (tmp_path / "tables/bench-throughput.md").read_text()
    assert "does not fit" in text and "not installed" in text and "<script>" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged: it is not JSON"),
        ("[]", "is damaged: it is not a JSON object"),
        ('{"format": 2}', "format 2"),
        ('{"format": 1, "id": "x"}', "is damaged: it lacks or garbles 'case'"),
        ('{"format": 1, "id": "x", "case": [], "status": "ok"}', "is damaged"),
    ],
)
def test_a_damaged_record_is_named(folder, text, message):
    (folder / "records" / "bad.json").write_text(text)
    with pytest.raises(ReportError, match=re.escape(message)) as caught:
        build(folder)
    assert "bad.json" in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_to_report(tmp_path):
    with pytest.raises(ReportError, match="has no records"):
        build(tmp_path)
    with pytest.raises(ReportError, match="not a folder"):
        build(tmp_path / "nowhere")


def test_a_study_cannot_name_a_file_elsewhere(folder):
    (folder / "studies" / "evil.json").write_text(json.dumps({"name": "../../evil", "cases": []}))
    with pytest.raises(ReportError, match=r"evil\.json"):
        build(folder)


def test_a_library_that_is_missing_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ReportError, match=r"plotly.*pip install 'dptrain\[report\]'"):
        build(folder)
    assert build(folder, ["md"])


def test_the_frame_is_flat(folder):
    table = frame(list(read(folder).records.values()))
    assert len(table) == len(read(folder).records)
    row = table[table["id"].str.startswith("fig1-") & (table["status"] == "ok")].iloc[0]
    assert (
        row["exactness.verdict"] == "exact"
        and row["ratio_to_non_private"] > 0
        and row["model"] in made_up.VITS + made_up.BITS
    )


def test_what_records_say_is_escaped(folder):
    evil = '</script><script>alert("x")</script> & 100 % | $x_1$'
    one = made_up.record(
        None, "error", evil, model=f"m{evil}", environment=made_up.ENVIRONMENT | {"commit": evil}
    )
    made_up.write_study(folder, "fig3", [dataclasses.replace(one, id="evil"), made_up.race(0.5, model=evil)])
    text = page(folder, folder / "out.html").read_text()
    own = text.replace(_plotly(), "")
    assert "<script>alert" not in own and "&lt;script&gt;alert" in own
    table = frame(list(read(folder).records.values()))[["model", "sentence"]]
    assert "<script>" not in markdown(table) and "\\|" in markdown(table)
    tex = latex(table, evil, "x")
    assert r"100 \% | \$x\_1\$" in tex and not re.search(r"(?<!\\)[%$&] 100", tex)


def test_the_page_needs_no_network(folder):
    text = page(folder, folder / "out.html").read_text()
    own = text.replace(_plotly(), "")
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|@import|url\(", own)
    assert "http" not in own.replace("http-equiv", "")
    assert "default-src 'none'" in own and text.count(_plotly()) == 1
    assert str(folder.parent) not in text


def _plotly():
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0.123456, "0.1235"),
        (12.0, "12"),
        (1234.56, "1,235"),
        (2.04e-5, "2.04e-05"),
        ("", "–"),
        (0, "0"),
        (float("inf"), "∞"),
    ],
)
def test_numbers_are_written_for_people(value, text):
    assert written(value) == text
