import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dptrain.models import ModelError, build, load_weights


def save(model: nn.Module, path, dtype=torch.float32):
    save_file({name: value.to(dtype).contiguous() for name, value in model.state_dict().items()}, path)
    return path


def test_a_saved_model_is_restored_whole(tmp_path):
    first, second = build("convnet", 10, (1, 8, 8)), build("convnet", 10, (1, 8, 8))
    report = load_weights(second, save(first, tmp_path / "w.safetensors"))
    assert len(report.matched) == 6 and not report.adapted and not report.reset
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(first(x), second(x))


def test_a_head_of_another_size_is_reset_to_zero_and_reported(tmp_path):
    path = save(build("convnet", 10, (1, 8, 8)), tmp_path / "w.safetensors")
    model = build("convnet", 3, (1, 8, 8))
    report = load_weights(model, path)
    assert report.reset == ("head.weight", "head.bias")
    assert model.head.weight.abs().max() == 0
    assert "4 tensors matched; 2 reset (head.weight, head.bias)" in str(report)


def test_half_precision_files_are_loaded_to_float32(tmp_path):
    path = save(build("mlp", 10, (1, 8, 8)), tmp_path / "w.safetensors", torch.float16)
    model = build("mlp", 10, (1, 8, 8), weights=path)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_position_table_and_patch_kernel_are_adapted(tmp_path):
    path = save(build("vit-tiny", 10, (3, 64, 64)), tmp_path / "w.safetensors")
    model = build("vit-tiny", 10, (1, 96, 96))
    report = load_weights(model, path)
    assert set(report.adapted) == {"pos_embed", "patch_embed.proj.weight"}
    assert model.pos_embed.shape[1] == 1 + 36
    stored = load_file(path)["patch_embed.proj.weight"]
    assert torch.allclose(model.patch_embed.proj.weight, stored.sum(1, keepdim=True), atol=1e-6)


def test_weights_of_another_model_are_refused(tmp_path):
    path = save(build("mlp", 10, (1, 8, 8)), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"does not fit this model: features\.1\.weight is missing"):
        build("convnet", 10, (1, 8, 8), weights=path)


def test_a_damaged_or_absent_file_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(ModelError, match="no weight file"):
        build("mlp", 10, (1, 8, 8), weights=path)
    path.write_bytes(b"nothing of use")
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        build("mlp", 10, (1, 8, 8), weights=path)


def test_published_vit_tiny_weights(vit_tiny_weights):
    model = build("vit-tiny", 100, (3, 64, 64))
    report = load_weights(model, vit_tiny_weights)
    assert (len(report.matched), report.adapted, report.reset) == (
        149,
        ("pos_embed",),
        ("head.weight", "head.bias"),
    )
