"""`lorica train`: from flags, from YAML, for every task; what it says and what it leaves."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer


def manifest(folder) -> dict:
    return json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))


def texts(folder) -> list[str]:
    lines = (Path(folder) / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_from_flags_alone(lorica, stock, quick):
    done = lorica(
        "train", "--model", stock / "llama", "--data", stock / "pairs.jsonl", *quick,
        "--output-dir", "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.err == ""
    found = manifest("run")
    assert found["status"] == "finished"
    assert list(found["scores"])[:2] == ["chrf", "bleu"]
    assert {p.name for p in Path("run").iterdir()} == {
        ".lock", "adapter", "checkpoints", "config.yaml", "events.jsonl", "metrics.jsonl",
        "report.html", "run.json", "samples.jsonl",
    }  # fmt: skip
    files = {p.name for p in Path("run/adapter").iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "README.md",
    } <= files
    config = Path("run/config.yaml").read_text(encoding="utf-8")
    assert "# --max-steps" in config and "# default" in config
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 4
    lines = done.out.splitlines()
    assert lines[0].startswith("data: ") and "64 rows" in lines[0]
    assert "56 of 64 records train; 8 are held out" in lines[1]
    assert any("[The " in line and "</s>]" in line for line in lines), (
        "what is trained is not shown"
    )
    assert lines[-3] == "next     lorica chat run"
    assert sum("64 rows" in line for line in lines) == 1, "what was read is told once"
    order = [
        "data: ",
        "base: ",
        "targets: ",
        "adapter: ",
        "encoded: ",
        "scoring the base",
        "step 1",
    ]
    told = "by whose loss the adapter that was kept is chosen too"
    assert sum(told in line for line in lines) == 1
    for page in ("run/report.html", "run/adapter/README.md"):
        assert "by whose loss the adapter" in Path(page).read_text(encoding="utf-8"), page
    places = [next(i for i, line in enumerate(lines) if line.startswith(w)) for w in order]
    assert places == sorted(places)
    assert [t for t in texts("run") if t.startswith("targets: ")]


def test_settings_file_and_flags_over_it(lorica, stock, quick):
    lines = [f"model: {stock / 'llama'}", f"data: {stock / 'pairs.jsonl'}", "r: 4", "lora_rank: 4"]
    Path("run.yaml").write_text("\n".join(lines[:3]), encoding="utf-8")
    shown = lorica("train", "run.yaml", "--dry-run", "--r", "3", "learning_rate=1e-3")
    assert shown.code == 0, shown.err
    assert "r: 3                                          # --r" in shown.out
    assert "learning_rate: 0.001" in shown.out and "# --learning-rate" in shown.out
    assert "# run.yaml:1" in shown.out
    assert [p.name for p in Path().iterdir()] == ["run.yaml"], "a dry run writes nothing"
    done = lorica("train", *quick, "run.yaml", "--output-dir", "run", "--quiet")
    assert done.code == 0, done.err
    assert manifest("run")["method"]["r"] == 2
    said = [line for line in done.out.splitlines() if not line.startswith("warning: ")]
    assert len(said) == 5 and "chrF" in done.out, "quiet: warnings and the scores alone"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lerning-rate", "1"], "did you mean learning_rate?"),
        (["--dryrun"], "did you mean --dry-run?"),
        (["--r", "0", "--dtype", "float23"], "did you mean float32?"),
        (["--target-modules", "q_porj"], "q_proj"),
        (["--metrics", "bluu"], "bleu"),
        (["--data", "nothere.jsonl"], "nothere.jsonl"),
        (["--chat-template", "none.jinja"], "chat_template has no effect on prompt records"),
        (["--system", "be kind"], "system has no effect"),
        (["--task", "text-classification"], "set --task causal-lm"),
        (["--columns", "prompt=nothing,completion=completion"], "nothing"),
        (["stray"], "neither a flag nor a settings file"),
        (["--replace=1"], "--replace"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(lorica, stock, quick, words, said):
    known = {word for word in words if word.startswith("--")}
    base = {"--model": stock / "llama", "--data": stock / "pairs.jsonl", "--output-dir": "run"}
    rest = [word for flag, value in base.items() if flag not in known for word in (flag, value)]
    kept = [
        w
        for pair in zip(quick[::2], quick[1::2], strict=True)
        if pair[0] not in known
        for w in pair
    ]
    done = lorica("train", *rest, *kept, *words)
    assert done.code == 2
    assert said in done.err and done.err.startswith("lorica: ")
    assert "Traceback" not in done.err
    assert not Path("run").exists()


def test_all_problems_of_a_command_line_at_once(lorica):
    done = lorica("train", "--model", "m", "-r", "16", "--nonsense", "1", "--r", "a", "--seed")
    assert done.code == 2
    assert "-r is no flag; did you mean --r?" in done.err and "--seed needs a value" in done.err


def test_a_folder_with_a_run_is_spared(lorica, stock, quick, finished_run):
    words = ["train", "--model", stock / "llama", "--data", stock / "pairs.jsonl", *quick]
    first = lorica(*words, "--output-dir", "run", "--quiet")
    before = Path("run/run.json").read_bytes()
    again = lorica(*words, "--output-dir", "run")
    assert (first.code, again.code) == (0, 2)
    assert "--resume run" in again.err and "--replace" in again.err
    wrong = lorica(*words, "--output-dir", "run", "--replace", "--target-modules", "nothing")
    assert wrong.code == 2
    assert Path("run/run.json").read_bytes() == before, "thrown away for a run that cannot begin"
    done = lorica(*words, "--output-dir", "run", "--replace", "--quiet", "--seed", "3")
    assert done.code == 0 and manifest("run")["seed"] == 3
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("mine")
    assert lorica(*words, "--output-dir", "full", "--replace").code == 2
    assert Path("full/thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("place", ["first", "last"])
def test_json_is_clean(lorica, stock, quick, place):
    words = ["--model", stock / "llama", "--data", stock / "pairs.jsonl", *quick]
    words = ["--json", *words] if place == "first" else [*words, "--json"]
    done = lorica("train", *words, "--output-dir", "run", "--no-keep-best", "--packing", "false")
    assert done.code == 0 and done.err == ""
    kinds = [row["type"] for row in done.rows]
    assert kinds.index("start") < kinds.index("step") and kinds[-1] == "finish"
    assert done.rows[-1]["summary"]["status"] == "finished"
    config = Path("run/config.yaml").read_text(encoding="utf-8")
    assert "keep_best: false" in config and "packing: false" in config


def test_classification(lorica, stock, quick):
    done = lorica(
        "train", "--model", stock / "bert", "--data", stock / "classes.csv", *quick,
        "--output-dir", "run",
    )  # fmt: skip
    assert done.code == 2 and "max_new_tokens has no effect" in done.err
    words = [*quick]
    del words[words.index("--max-new-tokens") : words.index("--max-new-tokens") + 2]
    done = lorica(
        "train", "--model", stock / "bert", "--data", stock / "classes.csv", *words,
        "--output-dir", "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = manifest("run")
    assert found["task"] == "text-classification" and found["labels"] == ["cat", "other"]
    assert found["method"]["modules_to_save"] == ["classifier"]
    chance = "untrained classification head, so its scores are those of chance"
    assert chance in done.out and any(chance in text for text in texts("run"))
    assert "# rule: the base has no weights for it" in Path("run/config.yaml").read_text()
    assert "trained" not in next(x for x in done.out.splitlines() if x.startswith("encoded"))
    sample = json.loads(Path("run/samples.jsonl").read_text().splitlines()[0])
    assert sample["after"] in ("cat", "other")
    alone = lorica("eval", stock / "bert", "--data", stock / "classes.csv", "--limit", "8")
    assert alone.code == 0 and "warning: the base has a new, untrained" in alone.err


def test_seq2seq(lorica, stock, quick):
    done = lorica(
        "train", "--model", stock / "t5", "--data", stock / "seq2seq.jsonl", *quick,
        "--output-dir", "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert manifest("run")["task"] == "seq2seq"
    assert "of source and" in done.out
    tuned = lorica("chat", "run", "--prompt", "cat red 1", "--max-new-tokens", "4")
    assert tuned.code == 0, tuned.err


def test_text(lorica, stock):
    done = lorica(
        "train", "--model", stock / "llama", "--data", stock / "text.txt", "--output-dir", "run",
        "--max-steps", "2", "--eval-size", "8", "--learning-rate", "1e-2",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert list(manifest("run")["scores"]) == ["perplexity"]
    assert Path("run/samples.jsonl").read_bytes() == b""


@pytest.mark.parametrize("base", ["chatty", "llama"])
def test_chat_takes_its_template_along(lorica, stock, quick, base):
    done = lorica(
        "train", "--model", stock / base, "--data", stock / "chat.jsonl", *quick,
        "--output-dir", "run", "--system", "be brief",
    )  # fmt: skip
    assert done.code == 0, done.err
    shown = next(line for line in done.out.splitlines() if line.startswith("the first of them"))
    assert "be brief" in shown
    template = AutoTokenizer.from_pretrained("run/adapter").chat_template
    assert ("<{{ m['role'] }}>" in template) is (base == "chatty")
    assert ("no chat template" in done.out) is (base == "llama")
    answer = lorica("chat", "run", "--prompt", "cat red 1", "--max-new-tokens", "4")
    assert answer.code == 0, answer.err


def test_chat_template_from_a_file(lorica, stock, quick):
    Path("turns.jinja").write_text(
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
        "{{ '</s>' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    done = lorica(
        "train", "--model", stock / "chatty", "--data", stock / "chat.jsonl", *quick,
        "--output-dir", "run", "--chat-template", "turns.jinja", "--num-samples", "0",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "[user] " in done.out
    assert "[{{ m['role'] }}]" in AutoTokenizer.from_pretrained("run/adapter").chat_template


def test_folder_with_splits(lorica, stock, quick):
    words = [*quick]
    del words[words.index("--eval-size") : words.index("--eval-size") + 2]
    done = lorica(
        "train", "--model", stock / "llama", "--data", stock / "split", *words,
        "--output-dir", "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert [line.split(":")[0] for line in lines[:4]] == [
        "training data", "evaluation data", "scoring data", "all of them",
    ]  # fmt: skip
    assert "12 rows" in lines[1] and "prompt" in lines[3] and "prompt" not in lines[1]
    assert "drawn with seed 0" in done.out
    assert manifest("run")["data"]["test"]["num_records"] == 6


def test_nothing_held_out(lorica, stock):
    done = lorica(
        "train", "--model", stock / "llama", "--data", stock / "pairs.jsonl", "--max-steps", "2",
        "--eval-size", "0", "--output-dir", "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "base and tuned will not be compared" in done.out
    assert manifest("run")["scores"] == {}
    assert "input " not in done.out


def test_long_records_are_cut_to_the_positions_of_the_base(lorica, stock):
    long = {"prompt": "cat " * 200, "completion": "The red cat"}
    rows = [long, *({"prompt": f"dog {i}", "completion": f"The dog {i}"} for i in range(9))]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = lorica(
        "train", "--model", stock / "llama", "--data", "long.jsonl", "--max-steps", "2",
        "--eval-size", "3", "--output-dir", "run", "--max-new-tokens", "4",
    )  # fmt: skip
    assert done.code == 0, done.err
    config = Path("run/config.yaml").read_text(encoding="utf-8")
    assert "max_length: 96" in config and "# rule: the positions of the base" in config


@pytest.mark.parametrize("words", [["--test-data", "other.jsonl"], ["--no-keep-best"]])
def test_scores_that_chose_nothing_are_not_doubted(lorica, stock, quick, words):
    data = ["--model", stock / "llama", "--data", stock / "pairs.jsonl"]
    words = [str(stock / word) if word.endswith("jsonl") else word for word in words]
    done = lorica("train", *data, *quick, *words, "--output-dir", "run")
    assert done.code == 0, done.err
    assert "is chosen too" not in done.out
    assert "is chosen too" not in Path("run/report.html").read_text(encoding="utf-8")
