"""Rebuild the README's table and picture from the records in ``results/``.

python benchmarks/summary.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["auto", "per-example", "bk-mix-opt", "bk-mixed-ghost", "bk-ghost", "ghost", "opacus"]


def records() -> dict[str, dict]:
    paths = sorted((ROOT / "results").glob("*.json"))
    return {path.name: json.loads(path.read_text()) for path in paths}


def speed_rows(found: dict[str, dict]) -> list[str]:
    rows = []
    for name, record in found.items():
        if "results" not in record:
            continue
        case, results = record["case"], record["results"]
        best = results["auto"]
        against = ""
        if "opacus" in results:
            times = results["opacus"]["physical_step_s"] / best["physical_step_s"]
            against = f", {times:.2f}× Opacus's hooks"
        rows.append(
            f"| {case['model']}, batch {case['batch']}, fp32, {record['threads']} CPU cores, `auto` | "
            f"**{best['ratio_to_non_private']:.2f}×** non-private speed{against}; largest error in "
            f"float64 {record['largest_relative_error_float64']:.0e} | `results/{name}` |"
        )
    return rows


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


def picture(found: dict[str, dict], path: Path) -> None:
    cases = {n: r for n, r in found.items() if "results" in r}
    figure, axes = plt.subplots(1, len(cases), figsize=(4.2 * len(cases) + 1, 3.2), squeeze=False)
    for axis, record in zip(axes[0], cases.values()):
        results = record["results"]
        methods = [m for m in ORDER if m in results]
        heights = [results[m]["ratio_to_non_private"] for m in methods]
        colours = ["#1b6ca8" if m != "opacus" else "#b0b0b0" for m in methods]
        bars = axis.barh(methods[::-1], heights[::-1], color=colours[::-1])
        axis.bar_label(bars, fmt="%.2f", padding=-32, color="white")
        axis.axvline(1.0, color="black", linewidth=1, linestyle="--")
        axis.set_xlim(0, 1.15)
        axis.set_title(f"{record['case']['model']}, batch {record['case']['batch']}", fontsize=10)
        axis.set_xlabel("speed relative to non-private")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    found = records()
    table = ["| what | measured | record |", "| --- | --- | --- |"]
    table += zoo_row(found) + speed_rows(found) + probe_rows(found) + accuracy_rows(found)
    text = (ROOT / "README.md").read_text()
    block = "<!-- measured -->\n" + "\n".join(table) + "\n<!-- end -->"
    text = re.sub(r"<!-- measured -->.*?<!-- end -->", lambda _: block, text, flags=re.S)
    (ROOT / "README.md").write_text(text)
    picture(found, ROOT / "docs" / "images" / "speed.png")


if __name__ == "__main__":
    main()
