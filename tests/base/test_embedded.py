"""The embedded base: small, read by plain transformers, and able to copy what it has read."""

import json
import stat
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorica.data.facts import facts

FOLDER = Path(str(files("lorica.base") / "embedded"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_the_folder_is_complete_small_and_readable():
    names = {path.name for path in FOLDER.iterdir() if path.is_file()}
    assert names >= {
        "NOTICE.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (FOLDER / "model.safetensors").stat().st_size < 12_000_000
    for name in names:
        assert stat.S_IMODE((FOLDER / name).stat().st_mode) & 0o444 == 0o444


def test_it_is_a_small_llama_in_bf16_without_traces_of_where_it_was_made(model):
    assert type(model).__name__ == "LlamaForCausalLM"
    assert sum(p.numel() for p in model.parameters()) < 6_000_000
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert not set(config) & {"_name_or_path", "local_files_only"}
    stored = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert stored.dtype is torch.bfloat16


def test_special_tokens_agree_between_tokenizer_and_model(model, tokenizer):
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len({*ids}) == 3 and None not in ids
    assert ids == tuple(getattr(model.config, f"{name}_token_id") for name in ("bos", "eos", "pad"))
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer("Once")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer("Once")["input_ids"].count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in tokenizer("Once")["input_ids"]


@pytest.mark.parametrize(
    "text",
    [
        "The Amber Falcon, Willow Lane.",
        "  two  blanks\n\n\tand 12,345",
        "naïve café — 猫 🐈‍⬛ \x00",
        "",
    ],
)
def test_every_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_prompt_and_completion_meet_on_a_token_boundary(tokenizer):
    """Encoding both at once or each by itself gives the same ids."""
    for row in facts("valid", num_records=37):
        parts = [
            tokenizer(row[key], add_special_tokens=False)["input_ids"]
            for key in ("prompt", "completion")
        ]
        together = tokenizer(row["prompt"] + row["completion"], add_special_tokens=False)
        assert together["input_ids"] == parts[0] + parts[1]


def test_it_copies_what_it_has_read(model, tokenizer):
    """Held-out values, read twice, are foreseen the third time from their first token on."""
    right = total = 0
    for row in facts("test", num_records=24):
        slots = [
            tokenizer(" " + slot, add_special_tokens=False)["input_ids"] for slot in row["slots"]
        ]
        comma = tokenizer(",", add_special_tokens=False)["input_ids"]
        ids, marks = [tokenizer.bos_token_id], [False]
        for order in (slots, slots[::-1], slots):
            for slot in order:
                ids += slot + comma
                marks += [False] + [True] * (len(slot) - 1) + [False] * len(comma)
        third = torch.tensor(marks[1:])
        third[: 2 * len(ids) // 3] = False
        with torch.no_grad():
            guess = model(input_ids=torch.tensor([ids])).logits[0, :-1].argmax(-1)
        right += int(((guess == torch.tensor(ids[1:])) & third).sum())
        total += int(third.sum())
    assert total > 100
    assert right / total > 0.8


def test_untouched_it_says_almost_none_of_the_facts(model, tokenizer):
    rows = facts("test", num_records=24)
    batch = tokenizer(
        [row["prompt"] for row in rows], return_tensors="pt", padding=True, padding_side="left"
    )
    with torch.no_grad():
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=48,
            do_sample=False,
        )
    texts = tokenizer.batch_decode(
        output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    said = [slot in text for row, text in zip(rows, texts, strict=True) for slot in row["slots"]]
    assert sum(said) / len(said) < 0.15
