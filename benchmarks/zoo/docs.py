"""The table of docs/zoo.md, written from the records."""

from __future__ import annotations

import collections
import json
import re
from pathlib import Path

from .engines import PEER_TOLERANCE

BEGIN, END = "<!-- written by python -m benchmarks.zoo --docs -->", "<!-- end -->"
ORDER = ("dptrain", "opacus-hooks", "opacus-functorch", "opacus-ghost", "fastdp", "private_vision")


def records(folder: Path) -> list[dict]:
    found = [json.loads(path.read_text()) for path in folder.glob("zoo-*.json")]
    place = {name: i for i, name in enumerate(ORDER)}
    return sorted(found, key=lambda record: (place.get(record["engine"], len(ORDER)), record["engine"]))


def write_docs(folder: Path, page: Path) -> None:
    """Replace what stands between the markers of the page."""
    found = records(folder)
    if not found:
        raise SystemExit(f"there is no zoo-*.json in {folder}: run the engines first.")
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{page} lacks its markers.")
    before, rest = text.split(BEGIN)
    after = rest.split(END, 1)[1]
    body = "\n\n".join([counts(found), versions(found), not_exact(found[0]), wrong(found)])
    page.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}")


def counts(found: list[dict]) -> str:
    fit = sum(not m["refusable"] for m in found[0]["models"])
    unfit = len(found[0]["models"]) - fit
    lines = [
        f"| engine | exact | raises | **wrong** | of {unfit} that must be refused: refused | **accepted** |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for record in found:
        good = collections.Counter(kind(m) for m in record["models"] if not m["refusable"])
        bad = collections.Counter(kind(m) for m in record["models"] if m["refusable"])
        cells = [good["exact"], good["raises"], good["WRONG"], bad["raises"], bad["WRONG"]]
        lines.append(f"| {record['engine']} | {' | '.join(map(str, cells))} |")
    families = len({m["family"] for m in found[0]["models"] if not m["refusable"]})
    title = f"{fit} models of {families} families that have a private gradient, and {unfit} that have none:"
    return "\n".join([title, "", *lines])


def kind(model: dict) -> str:
    """A refusal and any other exception count alike."""
    return "raises" if model["verdict"] == "refused" else model["verdict"]


def versions(found: list[dict]) -> str:
    merged: dict[str, str] = {}
    for record in found:
        merged |= record["versions"]
    return "Versions: " + ", ".join(f"{name} {version}" for name, version in sorted(merged.items())) + "."


def not_exact(record: dict) -> str:
    """The first engine's models that are not exact, each with what it says."""
    left = [m for m in record["models"] if not m["refusable"] and m["verdict"] != "exact"]
    lines = [f"- `{m['model']}`: {shortened(m['sentence'], 300)}" for m in left]
    return "\n".join([f"Not exact under {record['engine']}:", "", *(lines or ["- none"])])


def wrong(found: list[dict]) -> str:
    """Wrong results of each engine, models with the same kind of error together."""
    parts = []
    for record in found:
        groups = collections.defaultdict(list)
        for model in record["models"]:
            if model["verdict"] == "WRONG":
                groups[cause(model)].append(model["model"].removeprefix("transformers/"))
        if groups:
            lines = [f"- {title} ({len(names)}): {listed(names)}" for title, names in groups.items()]
            parts.append("\n".join([f"Wrong under {record['engine']}:", "", *lines]))
    return "\n\n".join(parts)


def listed(names: list[str], most: int = 16) -> str:
    """The records hold all of them."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def cause(model: dict) -> str:
    if model["skipped"]:
        rest = "the others exact" if model["error_of_sum"] < PEER_TOLERANCE else "and others wrong"
        return f"trainable parameters left out, {rest}"
    if model["refusable"]:
        return "examples mix, and a gradient is returned all the same"
    return "other values than single examples give"


def shortened(text: str, width: int) -> str:
    text = re.sub(r"\s+", " ", text)
    return text if len(text) <= width else text[: width - 1] + "…"
