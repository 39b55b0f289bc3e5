"""Rebuild the tables and pictures of README.md and docs/performance.md from the records in ``results/``.

python -m benchmarks.summary
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.summary import accuracy, figure, tables
from dptrain import report

ROOT = Path(__file__).resolve().parents[2]


def records() -> dict[str, dict]:
    """By file name under ``results/``: those of single commands, and the folders of ``dptrain bench``.

    Less those that are lists, of audits, which have pages of their own.
    """
    root = ROOT / "results"
    paths = [*sorted(root.glob("*.json")), *sorted(root.glob("*/records/*.json"))]
    found = {str(path.relative_to(root)): json.loads(path.read_text()) for path in paths}
    return {name: record for name, record in found.items() if isinstance(record, dict)}


def accuracy_rows(found: dict[str, dict]) -> list[str]:
    rows = []
    for name, record in found.items():
        if record.get("kind") != "training run":
            continue
        config, final = record["config"], record["final"]
        seconds = final["elapsed_s"]
        time = f"{seconds / 60:.1f} min" if seconds > 60 else f"{seconds:.1f} s"
        how = "from scratch"
        if config["weights"]:
            how = f"ImageNet weights, {config['trainable']} parameters, {config['image_size']} pixels"
            how = how.replace("head parameters", "head only")
        what = "training on cached features" if config["cache_features"] else "training"
        # examples that take part in a step, on average, over the sample rate
        step = record["summary"]["mechanism"]["segments"][0]["step"]
        size = round(step["expected_batch_size"] / step["sampling"]["sample_rate"])
        rows.append(
            f"| {config['model']} on {config['data']} ({size:,} examples), {how}, "
            f"ε = {config['epsilon']:g}, δ = {config['delta']:g} | "
            f"**{100 * final['accuracy']:.1f} %** test accuracy, {time} of {what} | `results/{name}` |"
        )
    return rows


def zoo_row(found: dict[str, dict]) -> list[str]:
    """How many models of the zoo are exact, here and under Opacus's hooks."""
    mine, theirs = found.get("zoo-dptrain.json"), found.get("zoo-opacus-hooks.json")
    if not mine or not theirs:
        return []

    def counts(record: dict) -> tuple[int, int, int]:
        fit = [model for model in record["models"] if not model["refusable"]]
        return len(fit), *(sum(m["verdict"] == v for m in fit) for v in ("exact", "WRONG"))

    (models, exact, wrong), (_, peers, peers_wrong) = counts(mine), counts(theirs)
    return [
        f"| {models} small timm and transformers models | **{exact} exact**, {wrong} wrong, the others "
        f"refused; Opacus's hooks: {peers} exact, {peers_wrong} silently wrong ([all](docs/zoo.md)) | "
        "`results/zoo-*.json` |"
    ]


def probe_rows(found: dict[str, dict]) -> list[str]:
    return [
        f"| {r['case']['model']}, batch {r['case']['batch']}: the probe, once per input shape | "
        f"**{r['probe_in_steps']:.1f} ordinary steps**; what capture adds to a forward pass: "
        f"{100 * r['capture_overhead_of_a_step']:+.1f} % of a step | `results/{name}` |"
        for name, r in found.items()
        if r.get("kind") == "probe cost"
    ]


def finding_rows(folder: Path) -> list[str]:
    """What a reproduction says of each claim."""
    if not (folder / "studies").is_dir():
        return []
    rows = ["| study | claim | verdict | evidence |", "| --- | --- | --- | --- |"]
    for study in report.read(folder).studies:
        for finding in report.show(study).findings:
            cells = (f"`{study.name}`", finding.claim, f"**{finding.verdict}**", finding.evidence)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def filled(text: str, name: str, rows: list[str]) -> str:
    """A page with the block ``<!-- name --> ... <!-- end -->`` replaced; as it was if there are no rows."""
    if not rows:
        return text
    block = f"<!-- {name} -->\n" + "\n".join(rows) + "\n<!-- end -->"
    return re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _: block, text, flags=re.S)


def main() -> None:
    found = records()
    measured = ["| what | measured | record |", "| --- | --- | --- |"]
    measured += zoo_row(found) + probe_rows(found) + accuracy.rows(found) + accuracy_rows(found)
    blocks = {
        "measured": measured,
        "accuracy on mnist": accuracy.mnist(found),
        "accuracy on cifar100": accuracy.cifar(found),
        "speed": tables.speed(found),
        "speed on a GPU": tables.speed(found, "cuda"),
        "findings": finding_rows(ROOT / "results" / "reproduced-small"),
        "benched": tables.benched(found),
        "speed in jax": tables.speed_in_jax(found),
        "compilations in jax": tables.compilations_in_jax(found),
        "engines": tables.engines(found),
        "memory": tables.memory(found),
        "memory on a GPU": tables.memory(found, "cuda"),
        "largest batch": tables.largest(found),
        "rates": tables.rates(found),
        "roofline": tables.roofline(found),
        "remaining": tables.remaining(found),
    }
    for page in (
        ROOT / "README.md",
        *(ROOT / "docs" / f"{page}.md" for page in ("accuracy", "performance", "jax", "reproduce")),
    ):
        text = page.read_text()
        for name, rows in blocks.items():
            text = filled(text, name, rows)
        page.write_text(text)
    figure.draw(found, ROOT / "docs" / "images" / "speed.png")
    figure.draw(found, ROOT / "docs" / "images" / "speed-gpu.png", "cuda")
    figure.draw_benched(found, ROOT / "docs" / "images" / "speed-benched.png")


if __name__ == "__main__":
    main()
