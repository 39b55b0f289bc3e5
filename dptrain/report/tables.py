"""Tables as Markdown, CSV and LaTeX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dptrain.report.errors import needs
from dptrain.report.shown import Shown
from dptrain.report.words import NOTHING, written

if TYPE_CHECKING:
    import pandas as pd

#: what pdflatex lacks a glyph for, after pandas has escaped its own characters
_LATEX = str.maketrans(
    {
        "✓": r"\checkmark{}",
        "†": r"\textdagger{}",
        "×": r"\texttimes{}",
        "–": "--",
        "−": r"$-$",
        "≤": r"$\leq$",
        "≥": r"$\geq$",
        "≈": r"$\approx$",
        "ε": r"$\varepsilon$",
        "δ": r"$\delta$",
        "σ": r"$\sigma$",
        "√": r"$\surd$",
        "∞": r"$\infty$",
        "…": r"\ldots{}",
        "’": "'",
    }
)


def words(table: pd.DataFrame) -> pd.DataFrame:
    """The cells as people read them."""
    return table.map(written) if len(table) else table


def numeric(table: pd.DataFrame, column: str) -> bool:
    """Whether a column holds numbers, and stands on the right."""
    types = needs("pandas").api.types
    values = table[column].dropna()
    return len(values) > 0 and all(types.is_number(v) and not isinstance(v, bool) for v in values)


def markdown(table: pd.DataFrame) -> str:
    """A pipe table; pipes and line ends in cells are escaped, and no cell becomes HTML."""
    columns = list(table.columns)
    rule = ["---:" if numeric(table, c) else "---" for c in columns]
    rows = [columns, rule, *words(table).to_numpy().tolist()]
    cells = [[_markdown_cell(str(c)) if i != 1 else c for c in row] for i, row in enumerate(rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def _markdown_cell(text: str) -> str:
    text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def latex(table: pd.DataFrame, caption: str, label: str) -> str:
    """A floating table with booktabs' rules."""
    needs("jinja2")
    align = "".join("r" if numeric(table, c) else "l" for c in table.columns)
    plain = words(table).map(lambda cell: " ".join(str(cell).split())) if len(table) else table
    text = plain.to_latex(index=False, escape=True, column_format=align)
    head = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(caption)}}}", rf"\label{{tab:{label}}}"]
    return "\n".join([*head, text.translate(_LATEX).rstrip(), r"\end{table}", ""])


def _latex(text: str) -> str:
    escaped: dict[str, str | int | None] = {c: f"\\{c}" for c in "&%$#_{}"}
    escaped |= {
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
    }
    return text.translate(str.maketrans(escaped)).translate(_LATEX)


def write(shown: Shown, path: Path) -> None:
    """Write the table in the format of the path's suffix: .md, .csv or .tex."""
    if path.suffix == ".csv":
        # The numbers themselves, not what people read.
        text = shown.table.to_csv(index=False, na_rep="", lineterminator="\n")
    elif path.suffix == ".tex":
        text = latex(shown.table, shown.title, shown.name)
    else:
        text = _page(shown)
    path.write_text(text, encoding="utf-8")


def _page(shown: Shown) -> str:
    parts = [f"# {_markdown_cell(shown.title)}\n"]
    if shown.shows:
        parts.append(f"{_markdown_cell(shown.shows)}\n")
    parts.append(markdown(shown.table) if len(shown.table) else f"{NOTHING} nothing measured yet\n")
    parts += [f"{_markdown_cell(note)}\n" for note in shown.notes]
    if shown.findings:
        found = [
            f"- **{f.verdict}**: {_markdown_cell(f.claim)} {_markdown_cell(f.evidence)}\n"
            for f in shown.findings
        ]
        parts.append("".join(found))
    return "\n".join(parts)
