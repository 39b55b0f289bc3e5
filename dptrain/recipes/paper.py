"""Figures and tables of "Towards Efficient and Scalable Training of Differentially Private Deep Learning"
(arXiv 2406.17298), a function for each.

At the scale ``paper`` the cases are the paper's: ViT and BiT-ResNet fine-tuned whole on CIFAR-100 at 224
pixels, logical batches of 25,000, GPUs of 32 and 40 GB (emulated by a limit on a larger one). At the scale
``small`` they are few and tiny, and shared between figures.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dptrain.bench import Case, Records, grid
from dptrain.recipes import paper_scaling
from dptrain.recipes.study import Scale

VITS = ("vit-tiny", "vit-small", "vit-base", "vit-large", "vit-huge")
BITS = ("bit-50x1", "bit-101x1", "bit-50x3", "bit-101x3", "bit-152x4")
V100_GIB, A100_GIB = 32.0, 40.0
LOGICAL_BATCH = 25_000
#: of Table 2, on 40 GB, where there is one
LARGEST = {"O-flat": 35, "non-private": 268}
#: what per-example clipping fits into 40 GB with room to spare: one physical batch for all methods of a model
PHYSICAL = dict(zip((*VITS, *BITS), (256, 96, 32, 8, 2, 64, 32, 8, 4, 1)))
#: Table A2
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "vit": {"trainable": "all", "epsilon": 8.0, "delta": 2.04e-5, "lr": 3e-4, "clip_norm": 4.63},
    "bit": {"trainable": "all", "epsilon": 8.0, "delta": 2.04e-5, "lr": 9.8e-4, "clip_norm": 6.53},
}
#: what has a name in the paper, as (engine, method)
OPACUS, PV, PV_MIXED = (
    ("opacus", "O-flat"),
    ("private-vision", "PV-ghost"),
    ("private-vision", "PV-ghost_mixed"),
)
BK, BK_MIXED = ("fastdp", "BK-ghost"), ("fastdp", "BK-MixGhostClip")
BK_OPT = ("fastdp", "BK-MixOpt")
PLAIN, JAX_PLAIN, JAX_DP = ("torch", "non-private"), ("jax", "non-private"), ("jax", "per-example-vmap")
OURS, JAX_OURS = ("torch", "auto"), ("jax", "auto")

GPU = Case(model="vit-base", batch_size=32, accumulate=LOGICAL_BATCH // 32, device="cuda", seconds=20.0)
TINY = Case(model="vit-tiny", image_size=32, batch_size=16, accumulate=4, seconds=2.0)
TINY_BIT = replace(TINY, model="bit-50x1", batch_size=4)
TINY_MODELS = (TINY, replace(TINY, model="vit-small"), TINY_BIT)
TRAINED = Case("accuracy", model="vit-base", batch_size=32, accumulate=1, device="cuda", seeds=3)
TINY_TRAINED = Case(
    "accuracy", model="convnet", image_size=8, num_classes=10, batch_size=64, accumulate=1, seeds=2
)


def of(base: Case, *ways: tuple[str, str], **changes: Any) -> list[Case]:
    """The case with each of the ``(engine, method)`` pairs."""
    return [replace(base, engine=engine, method=method, **changes) for engine, method in ways]


def logical(case: Case) -> Case:
    """With so many physical batches as fill the logical one on all of the case's devices."""
    return replace(case, accumulate=max(1, round(LOGICAL_BATCH / case.batch_size / case.devices)))


def gpu(model: str = "vit-base", **changes: Any) -> Case:
    """A case of the paper's scale, at the physical batch that all methods fit."""
    chosen: dict[str, Any] = {"model": model, "batch_size": PHYSICAL[model]} | changes
    return logical(replace(GPU, **chosen))


