"""`lorica check`, `lorica clean`, and the checks that every training begins with."""

import json
import random
from pathlib import Path

from cli.conftest import pairs, write_rows


def different(number: int) -> list[dict]:
    """Rows without any likeness that a check could name."""
    rng = random.Random(5)
    letters = "abcdefghijklmnopqrstuvwxyz "
    words = lambda: "".join(rng.choice(letters) for _ in range(50)).strip() + "."  # noqa: E731
    return [{"prompt": words() + "\n", "completion": words()} for _ in range(number)]


def without(flags: list[str], name: str) -> list[str]:
    place = flags.index(name)
    return [*flags[:place], *flags[place + 2 :]]


def test_sound_records(lorica, stock):
    write_rows(Path("a.jsonl"), different(40))
    done = lorica("check", "a.jsonl", "--model", stock / "llama", "--no-language")
    assert done.code == 0, done.err
    assert "nothing stands against training" in lorica("check", "a.jsonl", "--no-language").out
    warned = [line for line in done.out.splitlines() if line.startswith("!")]
    assert len(warned) == 1 and "[wrong-tokenizer]" in warned[0]  # it knows seven words
    assert "trained; 0 of 40 examples cut" in done.out
    assert "p50" in done.out and "█" in done.out
    assert "[no-bos]" in done.out


def test_json_has_what_the_page_says_and_the_page_is_written(lorica, stock):
    rows = [*different(30), different(30)[0]]
    write_rows(Path("a.jsonl"), rows)
    words = ("check", "a.jsonl", "--model", stock / "llama", "--max-length", "80", "--json")
    done = lorica(*words, "--html", "page.html")
    (found,) = done.rows
    assert found["num_records"] == 31 and found["format"] == "prompt"
    assert found["tokens"]["num_cut"] > 0 and 0 < found["tokens"]["trained_share"] < 1
    codes = {f["code"]: f for f in found["findings"]}
    assert codes["repeated-rows"]["where"][0].startswith("a.jsonl:31")
    assert codes["cut"]["count"] == found["tokens"]["num_cut"]
    assert found["example"][-1] == [rows[0]["completion"] + "</s>", True]
    page = Path("page.html").read_text(encoding="utf-8")
    assert "a.jsonl" in page and codes["repeated-rows"]["text"] in page and "<svg" in page


def test_refused_with_exit_3_and_a_reason(lorica, stock):
    write_rows(Path("one.jsonl"), [{"text": r["prompt"], "label": "x"} for r in different(30)])
    done = lorica("check", "one.jsonl", "--model", stock / "bert")
    assert done.code == 3 and "every training record has the label 'x'" in done.err
    assert "✗ refuse" in done.out


def test_broken_rows_are_named_and_the_rest_is_looked_at(lorica, stock):
    lines = [json.dumps(row) for row in different(30)]
    lines[4] = '{"prompt": "no end'
    lines[9] = '{"prompt": "only this"}'
    Path("a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    done = lorica("check", "a.jsonl", "--model", stock / "llama")
    assert done.code == 3 and "[broken-rows]" in done.out
    assert "a.jsonl:5" in done.out and "a.jsonl:10" in done.out
    assert "28 examples" in done.out


def test_without_a_model_and_from_a_settings_file(lorica, stock):
    write_rows(Path("a.jsonl"), different(30))
    assert "length in tokens" not in lorica("check", "a.jsonl").out
    Path("run.yaml").write_text(
        f"model: {stock / 'llama'}\ndata: a.jsonl\nmax_length: 40\n", encoding="utf-8"
    )
    done = lorica("check", "run.yaml")
    assert "length in tokens" in done.out and "max_length 40 cuts" in done.out


def test_what_cannot_be_asked(lorica, stock):
    assert lorica("check").code == 2
    wrong = lorica("check", "a.jsonl", "--modle", "x")
    assert wrong.code == 2 and "did you mean model?" in wrong.err
    assert lorica("check", "nowhere.jsonl", "--model", stock / "llama").code == 2
    assert "lorica check" in lorica("check", "--help").out


def test_training_is_refused_before_it_begins(lorica, stock, quick):
    rows = [{"text": r["prompt"], "label": "x"} for r in different(40)]
    write_rows(Path("one.jsonl"), rows)
    words = ("train", "--model", stock / "bert", "--data", "one.jsonl", "--output-dir", "run")
    done = lorica(*words, *without(quick, "--max-new-tokens"))
    assert done.code == 3, done.err
    assert "nothing to tell apart" in done.err and not Path("run").exists()


def test_training_tells_of_leaks(lorica, stock, quick):
    rows = pairs(40)
    write_rows(Path("a.jsonl"), rows)
    write_rows(Path("eval.jsonl"), [rows[3], {"prompt": "unseen ", "completion": "yes it is"}])
    words = ["train", "--model", stock / "llama", "--data", "a.jsonl", "--eval-data", "eval.jsonl"]
    done = lorica(*words, *without(quick, "--eval-size"), "--output-dir", "run")
    assert done.code == 0, done.err
    assert "1 of 2 (50.0%) inputs of the evaluation are in the training data" in done.out
    events = [
        e
        for line in Path("run/events.jsonl").read_text(encoding="utf-8").splitlines()
        if "inputs of the evaluation" in (e := json.loads(line))["text"]
    ]
    assert events and {event["kind"] for event in events} == {"warning"}


def test_clean_writes_a_repaired_copy(lorica):
    rows = different(20)
    bad = [rows[2], {"prompt": "mail a@b.example.org ", "completion": "now"}]
    path = write_rows(Path("a.jsonl"), [*rows, *bad])
    raw = path.read_bytes()
    done = lorica("clean", "a.jsonl", "--output", "b.jsonl", "--redact", "--near")
    assert done.code == 0, done.err
    assert path.read_bytes() == raw
    written = [json.loads(line) for line in Path("b.jsonl").read_text().splitlines()]
    assert written == [*rows, {"prompt": "mail [EMAIL] ", "completion": "now"}]
    assert "21 of 22 rows written" in done.out and "1 row left out that repeat" in done.out
    again = lorica("clean", "a.jsonl", "--output", "b.jsonl")
    assert again.code == 2 and "b.jsonl exists" in again.err
    (found,) = lorica("clean", "a.jsonl", "--output", "b.jsonl", "--replace", "--json").rows
    assert found["read"] == 22 and found["written"] == 21
    assert {s["name"] for s in found["steps"]} == {"normalise", "exact"}


def test_clean_takes_the_evaluation_out(lorica):
    rows = different(20)
    write_rows(Path("a.jsonl"), rows)
    write_rows(Path("eval.jsonl"), rows[:3])
    lorica("clean", "a.jsonl", "--output", "b.jsonl", "--eval-data", "eval.jsonl")
    assert len(Path("b.jsonl").read_text().splitlines()) == 17
    none = lorica("clean", "eval.jsonl", "--output", "c.jsonl", "--eval-data", "a.jsonl")
    assert none.code == 2 and not Path("c.jsonl").exists()
