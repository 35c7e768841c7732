"""Trainable tokens between Lorica and the real PEFT: outputs, gradients and files."""

import json

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorica
from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.errors import AdapterFileError, ConfigError, TargetError
from lorica.files import native
from lorica.files.adapter import load_adapter, save_adapter
from lorica.methods import DoRA, LoRA

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file.*adapter_config:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
NEW = [90, 7, 41]
CASES = {
    "llama": (NEW, ["q_proj"], 1),
    "llama-tied": (NEW, ["q_proj"], 2),
    "gemma": ({"embed_tokens": NEW}, ["q_proj"], 2),
    "gpt2": (NEW, ["c_attn"], 2),
    "bert": ({"word_embeddings": [4, 9]}, ["query"], 1),
    "t5": (NEW, ["q"], 3),
}
every = pytest.mark.parametrize("name", CASES)


def ids(name, model):
    """A sample in which the chosen tokens occur."""
    sample = ARCHITECTURES[name].sample(model, 2, 7)
    chosen = CASES[name][0]
    chosen = next(iter(chosen.values())) if isinstance(chosen, dict) else chosen
    sample["input_ids"][0, : len(chosen)] = torch.tensor(chosen)
    sample["input_ids"][1, 2] = chosen[0]
    return sample


def logits(name, model, sample):
    return ARCHITECTURES[name].logits(model(**sample))


def stir(parameters):
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def norms(parameters):
    return sorted(float(p.grad.double().norm()) for p in parameters)


