"""Switching image adapters and changing their weights, beside diffusers; a part of mix.py."""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Least = Callable[[Callable[[int], Any]], float]


def pipelines(counts: list[int], least: Least) -> dict[str, Any]:
    """As `switch` of mix.py, for LoRA of rank 4 on the attention of tiny pipelines, beside
    `load_lora_weights` and `set_adapters` of diffusers; a forward pass is one of the denoiser.

    Args:
        least: runs a call of its number several times; milliseconds of the quickest.
    """
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import tiny_pipelines

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for kind in ("sd", "sdxl"):
            folder = tiny_pipelines.write(kind, Path(name) / kind)
            found[kind] = {"lorica": {}, "diffusers": {}}
            for side in (_our_pipeline, _their_pipeline):
                side(folder, counts, found[kind], least)
    return found


def _image_adapter(folder: Path) -> Any:
    """An adapter of a pipeline that does something."""
    from lorica import LoRA, attach, load_model

    model = load_model(folder, task="text-to-image", dtype="float32")
    method = LoRA(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    adapter = attach(model, method, name="one", seed=0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return adapter


def _our_pipeline(folder: Path, counts: list[int], found: dict[str, Any], least: Least) -> None:
    from lorica import activate, load_adapter, load_model, save_adapter

    save_adapter(_image_adapter(folder), folder.parent / "one", overwrite=True)
    model, loaded = load_model(folder, task="text-to-image", dtype="float32"), 0
    begun = time.process_time()
    for count in counts:
        for number in range(loaded, count):
            load_adapter(model, folder.parent / "one", name=f"n{number}")
        loaded, total = count, time.process_time() - begun

        def mixture(number: int, count: int = count) -> dict[str, float]:
            return {f"n{count - 1}": 0.1 * number, "n0": 0.5}

        row = {
            "load_all_s": total,
            "switch_ms": least(lambda n, c=count: activate(model, f"n{(n * 7) % c}")),
            "change_weights_ms": least(lambda n: activate(model, mixture(n))),
            "forward_ms": _denoised(model.pipe, least),
        }
        found["lorica"][count] = row
        print("lorica", count, row, flush=True)


def _their_pipeline(folder: Path, counts: list[int], found: dict[str, Any], least: Least) -> None:
    from safetensors.torch import save_file

    from lorica import load_model

    tensors = {
        f"{path}.lora_{key}.weight": tensor.detach().clone()
        for path, slot in _image_adapter(folder).slots.items()
        for key, tensor in slot.tensors.items()
    }
    save_file(tensors, folder.parent / "one.safetensors")
    pipe = load_model(folder, task="text-to-image", dtype="float32").pipe
    loaded, begun = 0, time.process_time()
    for count in counts:
        for number in range(loaded, count):
            pipe.load_lora_weights(
                folder.parent, weight_name="one.safetensors", adapter_name=f"n{number}"
            )
        loaded, total = count, time.process_time() - begun

        def mixture(number: int, count: int = count) -> None:
            names = [*dict.fromkeys([f"n{count - 1}", "n0"])]
            pipe.set_adapters(names, adapter_weights=[0.1 * number, 0.5][: len(names)])

        row = {
            "load_all_s": total,
            "switch_ms": least(lambda n, c=count: pipe.set_adapters(f"n{(n * 7) % c}")),
            "change_weights_ms": least(mixture),
            "forward_ms": _denoised(pipe, least),
        }
        found["diffusers"][count] = row
        print("diffusers", count, row, flush=True)


def _denoised(pipe: Any, least: Least) -> float:
    """Milliseconds of a forward pass of the denoiser, for two pictures."""
    unet = pipe.unet
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    noise, words = torch.randn(2, 4, side, side), torch.randn(2, 12, width)
    more = {"text_embeds": torch.randn(2, 16), "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        return least(lambda n: unet(noise, 5, words, added_cond_kwargs=more))
