"""Loading a base: strictly, and without running anybody's code."""

import json
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from architectures import ARCHITECTURES
from lorica.attach.attach import attach
from lorica.base import choose
from lorica.base.choose import choose_dtype
from lorica.base.digest import digest_of_files, digest_of_tensors
from lorica.base.empty import empty_model
from lorica.base.known import base_of
from lorica.base.load import load_model
from lorica.base.missing import missing_heads
from lorica.errors import BaseModelError
from lorica.files.adapter import save_adapter
from lorica.methods.lora import LoRA
from train.words import fast_tokenizer


def saved(folder, name="llama", *, dtype=torch.float32):
    """A small model and a tokenizer as folders of transformers."""
    model = ARCHITECTURES[name].build().to(dtype)
    model.save_pretrained(folder)
    frame = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    fast_tokenizer(padding_side="left", **frame).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT without a head."""
    folder = saved(tmp_path_factory.mktemp("base") / "bert", "bert")
    model = hf.BertModel.from_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def edited(folder, source, **changes):
    """A copy whose config.json says something else."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key, None) if value is None else config.update({key: value})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def without(folder, source, name):
    """A copy without one tensor."""
    shutil.copytree(source, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    return folder


# --- what comes back ------------------------------------------------------------------------------


def test_a_folder(causal):
    model = load_model(causal, dtype="float32")
    base = base_of(model)
    assert (base.name, base.task) == (str(causal), "causal-lm")
    assert base.labels == base.new_modules == ()
    assert base.tokenizer.padding_side == "right"
    assert base.facts() == {"name": str(causal), "task": "causal-lm", "digest": base.digest}
    assert not model.training
    wanted = ARCHITECTURES["llama"].build().state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in model.state_dict().items())
    assert base_of(ARCHITECTURES["llama"].build()) is None


def test_the_embedded_model():
    model = load_model("embedded")
    assert base_of(model).name == "embedded"
    assert sum(p.numel() for p in model.parameters()) < 8_000_000


def test_a_home_folder(causal, monkeypatch):
    monkeypatch.setenv("HOME", str(causal.parent))
    assert base_of(load_model("~/llama")).digest == digest_of_files(causal)


def test_every_task(tmp_path, causal, encoder):
    t5 = saved(tmp_path / "t5", "t5")
    assert type(load_model(t5, task="seq2seq")).__name__ == "T5ForConditionalGeneration"
    model = load_model(encoder, task="text-classification", labels=("bad", "good"))
    assert base_of(model).labels == ("bad", "good")
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.classifier.out_features == 2
    decoder = load_model(causal, task="text-classification", labels=("a", "b", "c"))
    assert base_of(decoder).new_modules == ("score",)
    assert base_of(decoder).notes[-1] == "new, started at random, to be trained whole: score"
    assert "lm_head.weight" in base_of(decoder).notes[0]


def test_a_new_head_is_the_same_every_time(encoder):
    """Nothing may depend on the random state of the process, nor change it."""
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        wanted = torch.rand(2)
        torch.manual_seed(len(found))
        labels = ("a", "b")
        model = load_model(encoder, task="text-classification", labels=labels, seed=seed)
        assert torch.equal(torch.rand(2), wanted)
        found.append(model.classifier.weight.detach().clone())
        assert base_of(model).new_modules == ("classifier",)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_head_of_the_files_is_kept_or_replaced(tmp_path):
    folder = edited(
        tmp_path / "named",
        saved(tmp_path / "bert", "bert"),
        id2label={"0": "neg", "1": "neutral", "2": "pos"},
        label2id={"neg": 0, "neutral": 1, "pos": 2},
    )
    own = load_model(folder, task="text-classification")
    assert base_of(own).labels == ("neg", "neutral", "pos")
    assert not base_of(own).notes
    kept = load_model(folder, task="text-classification", labels=("0", "1", "2"))
    assert torch.equal(kept.classifier.weight, own.classifier.weight)
    assert base_of(kept).new_modules == ()
    assert "neg -> 0, neutral -> 1, pos -> 2" in base_of(kept).notes[0]
    assert missing_heads(folder, own, labels=("0", "1", "2")) == ()
    wider = load_model(folder, task="text-classification", labels=tuple("abcde"))
    assert wider.classifier.out_features == 5
    assert base_of(wider).new_modules == ("classifier",)
    assert torch.equal(
        wider.bert.embeddings.word_embeddings.weight, own.bert.embeddings.word_embeddings.weight
    )


def named_classes(folder, names):
    known = {"id2label": {str(i): n for i, n in enumerate(names)}, "num_labels": len(names)}
    return edited(folder, saved(folder.parent / "bare", "bert"), **known, label2id=None)


