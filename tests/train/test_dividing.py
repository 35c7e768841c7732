"""A base that processes hold together: the shares, the bits of one process, the same for all."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

import lorica
from lorica.base.load import load_model
from lorica.base.processes import Processes
from lorica.base.tokenizer import load_tokenizer
from lorica.data.encode import Example
from lorica.train.dividing import Divided, dealt_records, whole_adapters
from lorica.train.engine import Trainee
from several_processes import torchrun
from train import holding_together

SOURCE = Path(holding_together.__file__)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A model whose head is not its embeddings, of sizes that no number of processes divides."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = load_tokenizer("embedded")
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer) + 3,
        hidden_size=24,
        intermediate_size=35,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def check(number, bases, output):
    done = torchrun(number, SOURCE, output, *bases, folder=output)
    assert done.returncode == 0, done.stderr
    for n, base in enumerate(bases):
        model, every, one = holding_together.alone(base, output / str(n))
        for rank in range(number):
            own = output / str(n) / str(rank)
            several, single = torch.load(own / "trained.pt")
            same_training(several, single, every, one)
            shared_out(json.loads((own / "found.json").read_text()), model, number)


def same_training(several, single, every, one):
    """Adapters that were dealt out whole have the very bits; records that were dealt out make sums
    in another order.
    """
    assert several[0].keys() == every[0].keys()
    assert [k for k, tensor in every[0].items() if not torch.equal(several[0][k], tensor)] == []
    assert several[1] == every[1]
    apart = {key: (single[0][key] - tensor).abs().max().item() for key, tensor in one[0].items()}
    assert max(apart.values()) < 1e-5, apart
    for key, losses in one[1].items():
        assert single[1][key]["plain"] == pytest.approx(losses["plain"], rel=1e-5)


def shared_out(found, model, number):
    """Every process has its share of what is spread, between the passes, and the same adapters."""
    assert found["alike"] and found["spread_again"]
    tied = model.config.tie_word_embeddings
    whole = [model.model.norm.weight, *([model.lm_head.weight] if tied else [])]
    total = sum(4 * p.numel() for p in model.parameters())
    everywhere = sum(4 * p.numel() for p in whole)
    assert found["own_bytes"] <= (total - everywhere) / number * 1.06 + everywhere
    assert found["own_bytes"] >= (total - everywhere) / number * 0.94 + everywhere


def test_two_processes_train_as_one(untied, tmp_path):
    check(2, [untied, "embedded"], tmp_path)


@pytest.mark.slow
def test_four_processes_train_as_one(untied, tmp_path):
    check(4, [untied, "embedded"], tmp_path)


def work(*sizes):
    """A trainee with one micro-batch of records of so many tokens."""
    return [[Example([1] * n, [1] * n, row=row) for row, n in enumerate(sizes)]]


def rows(share):
    return [[[e.row for e in block] for block in batches] for batches in share]


def test_adapters_go_whole_to_whoever_has_the_least():
    shares = whole_adapters([work(3), work(9), work(2, 2), work(4)], 2)
    assert [rows(s) for s in shares] == [
        [[[]], [[0]], [[]], [[]]],
        [[[0]], [[]], [[0, 1]], [[0]]],
    ]


def test_every_record_of_every_micro_batch_is_dealt_once():
    shares = dealt_records([work(5, 1, 1, 1), work(2)], 3)
    assert [rows(s) for s in shares] == [
        [[[0]], [[]]],
        [[[1, 3]], [[]]],
        [[[2]], [[0]]],
    ]


def test_processes_without_records_are_told_of():
    model = load_model("embedded", device="cpu")
    settings = {n: lorica.TrainSettings(batch_size=n) for n in (2, 3)}
    trainees = [
        Trainee(lorica.attach(model, lorica.LoRA(r=1), name=f"of{n}"), own, 4)
        for n, own in settings.items()
    ]
    three = Processes(0, 3, torch.device("cpu"))
    (note,) = Divided(three, whole=False).notes(trainees)
    assert "batch_size of of2 is below the number of processes (3)" in note
    assert Divided(three, whole=True).notes(trainees) == []
    assert Divided(three, whole=False).notes(trainees[1:]) == []
