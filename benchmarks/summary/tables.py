"""From records to the tables of README.md and docs/performance.md. Reads nothing but records."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from typing import Any

Record = dict[str, Any]
Rows = list[str]
GIB = 2**30
#: in the name of ordinary training whose matrix products are done as dptrain does its own
SAME_PRODUCTS = "products as here"
#: the order of the cases on pages and in pictures; others follow by name
ORDER = ("vit-tiny", "vit-small", "vit-base", "bit-50x1", "convnext-atto", "vgg11", "gpt2-like")


def of_kind(found: dict[str, Record], kind: str, device: str = "cpu") -> dict[str, Record]:
    """Records of a kind by file name, those of one device, in the order of the cases."""

    def there(record: Record) -> str:
        return record.get("case", {}).get("device") or record["environment"].get("device", "cpu")

    def place(item: tuple[str, Record]) -> tuple[int, str]:
        name = item[1].get("case", {}).get("name")
        return (ORDER.index(name) if name in ORDER else len(ORDER)), item[0]

    fit = {n: r for n, r in found.items() if r.get("kind") == kind and there(r).startswith(device)}
    return dict(sorted(fit.items(), key=place))


def table(head: str, rows: Rows) -> Rows:
    """A Markdown table; nothing where there are no rows."""
    return [f"| {head} |", "|" + " --- |" * (head.count("|") + 1), *rows] if rows else []


# ---------------------------------------------------------------- who is meant in a record


def best(record: Record, *methods: str) -> tuple[str, Record] | None:
    """The fastest contestant of these methods, whatever its options."""
    fit = {
        name: r
        for name, r in record["contestants"].items()
        if r["status"] == "ok" and name.split("+")[0] in methods
    }
    name = max(fit, key=lambda n: fit[n]["ratio_to_non_private"], default=None)
    return None if name is None else (name, fit[name])


def ours(record: Record) -> tuple[str, Record] | None:
    return best(record, "auto")


def bookkeeping(record: Record) -> tuple[str, Record] | None:
    return best(record, "bk-ghost", "bk-mixed-ghost", "bk-mix-opt")


def title(record: Record) -> str:
    """``vit-tiny, batch 16``, and what is not usual about it."""
    case = record["case"]
    parts = [case["name"], f"batch {case['batch_size']}"]
    if case["precision"] != "fp32":
        parts.append(case["precision"])
    if any("compiled" in name for name, r in record["contestants"].items() if r["status"] == "ok"):
        parts.append("compiled")
    if any(r.get("kind") == "peer" for r in record["contestants"].values()):
        parts.append("peers in the process")
    if case.get("memory_budget"):
        parts.append(f"{case['memory_budget'] / 2**20:g} MiB to hold")
    return ", ".join(parts)


def ratio(found: tuple[str, Record] | None) -> str:
    """``0.95``; with what is left out, for a method that leaves parameters out."""
    if found is None:
        return "–"
    skipped = (found[1].get("float64") or {}).get("skipped") or ()
    note = f" (leaves out {len(skipped)} parameters)" if skipped else ""
    return f"{found[1]['ratio_to_non_private']:.2f}{note}"


def physical_ms(result: Record) -> float:
    return 1e3 * statistics.median(result["raw_later_physical_step_s"])


def end_ms(result: Record) -> float:
    return 1e3 * statistics.median(result["raw_end_of_logical_step_s"])


# ---------------------------------------------------------------- tables


def speed(found: dict[str, Record], device: str = "cpu") -> Rows:
    """One row per case: ours, book-keeping and the peers against the best non-private variant."""
    rows = []
    for name, record in of_kind(found, "speed", device).items():
        mine = ours(record)
        if mine is None:
            continue
        low, high = mine[1]["quartiles_of_paired_ratios"]
        options = "".join(f", {option}" for option in mine[0].split("+")[1:])
        error = mine[1].get("float64", {}).get("error_of_sum")
        base = record["contestants"][record["baseline"]]
        cells = [
            title(record),
            f"{physical_ms(base):,.0f} ms, {record['baseline'].removeprefix('non-private ')}",
            f"**{mine[1]['ratio_to_non_private']:.2f}** ({low:.2f} to {high:.2f}{options})",
            *(ratio(each) for each in (bookkeeping(record), best(record, "opacus", "opacus-ghost"))),
            ratio(best(record, "fastdp")),
            "–" if error is None else f"{error:.0e}",
            f"`results/{name}`",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    head = (
        "model | non-private step | dptrain `auto` (quartiles) | book-keeping | Opacus | FastDP "
        "| float64 error | record"
    )
    return table(head, rows)


def speed_in_jax(found: dict[str, Record], device: str = "cpu") -> Rows:
    """One row per case: ours and others against the best of non-private steps."""
    rows = []
    for name, record in of_kind(found, "speed in JAX", device).items():
        mine = ours(record)
        if mine is None:
            continue
        low, high = mine[1]["quartiles_of_paired_ratios"]
        base = record["contestants"][record["baseline"]]
        cells = [
            title(record).removesuffix(", peers in the process"),
            f"{physical_ms(base):,.0f} ms, {record['baseline'].removeprefix('non-private ')}",
            f"**{mine[1]['ratio_to_non_private']:.2f}** ({low:.2f} to {high:.2f})",
            f"{mine[1]['memory_ratio']:.2f}",
            *(ratio(best(record, other)) for other in ("per-example-vmap", "jax-privacy")),
            f"{mine[1]['float64']['error_of_sum']:.0e}",
            f"`results/{name}`",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    head = (
        "model | non-private step | dptrain `auto` (quartiles) | memory | `vmap(grad)` | jax-privacy "
        "| float64 error | record"
    )
    return table(head, rows)


def compilations_in_jax(found: dict[str, Record]) -> Rows:
    """One row per loop over Poisson batches."""
    rows = []
    for name, record in of_kind(found, "compilations in JAX").items():
        for loop, r in record["loops"].items():
            cells = [
                loop,
                f"**{r['compilations']}**",
                f"{r['compiling_s']:.1f} s",
                f"{r['elapsed_s']:.1f} s",
                f"`results/{name}`",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return table("loop | compilations of its step | compiling | in all | record", rows)


def measured(found: dict[str, Record], measure: str) -> dict[str, Record]:
    """Records of ``dptrain bench`` that went well, those of reproductions apart."""
    return {
        name: record
        for name, record in found.items()
        if record.get("status") == "ok"
        and record["case"]["measure"] == measure
        and not name.startswith("reproduced")
    }


def engines(found: dict[str, Record]) -> Rows:
    """Accuracy of the same run on both engines; runs of one engine only belong to studies."""
    rows, records = [], measured(found, "accuracy")
    in_jax = [r["case"]["settings"] for r in records.values() if r["case"]["engine"] == "jax"]
    for name, record in records.items():
        case, results = record["case"], record["results"]
        if case["settings"] not in in_jax:
            continue
        settings = ", ".join(f"{k} {v}" for k, v in case["settings"] if k != "weights")
        low, high = results["interval95"] or (math.nan, math.nan)
        rows.append(
            f"| {case['model']}, {settings} | {case['engine']} | {100 * results['mean']:.2f} % "
            f"({100 * low:.2f} to {100 * high:.2f}) | {len(results['accuracies'])} | `results/{name}` |"
        )
    return table("run | engine | test accuracy (95 % interval of the mean) | seeds | record", rows)


def benched(found: dict[str, Record]) -> Rows:
    """Throughput records of ``dptrain bench``, one row each, in the order of the cases."""
    rows = []
    for name, record in throughput(found).items():
        r, accumulate = record["results"], record["case"]["accumulate"]
        step = lambda result: f"{1e3 * result['logical_step_s'] / accumulate:,.0f} ms"  # noqa: E731, B023
        mine, own, same = private_of(record), baseline_of(record), baseline_of(record, SAME_PRODUCTS)
        low, high = r["interval95_of_ratio"]
        error = r["exactness"].get("error_of_sum")
        cells = [
            case_title(record["case"]),
            step(mine),
            f"{step(own[1])}, {own[0]}",
            f"**{speed_beside_pytorch(record):.2f}**",
            "–" if same is None else step(same[1]),
            f"{r['ratio_to_non_private']:.2f} ({low:.2f} to {high:.2f})",
            f"{r['exactness']['verdict']}{'' if error is None else f', {error:.0e}'}",
            f"`results/{name}`",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    head = (
        "model | private step | PyTorch's non-private step | speed against it "
        "| non-private step with our products | speed against the faster of both (95 %) | gradient | record"
    )
    return table(head, rows)


def throughput(found: dict[str, Record]) -> dict[str, Record]:
    """Private records of throughput in ``results/cpu``, in the order of the cases."""

    def place(item: tuple[str, Record]) -> tuple:
        model = item[1]["case"]["model"].replace("_", "-")
        return ORDER.index(model) if model in ORDER else len(ORDER), item[1]["case"]["compile"], item[0]

    records = {n: r for n, r in measured(found, "throughput").items() if n.startswith("cpu/")}
    fit = {n: r for n, r in records.items() if r["results"]["exactness"]["verdict"] != "non-private"}
    return dict(sorted(fit.items(), key=place))


def case_title(case: Record) -> str:
    """``vit-tiny, batch 16``, and what is not usual about it."""
    parts = [case["model"].replace("_", "-"), f"batch {case['batch_size']}"]
    parts += [case["precision"]] * (case["precision"] != "fp32") + ["compiled"] * case["compile"]
    parts += [case["method"]] * (case["method"] != "auto")
    if case["budget_mib"] is not None:
        parts.append(f"{case['budget_mib']:g} MiB to hold")
    return ", ".join(parts)


def baseline_of(record: Record, like: str = "") -> tuple[str, Record] | None:
    """The fastest ordinary training by name, of PyTorch alone or of those whose name says ``like``."""
    fit = {
        name.removeprefix("non-private "): c
        for name, c in record["results"]["contestants"].items()
        if c["role"] == "baseline" and c["status"] == "ok" and (SAME_PRODUCTS in name) == bool(like)
    }
    name = min(fit, key=lambda n: fit[n]["logical_step_s"], default=None)
    return None if name is None else (name, fit[name])


def private_of(record: Record) -> Record:
    """The private contestant of a record of throughput."""
    (found,) = (c for c in record["results"]["contestants"].values() if c["role"] == "case")
    return found


def speed_beside_pytorch(record: Record) -> float:
    """Examples per second, of PyTorch's fastest ordinary training as one."""
    return baseline_of(record)[1]["logical_step_s"] / private_of(record)["logical_step_s"]


