"""`eval`, `chat`, `merge` and `report` on runs, adapters and bases."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

from lorica.attach.activate import activate
from lorica.base.load import load_model
from lorica.cli import judge, main
from lorica.cli.dialogue import Dialogue, Sampling
from lorica.cli.material import FACTS
from lorica.cli.opening import open_subject
from lorica.data.facts import facts
from lorica.files.adapter import load_adapter


def test_eval_of_a_run(lorica, finished_run, stock):
    done = lorica("eval", finished_run, "--data", stock / "other.jsonl", "--output", "said.jsonl")
    assert done.code == 0, done.err
    head, titles, *rows = done.out.splitlines()
    assert head.endswith("in chrF")
    assert titles.split()[:3] == ["metric", "base", "tuned"]
    assert len(rows) == 5 and len({len(row) for row in [titles, *rows]}) == 1, "columns align"
    said = [json.loads(line) for line in Path("said.jsonl").read_text().splitlines()]
    assert len(said) == 12 and {"record", "output", "references", "nll"} == said[0].keys()
    assert "data: " in done.err


def test_an_interrupted_eval_says_so(lorica, stock, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(judge, "predictions", interrupted)
    done = lorica("eval", stock / "llama", "--data", stock / "other.jsonl")
    assert done.code == 130 and done.err.endswith("lorica: stopped\n")


def test_prompts_that_are_cut_for_their_answer_are_told(lorica, finished_run, stock):
    """The base has 96 positions; half of them are the answer's at most."""
    row = {"prompt": "cat red 1 " * 30, "completion": "x"}
    Path("long.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "prompt": "cat"}))
    done = lorica("eval", finished_run, "--data", "long.jsonl", "--max-new-tokens", "60")
    assert done.code == 0, done.err
    assert done.err.count("1 of 2 prompts lose their beginning") == 1


def test_eval_speaks_json(lorica, finished_run, stock):
    words = ["--data", stock / "other.jsonl", "--metrics", "perplexity, exact_match"]
    done = lorica("eval", finished_run / "adapter", *words, "--limit", "5", "--json")
    assert done.code == 0 and done.err == ""
    (found,) = done.rows
    assert found["num_records"] == 5 and list(found["scores"]) == ["perplexity", "exact_match"]
    assert found["scores"]["perplexity"]["tuned"] < found["scores"]["perplexity"]["base"]


def test_eval_on_the_embedded_records(lorica):
    """Those that a run with `--data embedded` is scored on."""
    few = ["--limit", "3", "--max-new-tokens", "2", "--metrics", "loss"]
    done = lorica("eval", "embedded", "--data", "embedded", *few, "--output", "said.jsonl")
    assert done.code == 0 and "embedded facts, test" in done.err, done.err
    asked = [json.loads(line)["record"] for line in Path("said.jsonl").read_text().splitlines()]
    test = facts("test", num_records=FACTS["test"])
    prompts = {row["prompt"] for row in test}
    assert len(asked) == 3 and all(record["prompt"] in prompts for record in asked)
    mapped = lorica("eval", "embedded", "--data", "embedded", "--format", "chat")
    assert mapped.code == 2 and "the embedded records take no format" in mapped.err


def test_eval_of_a_base(lorica, stock):
    words = ["--data", stock / "other.jsonl", "--metrics", "perplexity"]
    done = lorica("eval", stock / "llama", *words)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0].split() == ["metric", "score", "95", "%", "interval", "records"]
    few = ["--limit", "4", "--max-new-tokens", "4", "--json"]
    seq2seq = lorica("eval", stock / "t5", "--data", stock / "seq2seq.jsonl", *few)
    assert seq2seq.code == 0 and "chrf" in seq2seq.rows[0]["scores"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--metrics", "bluu"], "bleu"),
        (["--task", "causal"], "did you mean causal-lm?"),
        (["--model", "x"], "--model goes with an adapter"),
        (["--format", "classification"], "the columns do not say"),
    ],
)
def test_eval_refuses(lorica, stock, words, said):
    done = lorica("eval", stock / "llama", "--data", stock / "other.jsonl", *words)
    assert done.code == 2 and said in done.err