@pytest.mark.parametrize("spelled", [str, str.upper])
def test_the_same_classes_keep_the_order_of_the_model(tmp_path, spelled):
    """Data names them alphabetically; taken by place, a good base would be scored inverted."""
    folder = named_classes(tmp_path / "x", ["pos", "Neutral", "neg"])
    own = load_model(folder, task="text-classification")
    labels = tuple(map(spelled, ("neg", "neutral", "pos")))
    model = load_model(folder, task="text-classification", labels=labels)
    wanted = tuple(map(spelled, ("pos", "neutral", "neg")))
    assert base_of(model).labels == wanted == tuple(model.config.id2label.values())
    assert torch.equal(model.classifier.weight, own.classifier.weight)
    assert base_of(model).new_modules == ()
    assert "keep the order of the model" in base_of(model).notes[0]
    empty = empty_model(folder, task="text-classification", labels=labels)
    assert tuple(empty.config.id2label.values()) == wanted


def test_other_classes_get_a_new_output(tmp_path):
    """As many as the model has, but of other names: its output would say something else."""
    folder = named_classes(tmp_path / "x", ["entailment", "neutral", "contradiction"])
    own = load_model(folder, task="text-classification")
    labels = ("ham", "news", "spam")
    model, again = (load_model(folder, task="text-classification", labels=labels) for _ in "ab")
    base = base_of(model)
    assert (base.labels, base.new_modules) == (labels, ("classifier",))
    assert not torch.equal(model.classifier.weight, own.classifier.weight)
    assert torch.equal(model.classifier.weight, again.classifier.weight)
    assert torch.equal(model.bert.pooler.dense.weight, own.bert.pooler.dense.weight)
    assert "the model knows other classes (entailment" in base.notes[0]
    assert missing_heads(folder, own, labels=labels) == ("classifier",)


def test_classes_without_names_go_by_their_place(tmp_path):
    folder = named_classes(tmp_path / "x", ["LABEL_0", "LABEL_1", "LABEL_2"])
    model = load_model(folder, task="text-classification", labels=("neg", "neutral", "pos"))
    assert (base_of(model).labels, base_of(model).new_modules) == (("neg", "neutral", "pos"), ())


# --- precision ------------------------------------------------------------------------------------


def test_dtypes(tmp_path, causal, monkeypatch):
    half = saved(tmp_path / "half", dtype=torch.bfloat16)

    def dtype_of(folder, dtype):
        return next(load_model(folder, dtype=dtype, device="cpu").parameters()).dtype

    assert dtype_of(half, "as-stored") is torch.bfloat16
    assert dtype_of(causal, "as-stored") is torch.float32
    assert dtype_of(causal, "bfloat16") is torch.bfloat16
    assert dtype_of(half, "float32") is torch.float32
    assert base_of(load_model(half)).digest == base_of(load_model(half, dtype="float32")).digest
    for native, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(choose, "_cpu_has_bfloat16", lambda native=native: native)
        assert choose_dtype("auto", torch.device("cpu")) is wanted
        told = base_of(load_model(causal, dtype="bfloat16", device="cpu")).notes
        assert (choose.SLOW_BFLOAT16 in told) is not native


# --- digests --------------------------------------------------------------------------------------


def test_the_digest_tells_one_byte(tmp_path, causal):
    copy = tmp_path / "another name"
    shutil.copytree(causal, copy)
    assert base_of(load_model(copy)).digest == base_of(load_model(causal)).digest
    path = copy / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.unlink()  # the loaded model maps the old file
    path.write_bytes(raw)
    assert base_of(load_model(copy)).digest != base_of(load_model(causal)).digest


def test_the_digest_of_tensors_is_of_names_and_values():
    model = ARCHITECTURES["gpt2"].build()
    before = digest_of_tensors(model)
    assert digest_of_tensors(ARCHITECTURES["gpt2"].build()) == before
    assert digest_of_tensors(model.to(torch.bfloat16)) != before
    attach(model, LoRA(r=2, target_modules="all-linear"), name="x")
    own = digest_of_tensors(model)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[0, 0] += 1
    assert digest_of_tensors(model) != own


def test_shards_are_all_in_the_digest(tmp_path):
    model = ARCHITECTURES["llama"].build()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    fast_tokenizer(eos_token="</s>").save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    loaded = load_model(tmp_path, dtype="float32")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    before = digest_of_files(tmp_path)
    shards[1].rename(tmp_path / "aside")
    assert digest_of_files(tmp_path) != before
    with pytest.raises(BaseModelError, match="lacks 1 weight files"):
        load_model(tmp_path)


# --- refusals -------------------------------------------------------------------------------------


