"""Mixtures beside PEFT's `add_weighted_adapter`: the same where both mean the same, and how far
PEFT's own ways are from the weighted sum.
"""

import copy

import peft
import pytest
import torch
from peft.utils import merge_utils

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach, detach
from lorica.files.adapter import load_adapter, save_adapter
from lorica.methods.lora import LoRA
from lorica.mix import mix
from lorica.mix import ways as mixing_ways

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file.*adapter_config:ResourceWarning"),
]

TARGETS = ["q_proj", "v_proj", "down_proj"]
WEIGHTS = {"a": 0.7, "b": -0.4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters of one rank and other scales, on the disk."""
    folder = tmp_path_factory.mktemp("adapters")
    model = ARCHITECTURES["llama"].build()
    for name, alpha in (("a", 5), ("b", 2)):
        adapter = attach(model, LoRA(r=3, lora_alpha=alpha, target_modules=TARGETS), name=name)
        generator = torch.Generator().manual_seed(ord(name))
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        save_adapter(adapter, folder / name)
    return folder


@pytest.fixture
def ours(folders):
    model = ARCHITECTURES["llama"].build()
    for name in WEIGHTS:
        load_adapter(model, folders / name, name=name)
    return model


@pytest.fixture
def theirs(folders):
    model = peft.PeftModel.from_pretrained(
        ARCHITECTURES["llama"].build(), folders / "a", adapter_name="a"
    )
    model.load_adapter(folders / "b", adapter_name="b")
    return model


def logits(model) -> torch.Tensor:
    arch = ARCHITECTURES["llama"]
    with torch.no_grad():
        return arch.logits(model(**arch.sample(model, 2, 7)))


def mixed_there(theirs, method: str, **how) -> torch.Tensor:
    theirs.add_weighted_adapter([*WEIGHTS], [*WEIGHTS.values()], "m", method, **how)
    theirs.set_adapter("m")
    return logits(theirs)


def mixed_here(ours, method: str, **how) -> torch.Tensor:
    mix(ours, WEIGHTS, name="m", method=method, **how)
    with activate(ours, "m"):
        return logits(ours)


def same_draws(monkeypatch) -> None:
    """Both drop the same elements, which depend on the shape alone: the rest is arithmetic."""

    def kept(shape: torch.Size, density: float) -> torch.Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(5)) < density

    def there(tensor, density, rescale):
        assert rescale
        return tensor * kept(tensor.shape, density).to(tensor) / density

    def here(matrix, choices):
        return matrix * kept(matrix.shape, choices.density).to(matrix) / choices.density

    monkeypatch.setattr(merge_utils, "random_pruning", there)
    monkeypatch.setattr(mixing_ways, "_drawn", here)


CASES = {
    "cat": ("cat", {}, {}),
    "svd": ("svd", {"svd_rank": 2}, {"r": 2}),
    "linear": ("linear", {}, {}),
    "ties_svd": ("ties_svd", {"svd_rank": 4, "density": 0.6}, {"r": 4, "density": 0.6}),
    "ties_svd, frequency": (
        "ties_svd",
        {"svd_rank": 4, "density": 0.6, "majority_sign_method": "frequency"},
        {"r": 4, "density": 0.6, "majority_sign_method": "frequency"},
    ),
    "dare_ties_svd": ("dare_ties_svd", {"svd_rank": 4, "density": 0.6}, {"r": 4, "density": 0.6}),
    "dare_linear_svd": (
        "dare_linear_svd",
        {"svd_rank": 4, "density": 0.6},
        {"r": 4, "density": 0.6},
    ),
    "magnitude_prune_svd": (
        "magnitude_prune_svd",
        {"svd_rank": 4, "density": 0.6},
        {"r": 4, "density": 0.6},
    ),
}


@pytest.mark.filterwarnings("ignore:linear sums the factors")
@pytest.mark.parametrize("case", CASES)
def test_the_same_as_add_weighted_adapter(ours, theirs, case, monkeypatch):
    method, how_there, how_here = CASES[case]
    if method.startswith("dare"):
        same_draws(monkeypatch)
    there = mixed_there(theirs, method, **how_there)
    here = mixed_here(ours, method, **how_here)
    size = max(1.0, there.abs().max().item())
    assert (here - there).abs().max() < 1e-5 * size
    with activate(ours, None):
        assert (logits(ours) - there).abs().max() > 1e-3


def test_cat_has_the_very_factors_of_peft(ours, theirs):
    mixed_there(theirs, "cat")
    found = mix(ours, WEIGHTS, name="m").adapter
    for path, slot in found.slots.items():
        layer = theirs.get_submodule(f"base_model.model.{path}")
        torch.testing.assert_close(
            slot.tensors["A"].data, layer.lora_A["m"].weight.data, atol=1e-7, rtol=1e-6
        )
        assert torch.equal(slot.tensors["B"].data, layer.lora_B["m"].weight.data)


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_peft_loads_what_was_mixed_here(ours, method, tmp_path):
    report = mix(ours, WEIGHTS, name="m", method=method, **({"r": 2} if method == "svd" else {}))
    save_adapter(report.adapter, tmp_path / "m")
    loaded = peft.PeftModel.from_pretrained(ARCHITECTURES["llama"].build(), tmp_path / "m")
    with activate(ours, "m"):
        wanted = logits(ours)
    assert (logits(loaded) - wanted).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:Adapter m was active:UserWarning:peft")
def test_what_peft_calls_linear_is_far_from_the_sum(ours, theirs):
    """And so are its ways that prune factors; ours of these names work on the updates."""
    with activate(ours, WEIGHTS):
        wanted = logits(ours)
    with activate(ours, None):
        bare = logits(ours)

    def off(given: torch.Tensor) -> float:
        return float((given - wanted).norm() / (wanted - bare).norm())

    assert off(mixed_there(theirs, "linear")) > 0.3
    assert off(mixed_here(ours, "cat")) < 1e-5
    detach(ours, "m")
    theirs.delete_adapter("m")
    factors = mixed_there(copy.deepcopy(theirs), "ties", density=0.9)
    assert off(mixed_here(ours, "ties", density=0.9)) < off(factors)