SHORT = ["--max-steps", "4", "--batch-size", "8", "--learning-rate", "1e-2", "--r", "2"]


@pytest.fixture(scope="module")
def classifying_run(stock, tmp_path_factory):
    """A run on classes that is only read."""
    folder = tmp_path_factory.mktemp("runs") / "classes"
    words = ["train", "--model", stock / "bert", "--data", stock / "classes.csv", *SHORT]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in [*words, "--output-dir", folder, "--quiet"]])
    assert ended.value.code == 0
    return folder


def test_eval_on_records_of_one_class(lorica, classifying_run, stock):
    """The run knows its classes; the records need not show them all."""
    lines = (stock / "classes.csv").read_text().splitlines()
    kept = [line for line in lines[1:] if line.endswith(",cat")]
    Path("cats.csv").write_text("\n".join([lines[0], *kept]))
    done = lorica("eval", classifying_run, "--data", "cats.csv", "--json")
    assert done.code == 0, done.err
    assert done.rows[0]["num_records"] == len(kept)
    bare = lorica("eval", stock / "bert", "--data", "cats.csv")
    assert bare.code == 2 and "the same label 'cat'" in bare.err


def test_eval_and_train_agree_on_a_base_with_classes_in_its_own_order(
    lorica, classifying_run, stock
):
    """Data sorts its classes by name; a base that has them the other way round is scored alike."""
    assert lorica("merge", classifying_run, "--output-dir", "base").code == 0
    config = json.loads(Path("base/config.json").read_text())
    config |= {"id2label": {"0": "Other", "1": "Cat"}, "label2id": {"Other": 0, "Cat": 1}}
    Path("base/config.json").write_text(json.dumps(config))
    data = ["--data", shutil.copy(stock / "classes.csv", "test.csv")]
    more = ["--test-data", "test.csv", "--eval-records", "64", "--metrics", "accuracy"]
    words = ["--model", "base", "--data", stock / "classes.csv"]
    trained = lorica("train", *words, *SHORT, *more, "--output-dir", "run")
    assert trained.code == 0, trained.err
    scores = json.loads(Path("run/run.json").read_text())["scores"]["accuracy"]
    alone = lorica("eval", "base", *data, "--json", "--metrics", "accuracy")
    assert alone.rows[0]["scores"]["accuracy"]["value"] == scores["base"]
    assert "the classes keep the order of the model: other, cat" in trained.out


def test_a_run_with_relative_paths_is_good_from_everywhere(lorica, stock, monkeypatch, tmp_path):
    shutil.copytree(stock / "llama", "base")
    shutil.copy(stock / "pairs.jsonl", "pairs.jsonl")
    words = ["--model", "base", "--data", "pairs.jsonl#40", *SHORT, "--max-new-tokens", "4"]
    run = tmp_path / "run"
    assert lorica("train", *words, "--output-dir", run, "--eval-records", "4").code == 0
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert lorica("chat", run, "--prompt", "cat red 1", "--max-new-tokens", "2").code == 0
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**state, "status": "interrupted"}))
    again = lorica("train", "--resume", run)
    assert again.code == 0, again.err
    shutil.move(tmp_path / "base", tmp_path / "moved")
    gone = lorica("chat", run, "--prompt", "cat red 1")
    assert gone.code == 2 and "which cannot be loaded" in gone.err and "--model" in gone.err
    found = lorica("chat", run, "--prompt", "cat", "--model", "../moved", "--max-new-tokens", "2")
    assert found.code == 0


