import pytest
import torch
from torch import nn

from dptrain.optim import OPTIMIZERS, SCHEDULES, average_of, build_optimizer, build_schedule


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_holds_the_trainable_parameters_only(name):
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    optimizer = build_optimizer(name, model.parameters(), lr=0.1, weight_decay=0.01)
    assert [p is model.weight for group in optimizer.param_groups for p in group["params"]] == [True]
    assert optimizer.param_groups[0].get("momentum", 0) == (0.9 if name in ("momentum", "nesterov") else 0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_start_at_the_full_rate_and_never_rise(name):
    optimizer = build_optimizer("sgd", nn.Linear(1, 1).parameters(), lr=2.0)
    schedule = build_schedule(name, optimizer, steps=5)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == 2.0
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0


def test_unknown_names_are_refused():
    parameters = list(nn.Linear(1, 1).parameters())
    with pytest.raises(ValueError, match="no optimizer 'lion'"):
        build_optimizer("lion", parameters, lr=1.0)
    with pytest.raises(ValueError, match="no schedule 'steps'"):
        build_schedule("steps", build_optimizer("sgd", parameters, lr=1.0), 5)


def test_an_average_follows_a_short_run_and_smooths_a_long_one():
    model = nn.Linear(1, 1, bias=False)
    average = average_of(model, decay=0.9)
    with torch.no_grad():
        for _ in range(5):
            model.weight.fill_(1.0)
            average.update_parameters(model)
        assert average.module.weight.item() == pytest.approx(1.0)
        for step in range(400):
            model.weight.fill_(1.0 + (-1) ** step)
            average.update_parameters(model)
    assert abs(average.module.weight.item() - 1.0) < 0.1


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match="between 0 and 1"):
        average_of(nn.Linear(1, 1), decay)
