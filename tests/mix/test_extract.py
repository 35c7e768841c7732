"""What a full fine-tune changed comes back as LoRA: exactly where it was of low rank, else as near
as the rank can be, with the error told.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.base.empty import empty_model
from lorica.errors import ConfigError, MergeError
from lorica.files.adapter import load_adapter, save_adapter
from lorica.methods import LoRA
from lorica.mix import extract, merge


def answer(name: str, model) -> torch.Tensor:
    with torch.no_grad():
        return ARCHITECTURES[name].logits(model(**ARCHITECTURES[name].sample(model, 2, 7)))


def tuned(name: str, folder: Path, rank: int | None = 3, shards: str = "1GB"):
    """A base and a tuned model on the disk; the change is of a rank, or whole."""
    model = ARCHITECTURES[name].build()
    model.save_pretrained(folder / "base", max_shard_size=shards)
    if rank is None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    else:
        attach(model, LoRA(r=rank, init_lora_weights="random", target_modules="all-linear"))
        merge(model, "default")
    model.save_pretrained(folder / "tuned", max_shard_size=shards)
    return model


def files(folder: Path, name: str) -> list[Path]:
    return sorted((folder / name).glob("*.safetensors"))


def extracted(folder: Path, **how):
    model = empty_model(folder / "base")
    return extract(model, files(folder, "tuned"), files(folder, "base"), **how)


@pytest.mark.parametrize("svd", ["exact", "randomised"])
@pytest.mark.parametrize("name, shards", [("llama", "20KB"), ("gpt2", "1GB")])
def test_a_change_of_low_rank_comes_back_whole(name, shards, svd, tmp_path):
    wanted = answer(name, tuned(name, tmp_path, 3, shards))
    report = extracted(tmp_path, r=3, svd=svd)
    assert report.error < 1e-3 and not report.left_out
    save_adapter(report.adapter, tmp_path / "adapter")
    base = ARCHITECTURES[name].build()
    load_adapter(base, tmp_path / "adapter", name="a")
    with activate(base, "a"):
        torch.testing.assert_close(answer(name, base), wanted, atol=2e-5, rtol=1e-5)


def test_the_energy_finds_the_rank(tmp_path):
    tuned("llama", tmp_path, 3)
    assert {place.rank for place in extracted(tmp_path, energy=0.9999).places} == {3}
    half = extracted(tmp_path, energy=0.5)
    assert all(place.rank < 3 and place.error <= 0.5**0.5 for place in half.places)
    capped = extracted(tmp_path, energy=0.9999, r=2)
    assert {place.rank for place in capped.places} == {2} and capped.error > 0.01


def test_the_error_is_true_and_what_is_left_out_is_told(tmp_path):
    tuned("llama", tmp_path, None)
    report = extracted(tmp_path, r=4, target_modules=("q_proj", "up_proj"))
    new, old = (load_file(files(tmp_path, name)[0]) for name in ("tuned", "base"))
    lost = whole = 0.0
    for place in report.places:
        change = (new[f"{place.path}.weight"] - old[f"{place.path}.weight"]).double()
        values = torch.linalg.svdvals(change)
        wanted = float(values[4:].norm() / values.norm())
        assert place.error == pytest.approx(wanted, rel=1e-3)
        assert place.size == pytest.approx(float(values.norm()), rel=1e-4)
        torch.testing.assert_close(
            torch.tensor(place.spectrum).double(), values, rtol=1e-3, atol=1e-5
        )
        lost, whole = lost + float(values[4:].square().sum()), whole + float(values.square().sum())
    assert report.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    outside = {n for n in old if n.removesuffix(".weight") not in {p.path for p in report.places}}
    assert set(report.left_out) == outside and report.error_of_all > report.error
    quick = extracted(tmp_path, r=4, target_modules=("q_proj", "up_proj"), svd="randomised")
    assert report.error <= quick.error + 1e-6 < report.error * 1.05


def test_what_is_refused(tmp_path):
    tuned("llama", tmp_path, 3)
    for how in ({"r": 0}, {"energy": 1.5}, {"svd": "fast"}):
        with pytest.raises(ConfigError, match="nothing can be extracted so"):
            extracted(tmp_path, **how)
    model = empty_model(tmp_path / "base")
    with pytest.raises(MergeError, match="no layer that was chosen has changed"):
        extract(model, files(tmp_path, "base"), files(tmp_path, "base"))
    ARCHITECTURES["gpt2"].build().save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="their tensors differ"):
        extract(model, files(tmp_path, "tuned"), files(tmp_path, "other"))
