"""Schedules against their closed forms, AdamW against the equations in float64."""

import math

import pytest
import torch

from lorica.config import TrainSettings
from lorica.errors import ConfigError
from lorica.train.optim import (
    learning_rate,
    make_optimizer,
    moments,
    num_warmup_steps,
    set_moments,
)


def rates(total, **settings):
    own = TrainSettings(learning_rate=0.5, max_steps=total, **settings)
    return [learning_rate(step, total, own) for step in range(total)]


def test_linear():
    assert rates(5, lr_scheduler_type="linear") == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    assert rates(4, lr_scheduler_type="linear", warmup_steps=2) == pytest.approx(
        [0.25, 0.5, 0.5, 0.25]
    )


def test_cosine():
    wanted = [0.25 * (1 + math.cos(math.pi * step / 7)) for step in range(7)]
    assert rates(7, lr_scheduler_type="cosine") == pytest.approx(wanted)
    warmed = rates(10, lr_scheduler_type="cosine", warmup_steps=3)
    assert warmed == pytest.approx([0.5 / 3, 1 / 3, 0.5, *wanted])


def test_constant():
    assert rates(3, lr_scheduler_type="constant") == [0.5, 0.5, 0.5]
    assert rates(3, lr_scheduler_type="constant", warmup_steps=2) == [0.25, 0.5, 0.5]


def test_wsd():
    found = rates(10, lr_scheduler_type="wsd", decay_ratio=0.4, warmup_ratio=0.2)
    assert found == pytest.approx([0.25, *[0.5] * 6, 0.375, 0.25, 0.125])
    assert rates(5, lr_scheduler_type="wsd")[-2:] == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 13])
def test_every_rate_is_positive_and_at_most_the_peak(kind, total):
    for ratio in (0.0, 0.3):
        found = rates(total, lr_scheduler_type=kind, warmup_ratio=ratio)
        assert all(0 < rate <= 0.5 for rate in found)
        assert max(found) == pytest.approx(0.5)


def test_warmup_is_counted_in_steps_or_as_a_share():
    assert num_warmup_steps(100, TrainSettings(warmup_ratio=0.03)) == 3
    assert num_warmup_steps(100, TrainSettings(warmup_steps=7)) == 7
    assert num_warmup_steps(4, TrainSettings(warmup_steps=7)) == 4


def test_adamw_against_its_equations():
    settings = TrainSettings(
        learning_rate=0.02,
        max_steps=6,
        weight_decay=0.1,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
    )
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = make_optimizer([("a.A", parameter)], settings)
    wanted, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(6):
        gradient = torch.randn(5, 7, generator=generator, dtype=torch.float64)
        rate = learning_rate(step, 6, settings)
        wanted = wanted * (1 - rate * 0.1)
        m = 0.8 * m + 0.2 * gradient
        v = 0.95 * v + 0.05 * gradient**2
        unbiased = m / (1 - 0.8 ** (step + 1))
        wanted = wanted - rate * unbiased / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-6)
        parameter.grad = gradient
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-12, atol=1e-13)


def test_moments_go_to_another_optimizer():
    def stepped(parameter, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        parameter.grad = torch.randn(3, 2, generator=generator)
        optimizer.step()

    one = torch.nn.Parameter(torch.ones(3, 2))
    first = make_optimizer([("a.A", one)], TrainSettings())
    stepped(one, first, 0)
    other = torch.nn.Parameter(one.detach().clone())
    second = make_optimizer([("a.A", other)], TrainSettings())
    held = {key: value.clone() for key, value in moments(first, {"x": one}).items()}
    assert held.keys() == {"x|step", "x|exp_avg", "x|exp_avg_sq"}
    set_moments(second, {"x": other}, held)
    stepped(one, first, 1)
    stepped(other, second, 1)
    assert torch.equal(one, other)


def test_lora_plus_lets_B_learn_faster():
    A, B = (torch.nn.Parameter(torch.ones(3)) for _ in "AB")
    settings = TrainSettings(learning_rate=0.01, loraplus_lr_ratio=16)
    optimizer = make_optimizer([("x.A", A), ("x.B", B)], settings)
    A.grad, B.grad = torch.ones(3), torch.ones(3)
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group["factor"]
    optimizer.step()
    torch.testing.assert_close(1 - B.detach(), 16 * (1 - A.detach()))


def test_lora_plus_without_a_B_is_refused():
    with pytest.raises(ConfigError, match=r"loraplus_lr_ratio=16\.0 has no effect"):
        make_optimizer(
            [("x.l", torch.nn.Parameter(torch.ones(3)))], TrainSettings(loraplus_lr_ratio=16)
        )
