"""Source to target: labels, the loss of transformers, answers."""

import pytest
import torch
import transformers as hf

from architectures import ARCHITECTURES, SEQ2SEQ
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.config import TrainSettings
from lorica.errors import BaseModelError, DataError
from lorica.methods.lora import LoRA
from lorica.tasks.seq2seq import Seq2Seq
from lorica.train.loop import train
from train.runs import rows
from train.words import fast_tokenizer

RECORDS = [
    {"source": "w7 w8 w9", "target": "w10 w11"},
    {"source": "w12", "target": "w13 w14 w15 w16 w17"},
    {"prompt": "w7 w7 w8 w8 w9 w9", "completion": "w20"},
]


def task(name, **more):
    """With the tokens of the model: T5 ends with 1 and begins with 0, BART frames with 1 and 2."""
    if name.startswith("t5"):
        own = fast_tokenizer(eos_token="<s>", pad_token="<pad>")
    else:
        own = fast_tokenizer("<s> $A </s>", eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    return Seq2Seq(own, **{"max_new_tokens": 7, **more})


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_the_loss_is_that_of_transformers(name):
    model, own = ARCHITECTURES[name].build(), task(name)
    examples = own.encode(RECORDS).examples
    wanted = 0.0
    for e in examples:
        with torch.no_grad():
            made = model(input_ids=torch.tensor([e.input_ids]), labels=torch.tensor([e.labels]))
        wanted += made.loss.item() * len(e.labels)
    with torch.no_grad():
        (found,) = own.losses(model, own.collate([examples], model))
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    predictions = own.predict(model, RECORDS, generate=False)
    assert sum(p.nll for p in predictions) == pytest.approx(wanted, rel=1e-5)
    assert [p.num_tokens for p in predictions] == [len(e.labels) for e in examples]


def test_every_text_ends_with_one_end_token():
    t5, bart = task("t5").encode(RECORDS), task("bart").encode(RECORDS)
    assert (t5[0].input_ids, t5[0].labels) == ([7, 8, 9, 1], [10, 11, 1])
    assert (bart[2].input_ids, bart[2].labels) == ([1, 7, 7, 8, 8, 9, 9, 2], [1, 20, 2])
    assert [e.row for e in t5] == [0, 1, 2]
    assert task("t5").encode([{"source": "", "target": "w5"}])[0].input_ids == [1]


def test_decoder_inputs_are_the_labels_one_later():
    model, own = ARCHITECTURES["t5"].build(), task("t5")
    batch = own.collate([own.encode(RECORDS[:2]).examples], model)
    assert batch.inputs["decoder_input_ids"].tolist() == [
        [0, 10, 11, 1, 0, 0],
        [0, 13, 14, 15, 16, 17],
    ]
    assert batch.labels[0].tolist() == [[10, 11, 1, -100, -100, -100], [13, 14, 15, 16, 17, 1]]


FAMILIES = {
    "m2m_100": ("M2M100", {"decoder_start_token_id": 2}),
    "blenderbot": ("Blenderbot", {"decoder_start_token_id": 1}),
    "mbart": ("MBart", {}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_shift_their_labels_themselves(name):
    """Not every one has a method for it; all know what to do with `labels`."""
    stem, start = FAMILIES[name]
    layers = {f"{part}_{key}": n for part in ("encoder", "decoder")
              for key, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 23))}  # fmt: skip
    config = getattr(hf, f"{stem}Config")(
        vocab_size=97, d_model=16, max_position_embeddings=64, pad_token_id=0, eos_token_id=2,
        bos_token_id=1, **layers, **start,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(hf, f"{stem}ForConditionalGeneration")(config).eval()
    own = task("mbart")
    examples = own.encode(RECORDS).examples
    with torch.no_grad():
        wanted = sum(
            model(input_ids=torch.tensor([e.input_ids]), labels=torch.tensor([e.labels])).loss
            * len(e.labels)
            for e in examples
        )
        (found,) = own.losses(model, own.collate([examples], model))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_model_without_a_start_of_targets_is_refused():
    model = ARCHITECTURES["llama"].build()
    own = task("mbart")
    with pytest.raises(BaseModelError, match="which token a target begins with"):
        own.collate([own.encode(RECORDS).examples], model)


def test_a_language_behind_the_end_token_stays_there():
    """mBART ends with the end token and the language; a second end token would be learnt."""
    own = fast_tokenizer("$A </s> <sep>", eos_token="</s>", pad_token="<pad>")
    assert Seq2Seq(own).encode(RECORDS[:1])[0].labels == [10, 11, 2, 3]
    short = Seq2Seq(own, max_length=3).encode(RECORDS)
    assert [e.input_ids for e in short] == [[7, 2, 3], [12, 2, 3], [7, 2, 3]]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_question_is_spelled_as_in_training(name):
    for own in (task(name), task(name, max_length=4)):
        for record, example in zip(RECORDS, own.encode(RECORDS), strict=True):
            assert own.prompt_ids(record) == example.input_ids


def test_long_texts_are_cut_and_keep_their_end():
    encoded = task("t5", max_length=4).encode(RECORDS)
    assert [e.input_ids for e in encoded] == [[7, 8, 9, 1], [12, 1], [7, 7, 8, 1]]
    assert encoded[1].labels == [13, 14, 15, 1]
    assert [(e.num_cut, e.num_trained_cut) for e in encoded] == [(0, 0), (2, 2), (3, 0)]
    assert encoded.notes == ["2 records cut to 4 tokens"]
    assert task("t5", max_length=4).facts() == {"kind": "seq2seq", "max_length": 4}


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_answers_of_a_batch_are_those_one_by_one(name):
    model, own, told = ARCHITECTURES[name].build(), task(name), []
    together = own.predict(model, RECORDS, batch_size=2, progress=told.append)
    alone = [own.predict(model, [record])[0] for record in RECORDS]
    assert [p.output for p in together] == [p.output for p in alone]
    assert told == [2, 3]
    assert together[1].references == ("w13 w14 w15 w16 w17",)


def trained(folder, name, steps):
    model, own = ARCHITECTURES[name].build(), task(name)
    adapter = attach(model, LoRA(r=8, lora_alpha=32, target_modules="all-linear"), name="x")
    settings = TrainSettings(learning_rate=1e-2, max_steps=steps, batch_size=3, logging_steps=1)
    train(model, {adapter: RECORDS}, settings, output_dir=folder, task=own)
    return model, own, [row["loss"] for row in rows(folder)]


def test_it_learns_and_answers(tmp_path):
    model, own, losses = trained(tmp_path / "r", "bart", 60)
    assert losses[-1] < 0.5 * losses[0]
    with activate(model, "x"):
        made = own.predict(model, RECORDS)
    assert [p.output for p in made] == [p.references[0] for p in made]


def test_t5_learns(tmp_path):
    """Its logits are scaled down and start flat, so that a few steps do not go far."""
    losses = trained(tmp_path / "r", "t5", 12)[2]
    assert losses[-1] < losses[0] - 0.05


def test_tokens_are_counted_on_both_sides(tmp_path):
    own = task("bart")
    encoded = own.encode(RECORDS)
    both = sum(len(e.input_ids) + len(e.labels) for e in encoded)
    assert encoded.num_tokens == both
    model = ARCHITECTURES["bart"].build()
    adapter = attach(model, LoRA(r=2, target_modules="all-linear"), name="x")
    settings = TrainSettings(max_steps=1, batch_size=3, logging_steps=1)
    train(model, {adapter: RECORDS}, settings, output_dir=tmp_path / "r", task=own)
    assert [row["tokens"] for row in rows(tmp_path / "r")] == [both]


def test_unusable_records_are_named_at_once():
    bad = [{"source": "w5"}, {"source": "w5", "target": " "}, {"target": "w6"}, RECORDS[0]]
    with pytest.raises(DataError) as caught:
        task("t5").encode(bad)
    assert "3 of 4 records" in str(caught.value)
    assert caught.value.problems == (
        "record 1 has the columns source",
        "record 2 has an empty target",
        "record 3 has the columns target",
    )
