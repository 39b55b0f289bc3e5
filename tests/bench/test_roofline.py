"""What a machine would allow."""

import dataclasses

import torch
from torch import nn

from benchmarks.roofline.__main__ import extras
from benchmarks.roofline.rates import Rates


def test_roofline_takes_the_cheaper_way():
    import dptrain.torch as dpt

    rates = Rates(1e12, 1e9, 1e9, 1e9, 1e9, 1e9, 1e9)
    model = nn.Linear(1000, 1000, bias=False)
    task = dpt.clipped_grad(model, lambda m, x: m(x).square().sum(1), clip_norm=1.0)
    (gram,) = extras(task, torch.randn(2, 1000), 8, rates)
    assert (gram.way, gram.flops) == ("gram", 2 * 8 * 2000)  # T = 1: norms of both operands
    (keep,) = extras(task, torch.randn(2, 1000), 8, dataclasses.replace(rates, flops_per_s=1e3))
    assert keep.way == "keep"
    assert keep.bytes_written == keep.bytes_read == 4 * 8 * 1000 * 1000