def memory(found: dict[str, Record], device: str = "cpu") -> Rows:
    """Peaks of private training, each in a fresh process, and the speed of the same case."""
    speeds = measured(found, "throughput")
    rows = []
    for name, record in measured(found, "memory").items():
        case, r = record["case"], record["results"]
        if not case["device"].startswith(device) or r["ratio_to_non_private"] is None:
            continue
        same = lambda c: {**c, "measure": None, "seconds": None}  # noqa: E731
        files = [n for n, other in speeds.items() if same(other["case"]) == same(case)]
        cells = [
            case_title(case),
            f"{r['peak_bytes'] / GIB:.2f} GiB",
            f"{r['baseline_peak_bytes'] / GIB:.2f} GiB",
            f"**{r['ratio_to_non_private']:.2f}**",
            f"**{speed_beside_pytorch(speeds[files[0]]):.2f}**" if files else "–",
            ", ".join(f"`results/{file}`" for file in (name, *files[:1])),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    head = "model | private peak | non-private peak | against it | speed against PyTorch's best | records"
    return table(head, rows)


def largest(found: dict[str, Record]) -> Rows:
    """Largest physical batches, under an emulated card."""
    rows = []
    for file, record in of_kind(found, "largest batch", "").items():
        results = record["contestants"]
        ordinary = [r.get("largest", 0) for n, r in results.items() if n.startswith("non-private")]
        for name, r in results.items():
            if r["status"] == "ok" and max(ordinary, default=0):
                case = record["case"]
                rows.append(
                    f"| {case['name']}, {case['precision']}, {case['gib']:g} GiB | {name} | {r['largest']} | "
                    f"{r['largest'] / max(ordinary):.2f} | `results/{file}` |"
                )
    return table("model, memory | training | largest batch | against non-private | record", rows)


def rates(found: dict[str, Record]) -> Rows:
    """What the machine of the roofline can do."""
    rows = []
    for record in of_kind(found, "roofline").values():
        r = record["rates"]
        giga = {key: value / 1e9 for key, value in r.items()}
        rows = [
            f"| float32 matrix products | {giga['flops_per_s']:.0f} GFLOP/s |",
            f"| reading memory | {giga['read_bytes_per_s']:.1f} GB/s |",
            f"| writing memory that is in use | {giga['write_bytes_per_s']:.1f} GB/s |",
            f"| writing memory that was just allocated | {giga['write_fresh_bytes_per_s']:.1f} GB/s |",
            f"| copying | {giga['copy_bytes_per_s']:.1f} GB/s |",
            f"| reading a cache | {giga['read_cached_bytes_per_s']:.0f} GB/s |",
            f"| Gaussian noise, drawn and added | {giga['noise_per_s']:.2f} billion numbers/s |",
        ]
    return table(f"{record['environment']['threads']} threads | measured", rows) if rows else []


def roofline(found: dict[str, Record]) -> Rows:
    """Counts of an ordinary step, what clipping adds at best, and the ratio that this allows."""
    measured = {r["case"]["name"]: ours(r) for r in of_kind(found, "speed").values() if plain(r)}
    rows = []
    for record in of_kind(found, "roofline").values():
        for name, case in record["cases"].items():
            ordinary, added = case["ordinary"], case["added"]
            routes = ", ".join(
                f"{int(sums['uses'])} {way}" for way, sums in added["by_way"].items() if way != "direct"
            )
            cells = [
                f"{name}, batch {case['batch_size']}",
                f"{ordinary['flops'] / 1e9:.0f} GFLOP, {ordinary['bytes_of_operations'] / 1e9:.1f} GB",
                routes,
                f"{added['flops'] / 1e9:.1f} GFLOP, {added['bytes'] / 1e9:.2f} GB",
                f"{case['ratio_allowed']:.3f}",
                ratio(measured.get(name)),
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return table("model | ordinary step | cheapest routes | they add | allows | measured", rows)


def plain(record: Record) -> bool:
    """Eager, alone, without a budget: what the roofline speaks of."""
    return title(record).count(",") == 1


def remaining(found: dict[str, Record]) -> Rows:
    """Where the time goes that a private step takes longer, in ms of a physical batch."""
    bounds = {n: c for r in of_kind(found, "roofline").values() for n, c in r["cases"].items()}
    flops_per_s = {n: r["rates"]["flops_per_s"] for r in of_kind(found, "roofline").values() for n in bounds}
    rows = []
    for record in of_kind(found, "speed").values():
        name, mine = record["case"]["name"], ours(record)
        if mine is None or name not in bounds or not plain(record):
            continue
        base = record["contestants"][record["baseline"]]
        added = bounds[name]["added"]
        products = 1e3 * added["flops"] / flops_per_s[name]
        traffic = 1e3 * added["seconds"] - products
        end = (end_ms(mine[1]) - end_ms(base)) / record["case"]["accumulate"]
        longer = physical_ms(mine[1]) - physical_ms(base) + end
        rest = longer - products - traffic - end
        cells = [title(record), *(f"{x:.1f}" for x in (longer, products, traffic, end, rest)), used(mine[1])]
        rows.append(f"| {' | '.join(cells)} |")
    head = (
        "model | longer by, ms | products | traffic of gradients | noise and optimizer, a sixteenth "
        "| the rest | routes that were taken"
    )
    return table(head, rows)


def used(result: Record) -> str:
    """``49 materialise, 1 gram``: the routes of the plan that was timed."""
    count = Counter(row["norm"] for row in result.get("plan", ()) if row["norm"] != "direct")
    return ", ".join(f"{n} {norm}" for norm, n in count.most_common())