def fig1(scale: Scale) -> list[Case]:
    ways = (OPACUS, PV, BK, JAX_DP, OURS, JAX_OURS)
    if scale == "small":
        rest = of(TINY, OPACUS, BK, OURS, model="vit-small")
        return of(TINY, *ways) + rest + of(TINY, OPACUS, OURS, precision="tf32")
    fp32 = [case for model in VITS for case in of(gpu(model), *ways)]
    return fp32 + [case for model in VITS for case in of(gpu(model), OPACUS, OURS, precision="tf32")]


def fig2(scale: Scale) -> list[Case]:
    if scale == "small":
        return of(_search(0.6), PLAIN, OPACUS, OURS) + of(_search(0.6), PLAIN, OPACUS, model="vit-small")
    return [c for m in (*VITS, *BITS) for c in of(_search(A100_GIB, m), PLAIN, OPACUS, OURS)]


def fig3(scale: Scale) -> list[Case]:
    if scale == "small":
        return [case for one in TINY_MODELS for case in of(one, OPACUS, OURS)]
    return [c for m in (*VITS, *BITS) for c in of(gpu(m), OPACUS, ("torch", "per-example"), OURS)]


def fig4(scale: Scale) -> list[Case]:
    if scale == "small":
        return [c for b in (4, 16, 32) for c in of(TINY, PLAIN, OPACUS, OURS, batch_size=b)]
    private = [gpu(batch_size=b) for b in (1, 2, 4, 8, 16, 24, 32, LARGEST["O-flat"])]
    others = [gpu(batch_size=b) for b in (1, 4, 16, 32, 64, 128, 192, LARGEST["non-private"])]
    return [c for one in private for c in of(one, OPACUS)] + [
        c for one in others for c in of(one, PLAIN, OURS)
    ]


def table2(scale: Scale) -> list[Case]:
    if scale == "small":
        return of(_search(0.3), PLAIN, OPACUS) + of(_search(0.4), PLAIN, OPACUS, PV, BK, OURS)
    own = [("torch", m) for m in ("per-example", "ghost", "mixed-ghost", "bk-ghost", "bk-mixed-ghost")]
    ways = (PLAIN, OPACUS, PV, PV_MIXED, BK, BK_MIXED, BK_OPT, *own, ("torch", "bk-mix-opt"), OURS)
    return [case for gib in (V100_GIB, A100_GIB) for case in of(_search(gib, "vit-base"), *ways)]


def fig5(scale: Scale) -> list[Case]:
    """The throughput at the largest batch is in the records of Table 2."""
    return table2(scale)


def fig6(scale: Scale) -> list[Case]:
    if scale == "small":
        often = [c for b in (4, 16, 32) for c in of(TINY, PLAIN, OPACUS, OURS, batch_size=b)]
        return often + of(TINY, PV, BK, JAX_DP, JAX_OURS) + of(TINY, JAX_DP, batch_size=4)
    ways = (PLAIN, JAX_PLAIN, OPACUS, PV, BK, JAX_DP, OURS, JAX_OURS)
    sizes = (1, 2, 4, 8, 16, 32, 64, 128)
    return [c for b in sizes for c in of(gpu(batch_size=b), *ways) if c.engine != "opacus" or b <= 35]


def fig7(scale: Scale) -> list[Case]:
    precisions = {"precision": ("fp32", "tf32")}
    if scale == "small":
        return [c for one in of(TINY, PLAIN, OPACUS, OURS) for c in grid(one, **precisions)]
    return [c for m in VITS for one in of(gpu(m), PLAIN, OPACUS, OURS) for c in grid(one, **precisions)]


def fig8(scale: Scale) -> list[Case]:
    return _scaling(scale, (1, 2, 4, 8, 16, 32, 48, 64, 80))


def fig_a1(scale: Scale) -> list[Case]:
    naive = (("jax", "non-private-virtual"), ("jax", "private-mini"))
    if scale == "small":
        return [c for b in (4, 16, 32) for c in of(TINY, *naive, measure="compile", batch_size=b)]
    sizes = (1, 2, 4, 8, 16, 32, 64, 128)
    return [c for b in sizes for c in of(gpu(batch_size=b), *naive, JAX_OURS, measure="compile")]


