"""Adapters on the parts of text-to-image pipelines: found, called, mixed, taken off again."""

import pytest
import torch

import lorica
import tiny_pipelines as pipelines
from lorica.attach.probe import unvisited
from lorica.base.digest import digest_of_tensors
from lorica.errors import ActivationError
from lorica.tasks.drawing import draw

KINDS = list(pipelines.MADE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: pipelines.write(kind, root / kind) for kind in KINDS}


@pytest.fixture
def load(folders):
    return lambda kind: lorica.load_model(folders[kind], task="text-to-image", dtype="float32")


def filled(model, name: str, seed: int, **settings):
    """An adapter whose B is not zero any more."""
    adapter = lorica.attach(model, lorica.LoRA(r=4, **settings), name=name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapter


def latents(model, prompts, seeds, **how):
    """What the denoiser ends with, before it is made a picture: nothing is rounded yet."""
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    with torch.no_grad():
        made = model.pipe(
            prompt=prompts,
            generator=noise,
            num_inference_steps=2,
            output_type="latent",
            height=pipelines.SIDE,
            width=pipelines.SIDE,
            **how,
        )
    return made.images


@pytest.mark.parametrize("kind", KINDS)
def test_every_adapted_layer_of_the_denoiser_is_called(load, kind):
    model = load(kind)
    adapter = filled(model, "a", 1)
    assert adapter.slots and all(
        path.startswith(f"{model.denoiser_name}.") for path in adapter.slots
    )
    assert any(path.endswith("attn.to_q") or path.endswith("attn1.to_q") for path in adapter.slots)
    before = latents(model, ["a cat"], [0]) if lorica.activate(model, None) else None
    with lorica.activate(model, "a"):
        after = latents(model, ["a cat"], [0])
        assert unvisited(model) == []
    assert before is not None and (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_detaching_leaves_the_very_bits(load, kind):
    model = load(kind)
    digest, classes = digest_of_tensors(model), {n: type(m) for n, m in model.named_modules()}
    bare = latents(model, ["a cat"], [0])
    filled(model, "a", 1)
    filled(model, "text", 2, target_modules=["text_encoder.*q_proj"])
    with lorica.activate(model, {"a": 0.5, "text": 1.0}):
        assert not torch.equal(latents(model, ["a cat"], [0]), bare)
    lorica.detach(model, "a")
    lorica.detach(model, "text")
    assert digest_of_tensors(model) == digest
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert torch.equal(latents(model, ["a cat"], [0]), bare)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_part_takes_adapters_by_itself(load, part):
    model = load("sd")
    alone = getattr(model.pipe, part)
    adapter = filled(alone, "a", 1)
    assert not any(path.startswith(part) for path in adapter.slots)
    lorica.activate(alone, None)
    bare = latents(model, ["a cat"], [0])
    lorica.activate(alone, {"a": 0.7})
    assert (latents(model, ["a cat"], [0]) - bare).abs().max() > 1e-4
    lorica.detach(alone, "a")
    assert torch.equal(latents(model, ["a cat"], [0]), bare)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_is_the_weighted_sum_of_the_updates(load, kind):
    model, plain = load(kind), load(kind)
    weights = {"a": 0.7, "b": -0.4}
    for seed, name in enumerate(weights, start=1):
        filled(model, name, seed)
    modules = dict(plain.named_modules())
    with torch.no_grad():
        for name, weight in weights.items():
            for path, slot in lorica.adapters(model)[name].slots.items():
                update = slot.tensors["B"] @ slot.tensors["A"] * slot.method.lora_alpha / 4
                modules[path].weight += weight * update
    with lorica.activate(model, weights):
        mixed = latents(model, ["a cat", "b"], [0, 1])
    torch.testing.assert_close(mixed, latents(plain, ["a cat", "b"], [0, 1]), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_per_row_is_one_per_picture(load, kind, guidance):
    """With guidance the denoiser sees every picture twice, all without their prompts first."""
    model = load(kind)
    filled(model, "a", 1)
    filled(model, "b", 2, target_modules=["to_q", "conv1"] if kind != "sd3" else ["to_q"])
    filled(model, "text", 3, target_modules=["text_encoder.*q_proj"])
    entries = [{"a": 1.0}, None, {"a": 0.3, "b": 0.9, "text": 1.0}]
    prompts, seeds = ["a cat", "b", "dog"], [0, 1, 2]
    with lorica.activate(model, entries):
        together = latents(model, prompts, seeds, guidance_scale=guidance)
    for row, entry in enumerate(entries):
        with lorica.activate(model, entry):
            alone = latents(model, [prompts[row]], [seeds[row]], guidance_scale=guidance)
        # guidance multiplies what rounding leaves
        torch.testing.assert_close(together[row], alone[0], atol=2e-5 * guidance, rtol=1e-4)


def test_a_wrong_number_of_entries_is_refused(load):
    model = load("sd")
    filled(model, "a", 1)
    with lorica.activate(model, ["a", None]), pytest.raises(ActivationError, match="per picture"):
        latents(model, ["a", "b", "c"], [0, 1, 2])


def test_pictures_do_not_depend_on_their_neighbours(load):
    model = load("sd")
    how = {"num_inference_steps": 2, "guidance_scale": 3.0}
    first, second = draw(model, ["a cat", "b"], seeds=[5, 6], **how)
    (alone,) = draw(model, ["b"], seeds=[6], **how)
    import numpy as np

    near = np.abs(np.asarray(second, dtype=int) - np.asarray(alone, dtype=int)).max()
    assert near <= 1 and first.size == (pipelines.SIDE, pipelines.SIDE)
