"""Nothing that is read is ever run: no pickle, no evaluation of text, no code from a model hub."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dptrain"

MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "ruamel",
    "runpy",
    "code",
    "codeop",
    "imp",
    "xml",
}
"""That read code, or formats that hold some."""
BUILTINS = {"eval", "exec", "compile", "__import__", "input"}
ATTRIBUTES = {
    "torch.load",
    "torch.hub",
    "torch.package",
    "torch.jit.load",
    "np.load",
    "numpy.load",
    "jnp.load",
    "jax.numpy.load",
    "pd.read_pickle",
    "pandas.read_pickle",
    "os.system",
    "os.popen",
    "transformers.pipeline",
}
FROM_A_HUB = ("from_pretrained", "from_config")
"""Functions of transformers that run code of a model's folder if they are let, or ask whether they may."""


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an attribute, else nothing."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *names[::-1]]) if isinstance(node, ast.Name) else ""


def violations(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            if (node.module or "").split(".")[0] in MODULES or names & ATTRIBUTES:
                yield f"from {node.module}"
        elif isinstance(node, ast.Attribute) and dotted(node) in ATTRIBUTES:
            yield dotted(node)
        elif isinstance(node, ast.Call):
            yield from _calls(node)


def _calls(node: ast.Call) -> Iterator[str]:
    if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
        yield node.func.id
    said = {k.arg: k.value.value for k in node.keywords if k.arg and isinstance(k.value, ast.Constant)}
    if said.get("allow_pickle") or said.get("shell") or said.get("weights_only") is False:
        yield f"unsafe option: {ast.unparse(node)}"
    if "trust_remote_code" in {k.arg for k in node.keywords} and said.get("trust_remote_code") is not False:
        yield f"trusts code from a hub: {ast.unparse(node)}"
    if isinstance(node.func, ast.Attribute) and node.func.attr in FROM_A_HUB:
        if said.get("trust_remote_code") is not False:
            yield f"does not refuse code from a hub: {ast.unparse(node)}"
        if (
            node.func.attr == "from_pretrained"
            and "output_loading_info" in said
            and not said.get("use_safetensors")
        ):
            yield f"may load a pickle: {ast.unparse(node)}"


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_no_code_is_read(path):
    assert list(violations(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import torch\ntorch.hub.load('a', 'b')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nread = np.load",
        "eval('1')",
        "exec(text)",
        "import yaml",
        "import marshal, shelve",
        "AutoModel.from_pretrained('x')",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=flag)",
        "AutoModel.from_pretrained('x', trust_remote_code=False, output_loading_info=True)",
        "subprocess.run('x', shell=True)",
    ],
)
def test_such_code_would_be_seen(source):
    assert list(violations(source))


def test_timm_reads_safetensors_and_nothing_else(monkeypatch):
    """The file that is asked for is a safetensors file; where there is none, there are no weights."""
    from timm.models import _hub

    from dptrain.models import ModelError, build

    asked = []

    def download(repo_id, filename, **_):
        asked.append(filename)
        raise OSError("there is no network")

    monkeypatch.setattr(_hub, "hf_hub_download", download)
    with pytest.raises(ModelError, match="cannot be built"):
        build("vit-tiny", 10, (3, 32, 32), pretrained=True)
    assert asked == ["model.safetensors"]
    with pytest.raises(ModelError, match="no published weights in safetensors"):
        build("legacy_seresnet18", 10, (3, 224, 224), pretrained=True)


def test_transformers_takes_no_code_and_no_pickle(tmp_path, text_models, monkeypatch):
    """A configuration that names code beside it is refused without a question; so are pickled weights."""
    import json
    import shutil

    import torch

    from dptrain.models import ModelError
    from dptrain.models.transformers_classifier import Text, build_huggingface

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run foreign code"))
    evil = tmp_path / "evil"
    evil.mkdir()
    auto = {"AutoConfig": "configuration_evil.Evil"}
    (evil / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    (evil / "configuration_evil.py").write_text("raise SystemExit('foreign code ran')\n")
    text = Text({"input_ids": torch.zeros(1, 4, dtype=torch.int64)}, 10, 0)
    with pytest.raises(ModelError, match="There is no model"):
        build_huggingface(f"hf:{evil}", 2, (4,), False, text)

    pickled = tmp_path / "pickled"
    shutil.copytree(text_models / "bert", pickled)
    torch.save({"weight": torch.zeros(1)}, pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        build_huggingface(f"hf:{pickled}", 2, (4,), True, text)


def test_datasets_has_no_loading_scripts(tmp_path):
    """A folder with a script for datasets is data or nothing: since version 4 there are no such scripts."""
    datasets = pytest.importorskip("datasets")
    assert int(datasets.__version__.split(".")[0]) >= 4

    from dptrain.data import DataError, load

    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/evil.py").write_text("raise SystemExit('foreign code ran')\n")
    with pytest.raises(DataError, match="cannot be read"):
        load(f"hf:{tmp_path / 'evil'}")


def test_torch_reads_weights_only_by_default():
    """What libraries behind us call without saying so."""
    from timm.models._hub import load_state_dict_from_hf

    assert inspect.signature(load_state_dict_from_hf).parameters["weights_only"].default is True
