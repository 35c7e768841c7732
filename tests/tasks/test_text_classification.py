"""Classification: the loss of transformers, pairs, decoders that pool, new heads, labels."""

import pytest
import torch
import transformers as hf
from torch.nn import functional as F

from architectures import ARCHITECTURES, ENCODERS
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.attach.handle import adapters
from lorica.config import TrainSettings
from lorica.errors import DataError
from lorica.methods.lora import LoRA
from lorica.tasks.task import filler, num_positions
from lorica.tasks.text_classification import TextClassification, label_names
from lorica.train.loop import train
from train.words import fast_tokenizer

LABELS = ("bad", "fair", "good")
RECORDS = [
    {"text": "w7 w8 w9", "label": "good"},
    {"text": "w10", "label": "bad"},
    {"text": "w11 w12 w13 w14 w15 w16", "label": "fair"},
    {"text": "w7", "text_pair": "w8 w9", "label": "bad"},
]


def tokenizer(**special):
    own = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "<sep>", **special}
    return fast_tokenizer("<s> $A <sep>", "<s> $A <sep> $B:1 <sep>:1", **own)


def task(**more):
    return TextClassification(tokenizer(), LABELS, **more)


def decoder(pad=None, seed=0):
    config = hf.LlamaConfig(
        vocab_size=97,
        hidden_size=36,
        intermediate_size=53,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=64,
        num_labels=3,
        pad_token_id=pad,
    )
    torch.manual_seed(seed)
    return hf.LlamaForSequenceClassification(config).eval()


def wanted_loss(model, own, records, **extra):
    """The sum of what transformers says of each record alone."""
    total = 0.0
    for record in records:
        texts = [record["text"], *([record["text_pair"]] if "text_pair" in record else [])]
        inputs = own.tokenizer(*texts, return_tensors="pt", return_token_type_ids=True)
        inputs.pop("attention_mask")
        if "text_pair" not in record or not extra.get("segments"):
            inputs.pop("token_type_ids", None)
        with torch.no_grad():
            logits = model(**inputs).logits
        total += F.cross_entropy(logits, torch.tensor([own.index(record["label"])])).item()
    return total


def test_encoding_says_how_far_it_is(monkeypatch):
    monkeypatch.setattr("lorica.tasks.text_classification.TOKENIZED_AT_ONCE", 2)
    told = []
    task().encode(RECORDS, progress=told.append)
    assert told == [2, 3, 4]


@pytest.mark.parametrize("name", ENCODERS)
def test_the_loss_is_that_of_transformers(name):
    model, own = ARCHITECTURES[name].build(), task()
    segments = getattr(model.config, "type_vocab_size", 0) > 1
    batch = own.collate([own.encode(RECORDS).examples], model)
    assert ("token_type_ids" in batch.inputs) == segments
    with torch.no_grad():
        (found,) = own.losses(model, batch)
    assert found.item() == pytest.approx(
        wanted_loss(model, own, RECORDS, segments=segments), rel=1e-5
    )


def test_the_second_text_of_a_pair_is_told_apart():
    model, own = ARCHITECTURES["bert"].build(), task(packing=False)
    batch = own.collate([own.encode(RECORDS).examples], model)
    assert batch.inputs["token_type_ids"].tolist() == [
        [0] * 8,
        [0] * 8,
        [0] * 8,
        [0, 0, 0, 1, 1, 1, 0, 0],
    ]
    single = own.collate([own.encode(RECORDS[:3]).examples], model)
    assert "token_type_ids" not in single.inputs
    packed = task().collate([own.encode(RECORDS).examples], model)
    assert packed.inputs["token_type_ids"][0, :24].tolist() == [0] * 19 + [1] * 3 + [0] * 2


@pytest.mark.parametrize("pad", [None, 0, 4])
@pytest.mark.parametrize("special", [{"pad_token": "<pad>"}, {"eos_token": "</s>"}])
def test_a_decoder_pools_the_last_token_whatever_fills(pad, special):
    """Also where model and tokenizer name different filling tokens, or none."""
    model = decoder(pad)
    own = TextClassification(fast_tokenizer("<s> $A", **special), LABELS)
    own.tokenizer.pad_token = special.get("pad_token")
    with torch.no_grad():
        (found,) = own.losses(model, own.collate([own.encode(RECORDS[:3]).examples], model))
    assert found.item() == pytest.approx(wanted_loss(model, own, RECORDS[:3]), rel=1e-5)
    assert model.config.pad_token_id == pad
    made = own.predict(model, RECORDS[:3], batch_size=3)
    assert sum(p.nll for p in made) == pytest.approx(found.item(), rel=1e-5)
    assert model.config.pad_token_id == pad


def test_the_filling_token_is_the_models():
    own = fast_tokenizer(pad_token="<pad>", eos_token="</s>")
    assert filler(decoder(4), own) == 4
    assert filler(decoder(), own) == 0
    assert filler(decoder(), fast_tokenizer(eos_token="</s>")) == 2
    assert filler(decoder(), fast_tokenizer()) == 0


