"""Adapters of text-to-image pipelines, exchanged with diffusers in both directions."""

import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.base.image_pipeline import ImagePipeline
from lorica.errors import AdapterFileError
from lorica.files.adapter import load_adapter, save_adapter
from lorica.files.formats import FORMATS
from lorica.methods.dora import DoRA
from lorica.methods.loha import LoHa
from lorica.methods.lokr import LoKr
from lorica.methods.lora import LoRA
from pipelines import PIPELINES, answers

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("q_proj", "v_proj", "out_proj", "fc1")
CONVOLUTIONS = (
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "conv_in",
    "conv_out",
    "linear_1",
    "proj_in",
    "ff.net.2",
)


def targets(name: str) -> tuple[str, ...]:
    return ATTENTION + TEXT + (CONVOLUTIONS if name != "sd3" else ("proj_out", "ff.net.2"))


def stirred(pipeline, method):
    adapter = attach(ImagePipeline(pipeline), method)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return adapter


def lora(name: str, kind: type[LoRA] = LoRA) -> LoRA:
    """With several ranks and scales. diffusers loses DoRA's lengths of text encoders on reading."""
    return kind(
        r=2,
        lora_alpha=3,
        target_modules=targets(name) if kind is LoRA else targets(name)[:4] + targets(name)[8:],
        rank_pattern={"to_k": 4},
        alpha_pattern={"to_v": 1},
    )


def acting(pipeline, adapter):
    with activate(adapter.model, adapter):
        return answers(pipeline)


def distance(one, two) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True))