def test_a_base_recorded_by_a_relative_path_is_told_as_such(lorica, finished_run):
    shutil.copytree(finished_run / "adapter", "adapter")
    facts = json.loads(Path("adapter/lorica.json").read_text())
    facts["base"]["name"] = "bases/llama"
    Path("adapter/lorica.json").write_text(json.dumps(facts))
    told = lorica("chat", "adapter", "--prompt", "cat")
    assert told.code == 2 and "a path relative to where it was trained" in told.err


def test_a_model_is_asked_alike_bare_merged_and_with_its_adapter(lorica, finished_run, stock):
    """What parts prompt and completion is part of the question: here a line break."""
    data = ["--data", stock / "other.jsonl", "--metrics", "loss", "--json"]
    beside = lorica("eval", finished_run, *data).rows[0]["scores"]["loss"]
    bare = lorica("eval", stock / "llama", *data).rows[0]["scores"]["loss"]
    assert bare["value"] == pytest.approx(beside["base"], rel=1e-6)
    said = lorica("eval", stock / "llama", *data[:-1])
    assert "separator: '\\n', as in a training on these records" in said.err
    assert lorica("merge", finished_run, "--output-dir", "merged").code == 0
    merged = lorica("eval", "merged", *data).rows[0]["scores"]["loss"]
    assert merged["value"] == pytest.approx(beside["tuned"], rel=1e-4)
    opened = open_subject("merged")
    own = open_subject(str(finished_run))
    assert opened.task.facts() == own.task.facts() and own.task.facts()["separator"] == "\n"
    assert (opened.format, own.format) == ("prompt", "prompt")


def test_a_merged_chat_model_keeps_template_and_system(lorica, stock):
    words = ["--model", stock / "llama", "--data", stock / "chat.jsonl", "--system", "be brief"]
    more = ["--eval-records", "2", "--max-new-tokens", "2", "--output-dir", "run"]
    assert lorica("train", *words, *SHORT, *more).code == 0
    assert lorica("merge", "run", "--output-dir", "merged").code == 0
    opened, own = open_subject("merged"), open_subject("run")
    assert (opened.format, opened.system) == (own.format, own.system) == ("chat", "be brief")
    asked = {"messages": [{"role": "user", "content": "cat red 1"}]}
    assert opened.task.encoder.prompt_ids(asked) == own.task.encoder.prompt_ids(asked)


def test_another_base_is_told_as_such(lorica, finished_run, stock):
    """Not by what else it lacks, such as the end token of the training."""
    facts = json.loads((finished_run / "adapter" / "lorica.json").read_text())
    shutil.copytree(finished_run / "adapter", "adapter")
    Path("adapter/lorica.json").write_text(
        json.dumps({**facts, "task": {**facts["task"], "eos_token": "<end>"}})
    )
    words = ["eval", "adapter", "--data", stock / "other.jsonl", "--model"]
    for other in ("bert", "t5"):
        told = lorica(*words, stock / other)
        assert told.code == 2 and "was made for another base than" in told.err, told.err
        assert str(stock / "llama") in told.err
    assert "no token '<end>'" in lorica(*words, stock / "llama").err


def test_chat_by_prompt(lorica, finished_run, stock):
    words = ["--prompt", "cat red 1", "--max-new-tokens", "5"]
    tuned, base = lorica("chat", finished_run, *words), lorica("chat", stock / "llama", *words)
    assert tuned.code == base.code == 0
    assert tuned.out.strip() and tuned.out != base.out
    assert tuned.err == "", "nothing but the answer"
    sampled = ["--temperature", "0.9", "--top-p", "0.9", "--seed", "3"]
    first, again = (lorica("chat", finished_run, *words, *sampled).out for _ in range(2))
    assert first == again
    assert lorica("chat", finished_run, *words, "--top-p", "0.5").code == 2
    assert lorica("chat", finished_run, *words, "--system", "x").code == 2
    assert lorica("chat", stock / "t5", *words, "--turns").code == 2
    assert lorica("chat", stock / "llama", "--prompt", "", "--max-new-tokens", "2").code == 0