def test_positions_that_a_model_has():
    assert num_positions(ARCHITECTURES["bert"].build()) == 64
    model = ARCHITECTURES["roberta"].build()
    assert num_positions(model) == 63  # counted from behind the filling token, which is 0 here
    model(input_ids=torch.full((1, 63), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 64), 7))
    assert num_positions(ARCHITECTURES["t5"].build()) is None
    assert num_positions(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("bert", ("classifier",)),
        ("roberta", ("classifier",)),
        ("distilbert", ("pre_classifier", "classifier")),
        ("llama", ("score",)),
    ],
)
def test_a_new_head_is_trained_whole(tmp_path, name, head):
    model = decoder() if name == "llama" else ARCHITECTURES[name].build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    method = LoRA(r=3, target_modules="all-linear", modules_to_save=head)
    adapter = attach(model, method, name="x")
    start = {k: p.detach().clone() for k, p in adapter.named_parameters()}
    settings = TrainSettings(learning_rate=1e-2, max_steps=25, batch_size=4, logging_steps=25)
    own = task()
    report = train(model, {adapter: RECORDS}, settings, output_dir=tmp_path / "r", task=own)
    assert report.loss["x"] < 1.0  # the mean over all steps
    whole = [k for k in start if not k.endswith((".A", ".B"))]
    assert whole
    for key, parameter in adapter.named_parameters():
        assert not torch.equal(parameter, start[key]), key
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with activate(model, "x"):
        made = own.predict(model, RECORDS)
    assert [p.output for p in made] == [own.index(r["label"]) for r in RECORDS]
    with activate(model, None):
        assert [p.nll for p in own.predict(model, RECORDS)] != [p.nll for p in made]
    assert adapters(model)["x"].num_parameters == sum(p.numel() for p in adapter.parameters())


def test_predictions_keep_the_order_of_the_records():
    model, own, told = ARCHITECTURES["bert"].build(), task(), []
    made = own.predict(model, RECORDS, batch_size=3, progress=told.append)
    assert [p.record for p in made] == RECORDS
    assert [p.references for p in made] == [(2,), (0,), (1,), (0,)]
    assert all(p.num_tokens == 1 and p.output in (0, 1, 2) for p in made)
    assert told == [3, 4]


def test_long_texts_are_cut_and_keep_their_frame():
    own = task(max_length=6)
    records = [*RECORDS, {"text": "w5 " * 4, "text_pair": "w6 " * 9, "label": "bad"}]
    encoded = own.encode(records)
    assert [len(e) for e in encoded] == [5, 3, 6, 6, 6]
    assert [e.num_cut for e in encoded] == [0, 0, 2, 0, 10]
    assert all(e.input_ids[-1] == 3 for e in encoded)
    assert len(encoded[4].segments) == 6
    assert encoded.notes == ["2 records cut to 6 tokens"]
    assert own.facts() == {
        "kind": "text-classification",
        "max_length": 6,
        "labels": ["bad", "fair", "good"],
    }


def test_all_unusable_records_are_named_at_once():
    bad = [
        {"text": "w5", "label": "god"},
        {"text": "w5"},
        {"label": "good", "words": 1},
        {"text": 7, "label": "bad"},
        {"text": "w5", "label": None},
        *RECORDS,
    ]
    with pytest.raises(DataError) as caught:
        task().encode(bad)
    assert "5 of 9 records" in str(caught.value)
    assert caught.value.problems[0] == "record 1: the label 'god' is none of the 3 classes"
    assert caught.value.problems[2] == "record 3: it has no text, but the columns label, words"
    assert caught.value.problems[3] == "record 4: its text is no text"


def test_an_unknown_label_has_its_nearest():
    with pytest.raises(DataError, match="did you mean 'good'"):
        task().index("god")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([1, 0, 10, 2], ("0", "1", "2", "10")),
        (["1", "0"], ("0", "1")),
        ([1.0, 0.0], ("0", "1")),
        (["b ", "a", "b"], ("a", "b")),
        ([True, False], ("False", "True")),
        (["0", "x"], ("0", "x")),
        ([-1, 1], ("-1", "1")),
    ],
)
def test_names_of_labels(labels, names):
    assert label_names([{"label": label} for label in labels]) == names
    own = TextClassification(tokenizer(), names)
    assert {own.index(label) for label in labels} == set(range(len(names)))


def test_labels_that_are_no_classes():
    with pytest.raises(DataError, match="regression"):
        label_names([{"label": 0.5}, {"label": 1.0}])
    with pytest.raises(DataError, match="the same label '3'"):
        label_names([{"label": 3}, {"label": 3.0}])


def test_numbers_of_a_model_without_names():
    own = TextClassification(tokenizer(), ("LABEL_0", "LABEL_1"))
    assert [own.index(label) for label in (1, "0", "LABEL_1")] == [1, 0, 1]
    with pytest.raises(DataError):
        own.index(2)


def test_the_case_of_a_label_counts_only_where_it_tells_two_apart():
    assert [task().index(label) for label in ("Good", "BAD", "fair")] == [2, 0, 1]
    own = TextClassification(tokenizer(), ("us", "US", "them"))
    assert [own.index(label) for label in ("us", "US", "Them")] == [0, 1, 2]
    with pytest.raises(DataError):
        own.index("Us")
