"""What a single rank shows of models under FSDP2: refusals, and that the probe leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import dptrain.torch as dpt
from dptrain.core.entropy import Key
from tests.distributed.fsdp_scenes import build, losses, sharded
from tests.distributed.scenes import mechanism


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compile": True}, "compile=True is not for"),
        ({"memory_budget": 10**6}, "memory_budget is not for"),
        ({"grid": 2.0**-20}, "grid is not for"),
    ],
)
def test_options_that_are_refused(mesh, options, words):
    model, data = build(torch.float32)
    clipped = dpt.clipped_grad(sharded(model, mesh), losses, clip_norm=1.0, **options)
    with pytest.raises(dpt.Refused, match=words):
        clipped(data)


def test_parameters_that_are_not_sharded_by_rows_are_refused(mesh):
    model, data = build(torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    with pytest.raises(dpt.Refused, match="is trained and not sharded"):
        dpt.clipped_grad(model, losses, clip_norm=1.0)(data)
    model = fully_shard(nn.Linear(4, 4), mesh=mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    with pytest.raises(dpt.Refused, match="only parameters sharded by their first dimension"):
        dpt.clipped_grad(model, lambda m, x: m(x).sum(1), clip_norm=1.0)(torch.randn(3, 4))


def test_a_mesh_of_some_ranks_is_refused(mesh):
    model, data = build(torch.float32)
    ranks = dpt.Ranks()
    ranks.size = 2
    with pytest.raises(dpt.Refused, match="sharded over 1 of 2 ranks"):
        dpt.clipped_grad(sharded(model, mesh), losses, clip_norm=1.0, ranks=ranks)(data)


def test_loops_that_are_not_for_shards_are_refused(mesh):
    model, data = build(torch.float32)
    model = sharded(model, mesh)
    with pytest.raises(ValueError, match="physical_batch_size as a number"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        dpt.make_private(model, optimizer, data, losses, mechanism(1.0))
    with pytest.raises(dpt.Refused, match="plan at their first batch"):
        dpt.clipped_grad(model, losses, clip_norm=1.0).plan(data)


class Remembering(nn.Module):
    """Has a buffer, a list and a gradient from before."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(4, 4), [1]
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.layer(x)


@pytest.mark.parametrize("works", [True, False])
def test_the_probe_leaves_the_model_as_it_was(mesh, works):
    torch.manual_seed(0)
    model = fully_shard(Remembering(), mesh=mesh)
    model.layer.weight.grad = torch.ones_like(model.layer.weight)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    objects = [id(model.seen), id(model.scale), *map(id, model.parameters()), id(model.layer.weight.grad)]
    state = torch.get_rng_state()

    def loss(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m(x).square().sum(1) if works else m(x - x.mean(0)).square().sum(1)

    clipped = dpt.clipped_grad(model, loss, clip_norm=1.0)
    if works:
        clipped(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    else:
        with pytest.raises(dpt.Refused, match="examples mix"):
            clipped(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert all(torch.equal(t.to_local(), after[n].to_local()) for n, t in before.items() if n != "scale")
    assert torch.equal(before["scale"], after["scale"]) and model.seen == [1]
    assert objects == [
        id(model.seen), id(model.scale), *map(id, model.parameters()), id(model.layer.weight.grad)
    ]  # fmt: skip


def same(model: nn.Module, plain: nn.Module) -> None:
    found = model.state_dict()
    assert all(torch.allclose(found[name].full_tensor(), p) for name, p in plain.state_dict().items())


def test_a_model_goes_on_with_ordinary_training_and_evaluation(mesh):
    model, data = build(torch.float64)
    plain = copy.deepcopy(model)
    model = sharded(model, mesh)
    clipped = dpt.clipped_grad(model, losses, clip_norm=0.3)
    clipped(data[:3])
    with torch.no_grad():  # leaves the root's parameters whole
        assert torch.allclose(model(data[:, :-1]), plain(data[:, :-1]))
    total = clipped(data[:3])
    alone = dpt.clipped_grad(plain, losses, clip_norm=0.3, ranks=dpt.Ranks())
    want = alone(data[:3])
    assert all(torch.allclose(g.full_tensor(), want.grads[name]) for name, g in total.grads.items())
    for m, clip in ((model, clipped), (plain, alone)):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        gradient = dpt.privatize(clip(data[:3]), mechanism(1.0), Key.from_seed(1))
        with torch.no_grad():
            m(data[:, :-1])
        dpt.apply(optimizer, m, gradient)
    same(model, plain)
    with torch.no_grad():
        model(data[:, :-1])
        for m in (model, plain):
            m.load_state_dict({name: 2 * p for name, p in m.state_dict().items()})
    want = alone(data[:3])
    assert all(torch.allclose(g.full_tensor(), want.grads[n]) for n, g in clipped(data[:3]).grads.items())
    losses(model, data).sum().backward()
    losses(plain, data).sum().backward()
    found = dict(model.named_parameters())
    assert all(
        torch.allclose(found[name].grad.full_tensor(), p.grad)
        for name, p in plain.named_parameters()
        if p.requires_grad
    )