def refused(folder, **how):
    with pytest.raises(BaseModelError) as caught:
        load_model(folder, **how)
    return str(caught.value)


def test_all_problems_of_a_request_at_once(tmp_path):
    told = refused(tmp_path / "none", task="causal", dtype="bfloat", labels=("a",))
    assert "unknown task 'causal'; there are causal-lm" in told
    assert "did you mean 'bfloat16'" in told
    assert "at least two different names" in told
    assert f"there is no folder {tmp_path / 'none'}" in told


def test_labels_without_a_classification(causal):
    assert "labels belong to text-classification" in refused(causal, labels=("a", "b"))


def test_missing_weights_are_named(tmp_path, causal):
    folder = without(tmp_path / "x", causal, "model.layers.1.mlp.up_proj.weight")
    told = refused(folder)
    assert "1 tensors are missing" in told
    assert "model.layers.1.mlp.up_proj.weight" in told


def test_weights_of_another_shape_are_named(tmp_path, causal):
    told = refused(edited(tmp_path / "x", causal, intermediate_size=54))
    assert "6 tensors are missing" in told
    assert "model.layers.0.mlp.down_proj.weight (of another shape)" in told


def test_weights_of_another_shape_are_no_new_head(tmp_path, encoder):
    folder = edited(tmp_path / "x", encoder, intermediate_size=54)
    told = refused(folder, task="text-classification", labels=("a", "b"))
    assert "intermediate.dense.weight (of another shape)" in told


def test_the_wrong_task(tmp_path, causal, encoder):
    assert "for seq2seq" in refused(causal, task="seq2seq")
    told = refused(encoder, task="causal-lm")
    assert "do not fill a BertLMHeadModel" in told
    assert "cls.predictions" in told
    assert "choose the task that the model was made for" in told


def test_a_regression(tmp_path, encoder):
    folder = edited(tmp_path / "x", encoder, num_labels=1, id2label={"0": "LABEL_0"}, label2id=None)
    assert "a single output: a regression" in refused(folder, task="text-classification")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused(tmp_path, causal, name):
    folder = edited(tmp_path / "x", causal)
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.ones(1)}, folder / name)
    assert "its pickled weights are never loaded: convert them to safetensors" in refused(folder)


def test_an_adapter_folder_is_refused(tmp_path, causal):
    model = load_model(causal)
    save_adapter(attach(model, LoRA(r=2, target_modules="all-linear"), name="x"), tmp_path / "x")
    assert "is an adapter, not a base model: name the base" in refused(tmp_path / "x")
    both = edited(tmp_path / "both", causal)
    shutil.copy(tmp_path / "x/adapter_config.json", both)
    assert "holds an adapter beside the model" in refused(both)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "nothing-known"}', "{}"])
def test_a_config_that_is_none(tmp_path, causal, content):
    folder = edited(tmp_path / "x", causal)
    (folder / "config.json").write_text(content)
    told = refused(folder)
    assert any(text in told for text in ("is no JSON", "no JSON object", "is not known"))


def test_damaged_files(tmp_path, causal):
    cut = edited(tmp_path / "cut", causal)
    raw = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").unlink()
    (cut / "model.safetensors").write_bytes(raw[:-7])
    assert "model.safetensors is cut off" in refused(cut)
    bare = edited(tmp_path / "bare", causal)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    assert "a tokenizer" in refused(bare)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in refused(empty)


def test_a_hub_id_that_is_not_here():
    told = refused("nobody/nothing-of-this-name")
    assert "there is no base nobody/nothing-of-this-name" in told
    assert "HF_HUB_OFFLINE" in told


def test_code_of_the_model_is_not_run(tmp_path, causal):
    folder = edited(
        tmp_path / "x",
        causal,
        model_type="own",
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    )
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refused(folder)
    assert not (tmp_path / "ran").exists()


def test_transformers_is_left_as_loud_as_it_was(causal, tmp_path):
    logging = hf.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(causal)
    refused(tmp_path / "none")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# --- without weights ------------------------------------------------------------------------------


def test_an_empty_model_has_names_and_shapes(causal, tmp_path):
    model = empty_model(causal)
    wanted = {k: v.shape for k, v in ARCHITECTURES["llama"].build().state_dict().items()}
    assert {k: v.shape for k, v in model.state_dict().items()} == wanted
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(BaseModelError, match="unknown task 'x'"):
        empty_model(causal, task="x")
    with pytest.raises(BaseModelError, match=r"has no config\.json"):
        empty_model(tmp_path)


def test_a_real_model(shared_data):
    model = load_model(shared_data / "models/stories260k")
    assert base_of(model).digest == digest_of_files(shared_data / "models/stories260k")
    assert [n for n in base_of(model).notes if "end token" not in n] == []
