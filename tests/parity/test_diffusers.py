"""The same adapters in diffusers: `load_lora_weights` and `set_adapters`, outputs within 1e-5."""

import pytest
import torch

import lorica
import tiny_pipelines as pipelines

TEXT = {"sd": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2"), "sd3": ()}
"""Text encoders that diffusers loads adapters for, as tested here."""


def latents(pipe, **how):
    noise = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    with torch.no_grad():
        return pipe(
            prompt=["a cat", "dog"],
            generator=noise,
            num_inference_steps=2,
            guidance_scale=2.0,
            output_type="latent",
            height=pipelines.SIDE,
            width=pipelines.SIDE,
            **how,
        ).images


def filled(model, kind: str, name: str, seed: int, r: int):
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    targets += [f"{part}.*{{q_proj,out_proj}}" for part in TEXT[kind]]
    method = lorica.LoRA(r=r, lora_alpha=r, target_modules=targets)
    adapter = lorica.attach(model, method, name=name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    size = 0.2 if kind == "sd3" else 0.1  # it has fewer layers
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return adapter


def in_their_keys(adapter) -> dict[str, torch.Tensor]:
    """Places of a pipeline have the paths that diffusers' files give them."""
    return {
        f"{path}.lora_{key}.weight": tensor.detach().clone()
        for path, slot in adapter.slots.items()
        for key, tensor in slot.tensors.items()
    }


@pytest.mark.parametrize("kind", list(pipelines.MADE))
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_two_adapters_at_weights(kind, tmp_path):
    folder = pipelines.write(kind, tmp_path / kind)
    model = lorica.load_model(folder, task="text-to-image", dtype="float32")
    theirs = lorica.load_model(folder, task="text-to-image", dtype="float32").pipe
    lorica.activate(model, None)
    bare, largest = latents(model.pipe), 0.0
    for seed, (name, r) in enumerate((("a", 4), ("b", 2)), start=1):
        adapter = filled(model, kind, name, seed, r)
        theirs.load_lora_weights(in_their_keys(adapter), adapter_name=name)
    for weights in ((0.0, 1.0), (1.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.5, 1.0), (0.0, 0.0)):
        theirs.set_adapters(["a", "b"], adapter_weights=list(weights))
        with lorica.activate(model, {"a": weights[0], "b": weights[1]}):
            ours = latents(model.pipe)
        largest = max(largest, (ours - latents(theirs)).abs().max().item())
        if any(weights):
            assert (ours - bare).abs().max() > 1e-2  # the adapters do something
    print(f"{kind}: largest difference {largest:.2e}")
    assert largest <= 1e-5


def both(kind: str, tmp_path):
    """Our model and their pipeline with the same adapter."""
    folder = pipelines.write(kind, tmp_path / kind)
    model = lorica.load_model(folder, task="text-to-image", dtype="float32")
    theirs = lorica.load_model(folder, task="text-to-image", dtype="float32").pipe
    adapter = filled(model, kind, "a", 1, 4)
    theirs.load_lora_weights(in_their_keys(adapter), adapter_name="a")
    return model, theirs


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_weights_by_block(kind, tmp_path):
    model, theirs = both(kind, tmp_path)
    blocks = {"down": 0.3, "mid": -0.5, "up": 0.9}
    parts = {"unet": blocks, **dict.fromkeys(TEXT[kind], 0.7)}
    theirs.set_adapters(["a"], adapter_weights=[parts])
    by_place = {f"unet.{name}_block*": weight for name, weight in blocks.items()}
    with lorica.activate(model, {"a": {**by_place, "text_encoder*": 0.7}}):
        ours = latents(model.pipe)
    assert (ours - latents(theirs)).abs().max() <= 1e-5
    theirs.set_adapters(["a"], adapter_weights=[0.7])
    assert (ours - latents(theirs)).abs().max() > 1e-3  # the blocks make a difference


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_schedule_over_the_steps_of_the_denoiser(tmp_path):
    model, theirs = both("sd3", tmp_path)

    def lower(pipe, step, timestep, tensors):
        pipe.set_adapters(["a"], adapter_weights=[0.25])
        return tensors

    theirs.set_adapters(["a"], adapter_weights=[1.0])
    expected = latents(theirs, callback_on_step_end=lower)
    with lorica.activate(model, {"a": [1.0, 0.25]}):
        for _ in range(2):  # each picture begins anew
            assert (latents(model.pipe) - expected).abs().max() <= 1e-5
    with lorica.activate(model, {"a": 1.0}):
        assert (latents(model.pipe) - expected).abs().max() > 1e-4  # one step of two differs
