"""Several adapters at once from the command line: what acts, and what is refused, and why."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import lorica as library
from lorica.attach.activate import Stack, activate
from lorica.cli.opening import open_subject
from lorica.data.read import read
from lorica.methods import Bottleneck, LoRA, PrefixTuning, Selective


@pytest.fixture(scope="module")
def folders(stock, tmp_path_factory):
    """Adapters of one base that do something, by name."""
    root = tmp_path_factory.mktemp("adapters")
    methods = {
        "one": Bottleneck(reduction_factor=6),
        "two": Bottleneck(reduction_factor=9),
        "lora": LoRA(r=2),
        "prefix": PrefixTuning(num_virtual_tokens=2),
        "third": PrefixTuning(num_virtual_tokens=3),
        "head": Selective(parameters="head"),
        "heady": LoRA(r=2, modules_to_save=("lm_head",)),
    }
    for number, (name, method) in enumerate(methods.items()):
        model = library.load_model(str(stock / "llama"), task="causal-lm")
        adapter = library.attach(model, method, name=name)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for tensor in adapter.parameters():
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.2)
        library.save_adapter(adapter, root / name)
    return root


def nll(stock, folders, mixture, subject, other) -> float:
    """Of all records, with a mixture of both that the library was given."""
    records = read(str(stock / "other.jsonl"))
    opened = open_subject(str(folders / subject), records=records)
    below = library.load_adapter(opened.model, folders / other, name="other")
    with activate(opened.model, mixture(opened.adapter, below)):
        found = opened.task.predict(opened.model, records.rows, generate=False)
    return sum(p.nll for p in found) / sum(p.num_tokens for p in found)


def loss_of(done) -> float:
    assert done.code == 0, done.err
    return json.loads(done.out)["scores"]["loss"]["tuned"]


def test_eval_of_a_stack_and_of_an_average_are_those_of_the_library(lorica, stock, folders):
    words = ["--data", stock / "other.jsonl", "--metrics", "loss", "--json"]
    first = ["eval", folders / "two", *words]
    stacked = loss_of(lorica(*first, "--stack-on", folders / "one"))
    shares = ["--average-with", folders / "one", "--weights", "0.7,0.3"]
    averaged = loss_of(lorica(*first, *shares))
    alone = loss_of(lorica(*first))
    assert len({round(x, 3) for x in (stacked, averaged, alone)}) == 3
    assert stacked == pytest.approx(
        nll(stock, folders, lambda a, b: Stack(b, a), "two", "one"), rel=1e-5
    )
    mean = nll(stock, folders, lambda a, b: {a: 0.7, b: 0.3}, "two", "one")
    assert averaged == pytest.approx(mean, rel=1e-5)


def test_eval_says_what_acts(lorica, stock, folders):
    words = ["--data", stock / "pairs.jsonl", "--metrics", "loss", "--limit", "4"]
    done = lorica("eval", folders / "lora", *words, "--stack-on", folders / "one")
    assert f"{folders / 'one'} -> {folders / 'lora'}, one after the other" in done.err
    done = lorica("eval", folders / "lora", *words, "--average-with", folders / "one")
    assert f"0.5 x {folders / 'lora'} + 0.5 x {folders / 'one'}" in done.err


def test_chat_answers_with_a_stack(lorica, folders):
    words = ["chat", folders / "two", "--prompt", "cat red 7", "--max-new-tokens", "8"]
    alone, stacked = lorica(*words), lorica(*words, "--stack-on", folders / "one")
    assert alone.code == stacked.code == 0, stacked.err
    assert alone.out != stacked.out


@pytest.mark.parametrize(
    ("first", "words", "said"),
    [
        ("one", ["--weights", "1"], "--weights has no effect without --average-with"),
        ("one", ["--stack-on", "one"], "one is named twice"),
        ("one", ["--stack-on", "two", "--average-with", "lora"], "not both"),
        ("one", ["--average-with", "two", "--weights", "1,1"], "the weights sum to 2"),
        ("one", ["--average-with", "two", "--weights", "1"], "1 weights for 2 adapters"),
        ("one", ["--stack-on", "nothing"], "neither a run nor an adapter folder"),
        ("third", ["--stack-on", "prefix"], "virtual tokens, which stand before a row once"),
        ("one", ["--average-with", "prefix"], "no share in an average"),
        ("heady", ["--stack-on", "head"], "both hold lm_head whole"),
        ("llama", ["--stack-on", "one"], "is a base: other adapters go with an adapter"),
    ],
)
def test_what_cannot_act_together_is_refused(lorica, stock, folders, first, words, said):
    subject = stock / first if first == "llama" else folders / first
    given = [folders / word if (folders / word).is_dir() else word for word in words]
    data = ["--data", stock / "pairs.jsonl", "--metrics", "loss"]
    done = lorica("eval", subject, *data, *given)
    assert done.code == 2 and said in " ".join(done.err.split()), done.err


def test_an_adapter_of_another_base_is_refused(lorica, stock, folders, tmp_path):
    other: Any = library.load_model(str(stock / "llama"), task="causal-lm")
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(0.01)
    other.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(stock / "llama").save_pretrained(tmp_path / "base")
    model = library.load_model(str(tmp_path / "base"), task="causal-lm")
    library.save_adapter(library.attach(model, LoRA(r=2)), tmp_path / "far")
    data = ["--data", stock / "pairs.jsonl", "--metrics", "loss"]
    done = lorica("eval", folders / "one", *data, "--stack-on", tmp_path / "far")
    assert done.code == 2 and "was made for another base" in done.err