def fig_a2(scale: Scale) -> list[Case]:
    if scale == "small":
        both = [c for n in (1, 2) for c in of(_on(n, TINY), PLAIN, OURS)]
        return both + of(_on(1, TINY), PLAIN, OURS, precision="tf32")
    counts = (1, 4, 8, 16, 24)
    one = [_on(n, gpu(precision=p)) for p in ("fp32", "tf32") for n in counts]
    return [case for each in one for case in of(each, PLAIN, OPACUS, OURS)]


def fig_a3(scale: Scale) -> list[Case]:
    return _scaling(scale, (1, 2, 4, 8, 12, 16, 20, 24))


def fig_a4(scale: Scale) -> list[Case]:
    return fig8(scale)


def table1(scale: Scale) -> list[Case]:
    """Any record of a model tells its parameters."""
    if scale == "small":
        return list(TINY_MODELS)
    return [gpu(m) for m in (*VITS, *BITS)]


def count_parameters(scale: Scale, records: Records | None) -> dict[str, Any]:
    """``{"parameters": {model: how many, with 100 classes}}`` of all of Table 1; no weights are made."""
    import timm
    import torch

    from dptrain.models.names import timm_name

    counted = {}
    for name in (*VITS, *BITS):
        with torch.device("meta"):
            model = timm.create_model(timm_name(name), num_classes=100)
        counted[name] = sum(p.numel() for p in model.parameters())
    return {"parameters": counted}


def table_a1(scale: Scale) -> list[Case]:
    torch_ways = (OURS, OPACUS, ("opacus", "functorch_dp"), ("opacus", "O-ghost"), PV, BK)
    jax_ways = (JAX_OURS, ("jax-privacy", "DP"))
    if scale == "small":
        # BiT in JAX is left to the larger scale, for the sake of time; there is no gpt2-like in JAX.
        vit = of(TINY, *torch_ways, *jax_ways)
        bit = of(TINY_BIT, OURS, OPACUS, ("opacus", "O-ghost"), PV, BK)
        small = of(CONVNET, *torch_ways, JAX_OURS)
        text = of(TINY, OURS, OPACUS, ("opacus", "O-ghost"), model="gpt2-like", batch_size=4)
        return vit + bit + small + text
    families = (gpu("vit-base"), gpu("bit-50x1"), gpu(model="vit-tiny"), replace(CONVNET, device="cuda"))
    gpt = replace(GPU, model="gpt2-like", image_size=256, batch_size=8, accumulate=16)
    more = of(TINY, ("fastdp", "BK-MixOpt"), PV_MIXED, device="cuda")
    return [c for one in (*families, gpt) for c in of(one, *torch_ways, *jax_ways)] + more


def table_a2(scale: Scale) -> list[Case]:
    if scale == "small":
        return of(tiny_run(), PLAIN, OURS)
    return [run(model) for model in ("vit-base", "bit-50x1")]


def hyperparameters(scale: Scale, records: Records | None) -> dict[str, Any]:
    """``{"hyperparameters": {"vit": ..., "bit": ...}}`` of the paper."""
    return {"hyperparameters": HYPERPARAMETERS}


def table_a3(scale: Scale) -> list[Case]:
    base = TINY if scale == "small" else gpu()
    return of(base, OPACUS, ("torch", "per-example"), OURS, measure="profile")


def table_a4(scale: Scale) -> list[Case]:
    base = tiny_run() if scale == "small" else run("vit-base")
    own = [("torch", m) for m in ("per-example", "ghost", "bk-ghost")]
    ways = (PLAIN, JAX_PLAIN, OPACUS, JAX_DP, PV, BK, *own, OURS)
    return of(base, *ways) + of(base, PLAIN, OPACUS, precision="tf32")


