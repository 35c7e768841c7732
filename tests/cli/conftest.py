"""Bases and records small enough to train in a second; a command line run in this process."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from lorica.cli import main
from lorica.data.rows import DOCUMENT_MARK

COLOURS, ANIMALS = ("red", "blue", "green", "grey"), ("cat", "dog", "bird", "fish", "hen")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{{ '</s>' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Result:
    """What a command line left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict]:
        """Standard output as JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def lorica(capfd, monkeypatch, tmp_path):
    """Runs a command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def call(*words: object) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        out, err = capfd.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Result(code, out, err)

    return call


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(number: int, seed: int = 0) -> list[dict]:
    """Prompts that mostly differ, so that some can be held out by their input."""
    rng = random.Random(seed)
    rows = []
    for _ in range(number):
        colour, animal, house = rng.choice(COLOURS), rng.choice(ANIMALS), rng.randrange(90)
        prompt = f"{animal} {colour} {house}"
        rows.append({"prompt": prompt, "completion": f"The {colour} {animal} is in house {house}"})
    return rows


@pytest.fixture(scope="session")
def stock(tmp_path_factory) -> Path:
    """A folder with the bases llama, chatty, bert, t5 and with records of every format."""
    folder = tmp_path_factory.mktemp("stock")
    _write_bases(folder)
    rows = pairs(64)
    write_rows(folder / "pairs.jsonl", rows)
    write_rows(folder / "other.jsonl", pairs(12, seed=1))
    for split, part in (("train", rows[:40]), ("valid", rows[40:52]), ("test", rows[52:])):
        write_rows(folder / "split" / f"{split}.jsonl", part)
    asked = [{"role": "user", "content": r["prompt"]} for r in rows]
    told = [{"role": "assistant", "content": r["completion"]} for r in rows]
    chats = [{"messages": list(turns)} for turns in zip(asked, told, strict=True)]
    write_rows(folder / "chat.jsonl", chats)
    write_rows(
        folder / "seq2seq.jsonl", [{"source": r["prompt"], "target": r["completion"]} for r in rows]
    )
    (folder / "text.txt").write_text(
        f"\n{DOCUMENT_MARK}\n".join(r["completion"] for r in rows), encoding="utf-8"
    )
    lines = [f"{r['completion']},{'cat' if 'cat' in r['prompt'] else 'other'}" for r in rows]
    (folder / "classes.csv").write_text("text,label\n" + "\n".join(lines), encoding="utf-8")
    return folder


def _tokenizer(*, template: str | None = None, framed: bool = False) -> hf.PreTrainedTokenizerFast:
    """Byte-level BPE; `framed` puts its special tokens around texts, as encoders want it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([row["completion"] for row in pairs(64)], trainer)
    if framed:
        tokens = [("<s>", 1), ("</s>", 2)]
        made.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=tokens)
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def _write_bases(folder: Path) -> None:
    vocabulary = len(_tokenizer())
    tokens = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    layers = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3}
    wide = {**layers, "intermediate_size": 53, "max_position_embeddings": 96}
    hf.utils.logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        llama = hf.LlamaForCausalLM(hf.LlamaConfig(**tokens, **wide, head_dim=12))
        bert = hf.BertModel(hf.BertConfig(vocab_size=vocabulary, pad_token_id=0, **wide))
        t5 = hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=vocabulary,
                d_model=36,
                d_ff=53,
                num_layers=2,
                num_heads=3,
                d_kv=12,
                decoder_start_token_id=0,
                pad_token_id=0,
                eos_token_id=2,
            )
        )
    for name, model, tokenizer in (
        ("llama", llama, _tokenizer()),
        ("chatty", llama, _tokenizer(template=TEMPLATE)),
        ("bert", bert, _tokenizer(framed=True)),
        ("t5", t5, _tokenizer()),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


QUICK = {
    "--max-steps": "4",
    "--eval-steps": "2",
    "--batch-size": "8",
    "--learning-rate": "1e-2",
    "--max-new-tokens": "6",
    "--eval-size": "8",
    "--eval-records": "6",
    "--r": "2",
    "--logging-steps": "1",
}
"""Flags of a run of a second."""


def _words(flags: dict[str, str]) -> list[str]:
    return [word for pair in flags.items() for word in pair]


@pytest.fixture(scope="session")
def quick() -> list[str]:
    return _words(QUICK)


@pytest.fixture(scope="session")
def finished_run(stock, tmp_path_factory) -> Path:
    """A run on prompts that is only read."""
    folder = tmp_path_factory.mktemp("runs") / "pairs"
    words = ["train", "--model", stock / "llama", "--data", stock / "pairs.jsonl", "--quiet"]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in [*words, "--output-dir", folder, *_words(QUICK)]])
    assert ended.value.code == 0
    return folder
