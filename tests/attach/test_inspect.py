"""What `lorica inspect` knows of a model."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES
from lorica.attach.inspect import inspect, lora_size
from lorica.attach.layers import describe
from lorica.attach.survey import survey
from lorica.errors import ConfigError, TargetError
from lorica.methods.lora import LoRA


def build(name):
    return ARCHITECTURES[name].build()


def choice_of(found, name):
    return next(choice for choice in found.choices if choice.choice == name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_totals_are_those_of_the_model(name):
    model = build(name)
    next(model.parameters()).requires_grad_(False)
    found = inspect(model)
    assert found.num_parameters == sum(p.numel() for p in model.parameters())
    assert found.num_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.num_modules == len(list(model.modules()))
    assert found.model_class == type(model).__name__
    assert sum(group.count for group in found.groups) == len(survey(model).places)
    json.dumps(found.as_dict())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sizes_are_those_that_lora_makes(name):
    """What a choice is said to train is counted against the tensors themselves."""
    model, rank = build(name), 3
    for place in survey(model).places.values():
        if place.path == "wav2vec2.encoder.pos_conv_embed.conv":
            continue  # its 2 groups do not divide a rank of 3
        if getattr(place.module, "groups", 1) == 3 or rank <= min(place.shape[:2]):
            layer = describe(place.module, place.parameter)
            tensors = LoRA(r=rank).start(layer, torch.Generator())
            assert lora_size(place, rank) == sum(t.numel() for t in tensors.values()), place.path


def test_groups_and_choices_of_a_llama():
    found = inspect(build("llama"), r=4)
    (q,) = [group for group in found.groups if group.suffix == "q_proj"]
    assert dataclasses.astuple(q) == (
        "q_proj",
        "Linear",
        "attention",
        (36, 36),
        2,
        2 * 36 * 36,
        "model.layers.0.self_attn.q_proj",
    )
    assert [group.role for group in found.groups] == [
        "embedding",
        *["attention"] * 4,
        *["mlp"] * 3,
        "head",
    ]
    auto = choice_of(found, "auto")
    assert auto.num_parameters == 4 * 2 * (72 + 48 + 48 + 72 + 3 * 89)
    assert auto.num_parameters == 2 * inspect(build("llama"), r=2).choices[0].num_parameters
    assert auto.percent == pytest.approx(100 * auto.num_parameters / found.num_parameters)
    assert auto.suffixes["down_proj"] == 2
    assert choice_of(found, "mlp").num_places == 6
    assert found.num_blocks == 2 and found.rank == 4
    assert found.shared == () and found.uncovered == {}


def test_biases_count():
    (group,) = [g for g in inspect(build("gpt2")).groups if g.suffix == "c_attn"]
    assert (group.kind, group.shape) == ("Conv1D", (108, 36))
    assert group.num_parameters == 2 * (108 * 36 + 108)


def test_sharing_and_uncovered_parameters():
    t5 = inspect(build("t5"))
    assert t5.shared == (("decoder.embed_tokens", "encoder.embed_tokens", "lm_head", "shared"),)
    mixtral = inspect(build("mixtral"))
    assert mixtral.uncovered == {f"model.layers.{i}.mlp.gate.weight": (4, 36) for i in (0, 1)}
    all_linear = choice_of(mixtral, "all-linear")
    assert all_linear.suffixes["gate_up_proj"] == 2
    experts = 2 * 4 * 8 * ((40 + 36) + (36 + 20))
    assert all_linear.num_parameters == choice_of(mixtral, "attention").num_parameters + experts
    assert {"A_log"} == {path.rpartition(".")[2] for path in inspect(build("mamba")).uncovered}


def test_a_choice_that_does_not_apply_says_why():
    attention = choice_of(inspect(build("cnn")), "attention")
    assert (attention.num_places, attention.num_parameters) == (0, 0)
    assert "no such layers" in attention.reason


def test_left_out_is_grouped_by_reason():
    left_out = choice_of(inspect(build("bert")), "auto").left_out
    assert {"dense": 1, "classifier": 1} in left_out.values()
    embeddings = next(names for why, names in left_out.items() if why.startswith("embedding"))
    assert set(embeddings) == {"word_embeddings", "position_embeddings", "token_type_embeddings"}


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5", "clip", "cnn"])
def test_no_weights_are_needed(name):
    expected = inspect(build(name)).as_dict()
    with torch.device("meta"):
        model = build(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert inspect(model).as_dict() == expected


def test_a_model_without_parameters():
    found = inspect(nn.Sequential(nn.Identity()))
    assert (found.num_parameters, found.num_blocks, found.groups) == (0, 0, ())
    assert all(choice.percent == 0 for choice in found.choices)


def test_bad_input():
    with pytest.raises(ConfigError, match="r is 0"):
        inspect(build("llama"), r=0)
    with pytest.raises(TargetError, match="DataParallel"):
        inspect(nn.DataParallel(build("bert")))