def batch_size_accuracy(scale: Scale) -> list[Case]:
    base, sizes = (tiny_run(), (16, 64, 256)) if scale == "small" else (run("vit-base"), (4, 8, 16, 32))
    return grid(replace(base, method="auto"), batch_size=sizes)


def tf32_steps(scale: Scale) -> list[Case]:
    """The paper does not tell the optimal number of steps: 40 epochs, of two steps each, are a guess."""
    base = tiny_run() if scale == "small" else replace(run("vit-base", epochs=40.0), seeds=1)
    return grid(replace(base, method="auto"), precision=("fp32", "tf32"))


def loader_workers(scale: Scale) -> list[Case]:
    """Of a profile, the section ``data`` beside the others."""
    if scale == "small":
        return grid(replace(TINY, measure="profile", method="auto"), batch_size=(4, 16, 64))
    return grid(replace(gpu(), measure="profile", method="auto"), batch_size=(1, 4, 16, 64))


def simulation(scale: Scale) -> list[Case]:
    """The step that the curves begin with."""
    return of(TINY if scale == "small" else gpu(), OPACUS, OURS)


def run(model: str, **changes: Any) -> Case:
    """Training by the paper's hyperparameters: CIFAR-100, two epochs of q = 1/2, Adam."""
    chosen = HYPERPARAMETERS[model[:3]] | {
        "data": "cifar100",
        "image_size": 224,
        "pretrained": True,
        "logical_batch_size": float(LOGICAL_BATCH),
        "epochs": 2.0,
        "steps": None,
        "optimizer": "adam",
        "weight_average": 0.0,
    }
    return replace(TRAINED, model=model, settings=tuple(sorted((chosen | changes).items())))


def tiny_run(steps: int = 100) -> Case:
    """A small network on scikit-learn's digits, at an epsilon of 8."""
    chosen = {"data": "digits", "epsilon": 8.0, "delta": 1e-4, "steps": steps, "epochs": None}
    return replace(TINY_TRAINED, settings=tuple(sorted(chosen.items())))


CONVNET = replace(TINY, model="simple-convnet", num_classes=10, batch_size=32)


def _search(memory_gib: float, model: str = "") -> Case:
    """For the largest batch in so much memory; the search begins low enough for every method."""
    if model:
        start = max(1, PHYSICAL[model] // 2)
        return replace(
            gpu(model), measure="batch-size", batch_size=start, accumulate=16, memory_gib=memory_gib
        )
    return replace(TINY, measure="batch-size", batch_size=4, memory_gib=memory_gib)


def _scaling(scale: Scale, counts: tuple[int, ...]) -> list[Case]:
    if scale == "small":
        return [case for n in (1, 2) for case in of(_on(n, TINY), PLAIN, OPACUS, OURS)]
    return [case for n in counts for case in of(_on(n, gpu()), PLAIN, OPACUS, OURS)]


def _on(devices: int, case: Case) -> Case:
    scaled = replace(case, measure="scaling", devices=devices)
    return scaled if case.device == "cpu" else logical(scaled)


def predicted(scale: Scale, records: Records | None) -> dict[str, Any]:
    """Curves of the paper's setting, the prediction for private training, and curves of what was measured."""
    found = paper_scaling.prediction()
    record = None if records is None else records.get(simulation(scale)[-1])
    measured = {}
    if record is not None and record.status == "ok":
        measured = {"measured_curves": paper_scaling.measured_curves(record)}
    return measured | {
        "curves": paper_scaling.curves(),
        "predicted": {
            "share of ideal on 80 GPUs": found["private_efficiency"],
            "the paper's": found["paper_private_efficiency"],
            "effective bandwidth between nodes (bytes/s)": found["effective_bandwidth_bytes_per_s"],
        },
        "dptrain": found["dptrain"],
        "variants": found["variants"],
    }
