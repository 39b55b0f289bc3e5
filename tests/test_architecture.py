"""Imports point one way, and the core knows of no tensor library."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dptrain"

# Which parts of dptrain each part may import, besides itself.
_ENGINES = {"core", "torch", "jax"}
_PARTS = {"models", "data", "optim"}
ARROWS: dict[str, set[str]] = {
    "core": set(),
    "torch": {"core"},
    "jax": {"core"},
    "models": _ENGINES,
    "data": _ENGINES,
    "optim": _ENGINES,
    "training": _PARTS | _ENGINES,
    "bench": {"training"} | _PARTS | _ENGINES,
    "audit": {"bench", "training"} | _PARTS | _ENGINES,
    "recipes": {"bench", "training"} | _PARTS | _ENGINES,
    "report": set(),  # reads records only
    "cli": {"recipes", "audit", "bench", "training", "report"} | _PARTS | _ENGINES,
    # `python -m dptrain`, and the package itself, which offers `Mechanism`.
    "__main__": {"cli"},
    "__init__": {"core"},
}

# Libraries that a part must not import, wherever in a file.
_TENSOR_LIBRARIES = {"torch", "torchvision", "timm", "transformers", "jax", "flax", "optax"}
FORBIDDEN: dict[str, set[str]] = {
    "__init__": _TENSOR_LIBRARIES,
    "core": _TENSOR_LIBRARIES,
    "report": _TENSOR_LIBRARIES,
    "torch": {"jax", "flax", "optax"},
    "jax": {"torch", "torchvision", "timm"},
}


def imported_modules(path: Path, module: str) -> Iterator[str]:
    """The full names of all that `path`, being `module`, imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")
                if path.name != "__init__.py":
                    package = package[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base]) if base else ".".join(package)
            # `from dptrain import core` imports dptrain.core.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def part_of(module: str) -> str:
    """``core`` for dptrain.core.mechanism; ``__init__`` for dptrain itself."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    names = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def violations(path: Path, module: str) -> list[str]:
    part = part_of(module)
    found = []
    for imported in imported_modules(path, module):
        library = imported.split(".")[0]
        if library in FORBIDDEN.get(part, set()):
            found.append(f"{part} must not import {library}")
        if library != "dptrain":
            continue
        target = part_of(imported)
        # `from dptrain import Mechanism`, `__version__`: the package itself.
        if target not in ARROWS or target == "__init__":
            target = "core"
        if target != part and target not in ARROWS[part]:
            found.append(f"{part} must not import dptrain.{target}")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_one_way(path):
    module = module_name(path)
    assert part_of(module) in ARROWS, f"give {module} its place in ARROWS"
    assert violations(path, module) == []


def test_arrows_have_no_cycle():
    remaining = {part: set(targets) for part, targets in ARROWS.items()}
    while remaining:
        free = [part for part, targets in remaining.items() if not targets & remaining.keys()]
        assert free, f"a cycle among {sorted(remaining)}"
        for part in free:
            del remaining[part]


@pytest.mark.parametrize(
    ("module", "line", "message"),
    [
        ("dptrain.core.x", "import torch", "core must not import torch"),
        ("dptrain.core.x", "def f():\n    import jax.numpy", "core must not import jax"),
        ("dptrain.core.x", "from dptrain.torch import clip", "core must not import dptrain.torch"),
        ("dptrain.core.x", "from ..torch import clip", "core must not import dptrain.torch"),
        ("dptrain.core.x", "from dptrain import torch", "core must not import dptrain.torch"),
        ("dptrain.torch.x", "import dptrain.jax.y", "torch must not import dptrain.jax"),
        ("dptrain.torch.x", "from dptrain import models", "torch must not import dptrain.models"),
        ("dptrain.data.x", "from ..optim import y", "data must not import dptrain.optim"),
        ("dptrain.report.x", "import dptrain.bench", "report must not import dptrain.bench"),
        ("dptrain.training", "from . import cli", "training must not import dptrain.cli"),
    ],
)
def test_wrong_arrows_are_seen(tmp_path, module, line, message):
    path = tmp_path / "x.py"
    path.write_text(line)
    assert violations(path, module) == [message]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("dptrain.core.x", "from dptrain.core import checks"),
        ("dptrain.core.x", "from . import checks"),
        ("dptrain.torch.x", "import torch"),
        ("dptrain.torch.x", "from dptrain import Mechanism"),
        ("dptrain.training", "import dptrain.torch as dpt"),
    ],
)
def test_right_arrows_pass(tmp_path, module, line):
    path = tmp_path / "x.py"
    path.write_text(line)
    assert violations(path, module) == []


def test_importing_the_core_loads_no_tensor_library():
    core = [module_name(path) for path in sources() if part_of(module_name(path)) == "core"]
    code = (
        f"import sys, dptrain, {', '.join(core)}\n"
        "dptrain.Mechanism\n"
        f"print(sorted({_TENSOR_LIBRARIES!r} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