def in_diffusers(name: str, file):
    """What diffusers makes of a file."""
    pipeline = PIPELINES[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    return answers(pipeline)


@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize("name", PIPELINES)
def test_diffusers_answers_as_we_do(name, kind, tmp_path):
    pipeline = PIPELINES[name]()
    bare = answers(pipeline)
    adapter = stirred(pipeline, lora(name, kind))
    expected = acting(pipeline, adapter)
    assert distance(expected, bare) > 0.01
    file = tmp_path / "x.safetensors"
    assert FORMATS["diffusers"].write(adapter, file, "float32", False) == []
    assert distance(in_diffusers(name, file), expected) < 1e-5
    again = PIPELINES[name]()
    loaded = load_adapter(ImagePipeline(again), file)
    assert type(loaded.method) is kind
    assert distance(acting(again, loaded), expected) < 1e-6
    FORMATS["diffusers"].write(loaded, tmp_path / "y.safetensors", "float32", False)
    assert (tmp_path / "y.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_diffusers_reads_our_kohya_file(name, kind, tmp_path):
    pipeline = PIPELINES[name]()
    adapter = stirred(pipeline, lora(name, kind))
    expected = acting(pipeline, adapter)
    file = tmp_path / "x.safetensors"
    FORMATS["kohya"].write(adapter, file, "float32", False)
    keys = set(load_file(file))
    first = "lora_unet_input_blocks_0_0" if name == "sdxl" else "lora_unet_conv_in"
    assert f"{first}.lora_down.weight" in keys and f"{first}.alpha" in keys
    te = "lora_te1" if name == "sdxl" else "lora_te"
    text = f"{te}_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"
    assert (text in keys) is (kind is LoRA)
    again = PIPELINES[name]()
    loaded = load_adapter(ImagePipeline(again), file)
    assert distance(acting(again, loaded), expected) < 1e-6
    if kind is LoRA:  # diffusers leaves dora_scale out, saying so
        assert distance(in_diffusers(name, file), expected) < 1e-5


@pytest.mark.parametrize("name", PIPELINES)
def test_we_answer_as_diffusers_did(name, tmp_path):
    """Files that diffusers wrote with its own metadata, and their tensors written again."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = PIPELINES[name]()
    denoiser = "transformer" if name == "sd3" else "unet"
    parts = {denoiser: getattr(pipeline, denoiser), "text_encoder": pipeline.text_encoder}
    for part, model in parts.items():
        names = list(TEXT if part == "text_encoder" else ATTENTION)
        model.add_adapter(
            LoraConfig(
                r=2,
                lora_alpha=5,
                target_modules=names,
                init_lora_weights=False,
                rank_pattern={names[0]: 3},
                alpha_pattern={names[1]: 1},
            ),
            "default",
        )
    expected = answers(pipeline)
    layers = {
        f"{part}_lora_layers": get_peft_model_state_dict(model) for part, model in parts.items()
    }
    pipeline.save_lora_weights(str(tmp_path), **layers, **_collate_lora_metadata(parts))
    again = PIPELINES[name]()
    loaded = load_adapter(ImagePipeline(again), tmp_path)
    assert distance(acting(again, loaded), expected) < 1e-5
    FORMATS["diffusers"].write(loaded, tmp_path / "ours", "float32", False)
    theirs = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    ours = load_file(tmp_path / "ours" / "pytorch_lora_weights.safetensors")
    ours = {k.replace("text_encoder.text_model.", "text_encoder."): v for k, v in ours.items()}
    theirs = {k.replace("text_encoder.text_model.", "text_encoder."): v for k, v in theirs.items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_kohya_made_by_diffusers(tmp_path):
    """Its own converter to kohya's keys, as its training scripts call it."""
    from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya

    pipeline = PIPELINES["sd"]()
    adapter = stirred(pipeline, LoRA(r=2, lora_alpha=2, target_modules=ATTENTION + TEXT))
    expected = acting(pipeline, adapter)
    FORMATS["diffusers"].write(adapter, tmp_path / "x.safetensors", "float32", False)
    held = load_file(tmp_path / "x.safetensors")
    held = convert_state_dict_to_kohya(convert_all_state_dict_to_peft(held))
    save_file(
        {key: tensor.contiguous() for key, tensor in held.items()}, tmp_path / "k.safetensors"
    )
    again = PIPELINES["sd"]()
    loaded = load_adapter(ImagePipeline(again), tmp_path / "k.safetensors")
    assert len(loaded.slots) == len(adapter.slots)
    assert distance(acting(again, loaded), expected) < 1e-6


def test_the_older_keys_of_diffusers_are_read(tmp_path):
    from diffusers.utils import convert_state_dict_to_diffusers

    pipeline = PIPELINES["sd"]()
    adapter = stirred(pipeline, LoRA(r=2, lora_alpha=2, target_modules=ATTENTION))
    FORMATS["diffusers"].write(adapter, tmp_path / "x.safetensors", "float32", False)
    old = convert_state_dict_to_diffusers(load_file(tmp_path / "x.safetensors"))
    assert any(".lora.down.weight" in key for key in old)
    save_file({key: t.contiguous() for key, t in old.items()}, tmp_path / "y.safetensors")
    again = PIPELINES["sd"]()
    loaded = load_adapter(ImagePipeline(again), tmp_path / "y.safetensors")
    assert distance(acting(again, loaded), acting(pipeline, adapter)) < 1e-6


@pytest.mark.parametrize(
    "method",
    [
        LoHa(r=2, lora_alpha=3, target_modules=targets("sd")),
        LoKr(r=2, lora_alpha=3, target_modules=targets("sd")),
        LoKr(
            r=1, lora_alpha=3, target_modules=targets("sd"), decompose_both=True, decompose_factor=4
        ),
    ],
)
def test_lycoris_comes_back(method, tmp_path):
    pipeline = PIPELINES["sd"]()
    adapter = stirred(pipeline, method)
    expected = acting(pipeline, adapter)
    FORMATS["kohya"].write(adapter, tmp_path / "x.safetensors", "float32", False)
    again = PIPELINES["sd"]()
    loaded = load_adapter(ImagePipeline(again), tmp_path / "x.safetensors")
    assert type(loaded.method) is type(method)
    assert distance(acting(again, loaded), expected) < 1e-5
    save_adapter(loaded, tmp_path / "own")
    third = PIPELINES["sd"]()
    assert (
        distance(acting(third, load_adapter(ImagePipeline(third), tmp_path / "own")), expected)
        < 1e-5
    )


def test_what_diffusers_cannot_read_is_told(tmp_path):
    pipeline = PIPELINES["sd"]()
    adapter = stirred(pipeline, LoRA(r=2, target_modules=("to_q", "q_proj")))
    expected = acting(pipeline, adapter)
    file = tmp_path / "x.safetensors"
    notes = FORMATS["kohya"].write(adapter, file, "float32", False)
    assert "needs out_proj among the layers of lora_te" in notes[0]
    with pytest.raises(ValueError, match="Could not automatically infer"):  # else the note can go
        in_diffusers("sd", file)
    again = PIPELINES["sd"]()
    assert distance(acting(again, load_adapter(ImagePipeline(again), file)), expected) < 1e-6


def test_a_single_part_will_do(tmp_path):
    pipeline = PIPELINES["sd"]()
    adapter = attach(pipeline.unet, LoRA(r=2, target_modules=ATTENTION))
    FORMATS["kohya"].write(adapter, tmp_path / "x.safetensors", "float16", False)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == "2"
    loaded = load_adapter(PIPELINES["sd"]().unet, tmp_path / "x.safetensors")
    assert list(loaded.slots) == list(adapter.slots)


def test_what_has_no_name_or_place_is_refused(tmp_path):
    pipeline = PIPELINES["sd3"]()
    adapter = attach(ImagePipeline(pipeline), LoRA(r=2, target_modules=ATTENTION))
    with pytest.raises(AdapterFileError, match="no names for some of the layers") as caught:
        FORMATS["kohya"].write(adapter, tmp_path / "x.safetensors", "float32", False)
    assert caught.value.problems[0].startswith("transformer.")
    pipeline = PIPELINES["sd"]()
    adapter = attach(
        ImagePipeline(pipeline), LoRA(r=2, target_modules="to_q", modules_to_save="conv_in")
    )
    for name in ("kohya", "diffusers"):
        with pytest.raises(AdapterFileError) as caught:
            FORMATS[name].write(adapter, tmp_path / "x.safetensors", "float32", False)
        assert "unet.conv_in: trained whole; the format holds factors only" in caught.value.problems
    assert not list(tmp_path.iterdir())


def test_settings_of_diffusers_that_change_the_arithmetic_are_refused(tmp_path):
    adapter = attach(ImagePipeline(PIPELINES["sd"]()), LoRA(r=2, target_modules=ATTENTION))
    FORMATS["diffusers"].write(adapter, tmp_path / "x.safetensors", "float32", False)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        noted = json.loads(file.metadata()["lora_adapter_metadata"])
    noted["unet.lora_bias"] = True
    save_file(
        load_file(tmp_path / "x.safetensors"),
        tmp_path / "y.safetensors",
        {"lora_adapter_metadata": json.dumps(noted)},
    )
    with pytest.raises(AdapterFileError, match="settings that are not read"):
        load_adapter(ImagePipeline(PIPELINES["sd"]()), tmp_path / "y.safetensors")
