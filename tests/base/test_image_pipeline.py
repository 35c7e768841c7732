"""Pipelines of diffusers as bases: what is read, and what is refused."""

import json
import shutil

import pytest
import torch

import lorica
import tiny_pipelines as pipelines
from lorica.base.empty import empty_model
from lorica.base.image_pipeline import guided_paths, is_pipeline
from lorica.base.known import base_of
from lorica.errors import BaseModelError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pipelines.write("sd", tmp_path_factory.mktemp("base") / "sd")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def load(path, **more):
    return lorica.load_model(path, task="text-to-image", dtype="float32", **more)


def test_a_pipeline_is_one_module_with_diffusers_names(folder):
    model = load(folder)
    assert {name for name, _ in model.named_children()} == {"unet", "vae", "text_encoder"}
    assert model.get_submodule("unet") is model.pipe.unet is model.denoiser
    assert model.resolution == pipelines.SIDE and model.latent_scale == 2
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    known = base_of(model)
    assert known.task == "text-to-image" and known.name == str(folder)
    assert known.digest == base_of(load(folder)).digest and len(known.digest) == 64


def test_the_digest_is_that_of_all_parts(folder, copy):
    from safetensors.torch import load_file, save_file

    (file,) = (copy / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    tensors[next(iter(tensors))] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert base_of(load(copy)).digest != base_of(load(folder)).digest


def test_its_configs_alone_give_its_sizes(folder):
    empty, model = empty_model(folder, task="text-to-image"), load(folder)
    shapes = {name: p.shape for name, p in empty.named_parameters()}
    assert shapes == {name: p.shape for name, p in model.named_parameters()}
    assert all(p.is_meta for p in empty.parameters())


def test_latents_are_those_of_the_pipeline(folder, tmp_path):
    sd3 = load(pipelines.write("sd3", tmp_path / "sd3"))
    for model in (load(folder), sd3):
        pixels = torch.rand(2, 3, 16, 16) * 2 - 1
        config = model.vae.config
        found = model.vae.encode(pixels).latent_dist
        shift = config.shift_factor or 0.0
        mean, std = model.latents(pixels)
        torch.testing.assert_close(mean, (found.mean - shift) * config.scaling_factor)
        torch.testing.assert_close(std, found.std * config.scaling_factor)
    assert sd3.vae.config.shift_factor == 0.1


def test_pickled_weights_are_never_loaded(copy):
    (file,) = (copy / "unet").glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(BaseModelError, match=r"pickled weights .* are never loaded"):
        load(copy)


def test_code_that_comes_with_it_is_not_run(copy):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "unet" / "own.py").write_text("raise SystemExit('it ran')\n")
    (copy / "model_index.json").write_text(json.dumps({**index, "unet": ["own", "Own"]}))
    with pytest.raises(BaseModelError, match=r"own\.Own: Python code that comes with a pipeline"):
        load(copy)


def test_all_problems_come_at_once(copy):
    shutil.rmtree(copy / "vae")
    (file,) = (copy / "text_encoder").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(BaseModelError) as caught:
        load(copy)
    assert "there is no folder" in str(caught.value) and "cut off" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "fault"),
    [("{", "is no JSON"), ("{}", "names no pipeline"), ('{"_class_name": "X"}', "no transformer")],
)
def test_a_broken_index_is_told(copy, text, fault):
    (copy / "model_index.json").write_text(text)
    with pytest.raises(BaseModelError, match=fault):
        load(copy)


def test_other_folders_are_told_apart(folder, tmp_path):
    assert is_pipeline(folder) and not is_pipeline(tmp_path)
    with pytest.raises(BaseModelError, match=r"has no model_index\.json"):
        load(tmp_path)
    with pytest.raises(BaseModelError, match="its task is text-to-image"):
        lorica.load_model(folder)
    with pytest.raises(BaseModelError, match="as-stored cannot be had"):
        lorica.load_model(folder, task="text-to-image", dtype="as-stored")


def test_the_denoiser_is_where_rows_come_twice(folder):
    model = load(folder)
    assert guided_paths(model) == ("unet",)
    assert guided_paths(model.unet) == ("",)
    assert guided_paths(model.text_encoder) == guided_paths(torch.nn.Linear(2, 2)) == ()