def test_chat_asks_a_seq2seq_model_as_its_training_did(lorica, stock, monkeypatch):
    """With the end token, and cut to max_length."""
    opened = open_subject(str(stock / "t5"))
    given = []
    monkeypatch.setattr(opened.model, "generate", lambda **how: given.append(how["input_ids"]))
    Dialogue(opened, Sampling(4)).answer("cat red 1", io.StringIO())
    record = {"source": "cat red 1", "target": "x"}
    assert given[0].tolist() == [opened.task.encode([record])[0].input_ids]


def test_chat_by_standard_input(lorica, finished_run, monkeypatch):
    lines = "cat red 1\n/base\ncat red 1\n/tuned\ncat red 1\n/tunde\n/clear\n\n/quit\ndog\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    done = lorica("chat", finished_run, "--max-new-tokens", "5")
    assert done.code == 0
    tuned, base, again, rest = done.out.split("\n")
    assert tuned == again != base and rest == ""
    assert "the base answers" in done.err and "did you mean /tuned?" in done.err


def test_chat_remembers_turns(lorica, stock, monkeypatch):
    asked = []
    real = Dialogue._generate

    def generate(self, record, stream):
        asked.append(len(record["messages"]))
        return real(self, record, stream)

    monkeypatch.setattr(Dialogue, "_generate", generate)
    monkeypatch.setattr(sys, "stdin", io.StringIO("cat\ncat\n/clear\ncat\n"))
    done = lorica("chat", stock / "chatty", "--max-new-tokens", "6", "--system", "be brief")
    assert done.code == 0, done.err
    assert asked == [2, 4, 2], "messages of every question"


def test_chat_with_a_classifier(lorica, stock):
    done = lorica("chat", stock / "bert", "--prompt", "The red cat")
    assert done.code == 0 and done.out.strip() in ("LABEL_0", "LABEL_1")


def test_merge_loads_in_plain_transformers(lorica, finished_run, stock):
    done = lorica("merge", finished_run, "--output-dir", "merged")
    assert done.code == 0, done.err
    assert "merged into 14 weights" in done.out and done.err == ""
    assert "AutoModelForCausalLM.from_pretrained('merged')" in done.out
    assert len(json.loads(Path("merged/merge_report.json").read_text())["merged"]) == 14
    merged = hf.AutoModelForCausalLM.from_pretrained("merged").eval()
    tokens = hf.AutoTokenizer.from_pretrained("merged")("cat red 1", return_tensors="pt")
    tuned = load_model(stock / "llama", dtype="float32")
    adapter = load_adapter(tuned, finished_run / "adapter")
    with torch.no_grad():
        with activate(tuned, None):
            base = tuned(**tokens).logits
        with activate(tuned, adapter):
            wanted = tuned(**tokens).logits
        got = merged(**tokens).logits
    assert torch.allclose(got, wanted, atol=1e-5) and not torch.allclose(base, wanted, atol=1e-4)
    again = lorica("merge", finished_run, "--output-dir", "merged", "--json")
    assert again.code == 2 and "--overwrite" in again.err
    half = lorica("merge", finished_run, "--output-dir", "merged", "--json", "--overwrite",
                  "--weight", "0.5")  # fmt: skip
    assert half.code == 0 and half.rows[0]["weights"] == {"default": 0.5}


def test_merge_needs_an_adapter(lorica, stock):
    done = lorica("merge", stock / "llama", "--output-dir", "merged")
    assert done.code == 2 and "neither a run nor an adapter folder" in done.err
    assert not Path("merged").exists()


def test_report(lorica, finished_run):
    done = lorica("report", finished_run, "--output", "page.html")
    assert done.code == 0 and done.out == "page.html\n"
    assert "base" in Path("page.html").read_text(encoding="utf-8")
    missing = lorica("report", "nowhere")
    assert missing.code == 2 and "not a run folder" in missing.err
