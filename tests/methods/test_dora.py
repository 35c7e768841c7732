"""DoRA's norm is kept between passes, and never beyond a change of what it is the norm of."""

import pytest
import torch
from torch import nn

import lorica
from lorica.methods import DoRA


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("detached", [False, True])
def test_a_loop_of_ones_own_answers_with_what_was_trained(fused, detached):
    """A fused optimizer writes without counting it in the version of a tensor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    method = DoRA(r=2, target_modules=("0",), dora_detach_norm=detached)
    adapter = lorica.attach(model, method, name="a")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.3, fused=fused)
    x = torch.randn(4, 6)
    with lorica.activate(model, "a"):
        with torch.no_grad():
            model(x)  # the norm of the start is kept from here
        for _ in range(2):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            answered = [model(x), model(x)]
    A, B, m = (adapter.slots["0"].tensors[name].detach() for name in ("A", "B", "m"))
    W = model[0].weight + 8 * B @ A  # alpha 16 over r 2
    wanted = x @ (m / W.norm(dim=1) * W.T).detach() + model[0].bias.detach()
    for found in answered:
        torch.testing.assert_close(found, wanted)