@every
def test_theirs_read_by_us_and_written_again(name, tmp_path):
    chosen, targets, places = CASES[name]
    config = peft.LoraConfig(r=3, target_modules=targets, trainable_token_indices=chosen)
    theirs = peft.get_peft_model(ARCHITECTURES[name].build(), config).eval()
    stir(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = ARCHITECTURES[name].build()
    sample = ids(name, model)
    expected = logits(name, theirs, sample)
    adapter = load_adapter(model, tmp_path / "theirs", name="a")
    tokens = [slot for slot in adapter.slots.values() if slot.method.kind == "tokens"]
    assert len(tokens) == places and len({id(slot.tensors["rows"]) for slot in tokens}) == 1
    with activate(model, "a"):
        actual = logits(name, model, sample)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    actual.square().sum().backward()
    expected.square().sum().backward()
    ours, others = list(adapter.parameters()), [p for p in theirs.parameters() if p.requires_grad]
    assert norms(ours) == pytest.approx(norms(others), rel=1e-4)
    rows = next(p for key, p in adapter.named_parameters() if key.endswith(".rows"))
    other = next(p for key, p in theirs.named_parameters() if "trainable_tokens_delta" in key)
    order = torch.tensor(next(iter(chosen.values())) if isinstance(chosen, dict) else chosen)
    gradient = other.grad[order.argsort()]
    assert (rows.grad - gradient).abs().max() <= 1e-5 * gradient.abs().max()
    save_adapter(adapter, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(ARCHITECTURES[name].build(), str(tmp_path / "ours"))
    torch.testing.assert_close(logits(name, back.eval(), sample), expected, rtol=1e-5, atol=1e-5)


@every
def test_ours_is_the_identity_at_first_and_is_read_by_them(name, tmp_path):
    chosen, targets, _ = CASES[name]
    model = ARCHITECTURES[name].build()
    sample = ids(name, model)
    with torch.no_grad():
        bare = logits(name, model, sample)
    method = LoRA(r=3, target_modules=targets, trainable_token_indices=chosen)
    adapter = attach(model, method, name="a")
    with torch.no_grad(), activate(model, "a"):
        assert torch.equal(logits(name, model, sample), bare)
    stir(adapter.parameters())
    with torch.no_grad(), activate(model, "a"):
        expected = logits(name, model, sample)
    assert (expected - bare).abs().max() > 1e-3
    save_adapter(adapter, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(ARCHITECTURES[name].build(), str(tmp_path / "ours"))
    with torch.no_grad():
        torch.testing.assert_close(
            logits(name, theirs.eval(), sample), expected, rtol=1e-5, atol=1e-5
        )
    again = ARCHITECTURES[name].build()
    save_adapter(load_adapter(again, tmp_path / "ours", name="a"), tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    lorica.detach(model, "a")
    with torch.no_grad():
        assert torch.equal(logits(name, model, sample), bare)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_merged_it_answers_as_before(name):
    """A tied weight stays tied: both layers get the same rows."""
    model = ARCHITECTURES[name].build()
    sample = ids(name, model)
    method = LoRA(r=3, target_modules=["q_proj"], trainable_token_indices=NEW)
    stir(attach(model, method, name="a").parameters())
    with torch.no_grad(), activate(model, "a"):
        expected = logits(name, model, sample)
    report = lorica.merge(model, "a")
    with torch.no_grad():
        torch.testing.assert_close(logits(name, model, sample), expected, rtol=1e-5, atol=1e-5)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (name == "llama-tied") and not report.untied


def test_only_the_chosen_rows_are_in_the_file(tmp_path):
    model = ARCHITECTURES["llama-tied"].build()
    method = LoRA(r=3, target_modules=["q_proj"], trainable_token_indices=NEW)
    adapter = attach(model, method, name="a")
    assert sum(key.endswith(".rows") for key, _ in adapter.named_parameters()) == 1
    save_adapter(adapter, tmp_path / "x")
    with safe_open(tmp_path / "x/adapter_model.safetensors", "pt") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert {k: v for k, v in found.items() if ".lora_" not in k} == {key: (3, 36)}


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_where_peft_has_no_layout_ours_holds_them(kind, tmp_path):
    """DoRA on a bare parameter is nothing that PEFT could read."""
    model = ARCHITECTURES["mixtral"].build()
    targets = ("mlp.experts.down_proj",)
    adapter = attach(model, kind(r=2, target_modules=targets, trainable_token_indices=NEW))
    stir(adapter.parameters())
    sample = ids("llama", model)
    with torch.no_grad(), activate(model, "default"):
        expected = model(**sample).logits
    save_adapter(adapter, tmp_path / "x")
    again = ARCHITECTURES["mixtral"].build()
    load_adapter(again, tmp_path / "x", name="b")
    with torch.no_grad(), activate(again, "b"):
        torch.testing.assert_close(again(**sample).logits, expected)


@pytest.fixture
def in_our_layout(monkeypatch, tmp_path):
    monkeypatch.setattr("lorica.files.adapter.LAYOUTS", (native,))
    model = ARCHITECTURES["llama-tied"].build()
    adapter = attach(model, LoRA(r=2, target_modules=["q_proj"], trainable_token_indices=NEW))
    stir(adapter.parameters())
    return adapter, save_adapter(adapter, tmp_path / "x")


def test_our_layout_keeps_the_tie(in_our_layout):
    adapter, folder = in_our_layout
    sample = ids("llama-tied", adapter.model)
    again = ARCHITECTURES["llama-tied"].build()
    read = load_adapter(again, folder, name="b")
    assert read.slots["lm_head"].tensors is read.slots["model.embed_tokens"].tensors
    assert read.num_parameters == adapter.num_parameters
    with torch.no_grad(), activate(again, "b"), activate(adapter.model, adapter):
        assert torch.equal(again(**sample).logits, adapter.model(**sample).logits)


@pytest.mark.parametrize(
    "change",
    [
        {"tied_to": "model.norm"},
        {"tied_to": "model.layers.0.self_attn.q_proj"},
        {"tied_to": ["x"]},
        {"tied_to": None},
        {"indices": [7, 41]},
        {"indices": [7, 41, 900]},
        {"indices": "x"},
        {"indices": [41, 7, 90]},
    ],
)
def test_a_tie_that_does_not_hold_is_refused(in_our_layout, change):
    path = in_our_layout[1] / "adapter_config.json"
    raw = json.loads(path.read_text())
    raw["places"]["lm_head"] |= change
    path.write_text(json.dumps(raw))
    with pytest.raises(AdapterFileError, match="lm_head"):
        load_adapter(ARCHITECTURES["llama-tied"].build(), in_our_layout[1])


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"trainable_token_indices": [97]}, "has 97 tokens; there is no token 97"),
        ({"trainable_token_indices": {"embed_token": [1]}}, "did you mean 'embed_tokens'"),
        ({"target_modules": ["embed_tokens"]}, "model.embed_tokens.*: adapted as a whole"),
        ({"target_modules": ["lm_head"]}, "lm_head: adapted as a whole"),
        ({"modules_to_save": ["embed_tokens"]}, "model.embed_tokens.*: adapted as a whole"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(settings, word):
    model = ARCHITECTURES["llama-tied"].build()
    plain = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": NEW}
    with pytest.raises(TargetError, match=word):
        attach(model, LoRA(**{**plain, **settings}))
    assert not lorica.adapters(model) and type(model.lm_head) is torch.nn.Linear


def test_a_model_without_an_embedding_is_told():
    with pytest.raises(TargetError, match="does not say which is its input embedding"):
        attach(ARCHITECTURES["cnn"].build(), LoRA(r=2, trainable_token_indices=[1]))


@pytest.mark.parametrize(
    ("chosen", "word"),
    [
        ([1, 1], "names the token 1 twice"),
        ([-1], "whole numbers from 0"),
        ([True], "whole numbers from 0"),
        ({"embed_tokens": []}, "is empty"),
    ],
)
def test_a_choice_that_is_none_is_refused(chosen, word):
    with pytest.raises(ConfigError, match=word):
        LoRA(trainable_token_indices=chosen)


def test_a_file_that_adapts_the_embedding_besides_is_refused(tmp_path):
    for name, settings in (
        ("rows", {"trainable_token_indices": NEW}),
        ("whole", {"target_modules": ["q_proj", "embed_tokens"]}),
    ):
        method = LoRA(**{"r": 3, "target_modules": ["q_proj"], **settings})
        save_adapter(attach(ARCHITECTURES["llama"].build(), method), tmp_path / name)
    tensors, config = {}, {}
    for name in ("rows", "whole"):
        tensors |= load_file(tmp_path / name / "adapter_model.safetensors")
        config |= json.loads((tmp_path / name / "adapter_config.json").read_text())
    config["trainable_token_indices"] = sorted(NEW)
    save_file(tensors, tmp_path / "rows/adapter_model.safetensors")
    (tmp_path / "rows/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFileError, match=r"embed_tokens: adapted as a whole"):
        load_adapter(ARCHITECTURES["llama"].build(), tmp_path / "rows")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"trainable_token_indices": None}, "trainable tokens"),
        ({"trainable_token_indices": [1, 2]}, "the base needs"),
        ({"trainable_token_indices": [1, 2, 500]}, "there is no token 500"),
        ({"trainable_token_indices": [1, 2, "3"]}, "whole numbers from 0"),
        ({"trainable_token_indices": {"lm_head": [1, 2, 3]}}, "missing from the file"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change, word, tmp_path):
    method = LoRA(r=3, target_modules=["q_proj"], trainable_token_indices=NEW)
    save_adapter(attach(ARCHITECTURES["llama"].build(), method), tmp_path / "x")
    path = tmp_path / "x/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(AdapterFileError, match=word):
        load_adapter(ARCHITECTURES["llama"].build(), tmp_path / "x")
