"""What the tests of this folder hold and `benchmarks/peft_parity.py` measures: one code for both.

An error is the largest difference of two tensors, divided by the largest entry of theirs where that
is above 1.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.attach.handle import Adapter
from lorica.files.adapter import load_adapter, save_adapter

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Parity:
    """How far Lorica is from PEFT with one adapter.

    Attributes:
        outputs: error of the logits, PEFT's adapter read by Lorica.
        gradients: largest error of the gradients of all tensors, of the sum of squared logits.
        returned: error of the logits of PEFT that reads the adapter which Lorica wrote again.
        adapter: as Lorica has it.
    """

    outputs: float
    gradients: float
    returned: float
    adapter: Adapter


def error(one: Tensor, other: Tensor) -> float:
    """See the head of this file.

    Raises:
        AssertionError: the shapes differ.
    """
    assert one.shape == other.shape, (one.shape, other.shape)
    return (one - other).abs().max().item() / max(1.0, other.abs().max().item())


def stir(parameters: Iterable[Tensor]) -> None:
    """Move every tensor away from its start, where many of them do nothing."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def logits(name: str, model: nn.Module, core: nn.Module) -> Tensor:
    arch = ARCHITECTURES[name]
    return arch.logits(model(**arch.sample(core, 2, 7)))


def theirs_first(name: str, config: peft.PeftConfig, folder: Path) -> Parity:
    """An adapter of PEFT, read, compared, written again and read by PEFT."""
    base = ARCHITECTURES[name].build()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        theirs = peft.get_peft_model(base, config).eval()
    stir(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(str(folder / "theirs"))
    expected = logits(name, theirs, base)
    model = ARCHITECTURES[name].build()
    adapter = load_adapter(model, folder / "theirs", name="a")
    with activate(model, "a"):
        actual = logits(name, model, model)
    outputs = error(actual.detach(), expected.detach())
    actual.square().sum().backward()
    expected.square().sum().backward()
    save_adapter(adapter, folder / "ours")
    gradients = _gradient_error(name, adapter, theirs, folder / "gradients")
    returned = error(_read_by_peft(name, folder / "ours"), expected.detach())
    return Parity(outputs, gradients, returned, adapter)


def ours_first(name: str, method: Any, folder: Path) -> float:
    """Error of the logits of PEFT that reads an adapter made by Lorica."""
    model = ARCHITECTURES[name].build()
    adapter = attach(model, method, name="a")
    stir(adapter.parameters())
    with torch.no_grad(), activate(model, "a"):
        expected = logits(name, model, model)
    with torch.no_grad(), activate(model, None):
        assert (expected - logits(name, model, model)).abs().max() > 1e-3
    save_adapter(adapter, folder / "first")
    return error(_read_by_peft(name, folder / "first"), expected)


def _read_by_peft(name: str, folder: Path) -> Tensor:
    base = ARCHITECTURES[name].build()
    theirs = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        return logits(name, theirs, base)


def _gradient_error(name: str, adapter: Adapter, theirs: Any, folder: Path) -> float:
    """Tensor by tensor. The files' layout takes gradients as it takes values, for both only name
    and reshape: PEFT's gradients are put where its values are, and read by us.
    """
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                parameter.copy_(parameter.grad)
    theirs.save_pretrained(str(folder))
    found = load_adapter(ARCHITECTURES[name].build(), folder, name="gradients")
    wanted = dict(found.named_parameters())
    own = dict(adapter.named_parameters())
    assert own.keys() == wanted.keys()
    worst = 0.0
    for key, parameter in own.items():
        assert parameter.grad is not None, key
        worst = max(worst, error(parameter.grad, wanted[key].detach()))
    return worst
