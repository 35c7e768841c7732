"""`lorica train`, `grid` and `inspect` on a pipeline, and a folder of pictures with captions."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

import tiny_pipelines as pipelines
from lorica.records.read import read_manifest
from train.runs import stop_after

TRAIN = ("train", "--dtype", "float32", "--r", 4, "--max-steps", 4, "--batch-size", 3)
DRAW = ("--num-inference-steps", 2, "--guidance-scale", 3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return pipelines.write("sd", tmp_path_factory.mktemp("base") / "sd")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i in range(8):
        numbers = rng.integers(0, 255, (18, 16, 3), dtype=np.uint8)
        Image.fromarray(numbers).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a cat" if i % 2 else "dog", encoding="utf-8")
    return folder


@pytest.fixture
def run(lorica, base, data, tmp_path):
    result = lorica(
        *TRAIN, "--model", base, "--data", data, "--output-dir", "run", "--num-samples", 2, *DRAW
    )
    assert result.code == 0, result.err
    return tmp_path / "run"


def tensors(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_from_end_to_end(lorica, base, run):
    manifest = read_manifest(run / "run.json")
    assert manifest["status"] == "finished" and manifest["task"] == "text-to-image"
    assert manifest["base"]["name"] == str(base)
    (score,) = manifest["scores"].values()
    assert score["base"] > 0 and score["num_records"] == 1
    samples = [json.loads(x) for x in (run / "samples.jsonl").read_text().splitlines()]
    for name in ("before", "after", "reference"):
        with Image.open(run / samples[0]["pictures"][name]) as picture:
            assert picture.size == (pipelines.SIDE, pipelines.SIDE)
    page = (run / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3 * len(samples)
    assert "mean squared error" in page
    about = lorica("inspect", run)
    assert about.code == 0 and "adapter default: lora" in about.out and str(base) in about.out


def test_a_stopped_run_goes_on_to_the_same_bits(lorica, base, data, run, tmp_path, monkeypatch):
    words = (*TRAIN, "--model", base, "--data", data, "--output-dir", "other", "--num-samples", 0)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, signal.SIGTERM)
        assert lorica(*words).code == 128 + signal.SIGTERM
    assert read_manifest(tmp_path / "other" / "run.json")["status"] == "interrupted"
    resumed = lorica("train", "--resume", "other")
    assert resumed.code == 0, resumed.err
    assert tensors(tmp_path / "other") == tensors(run)


def test_a_grid_is_the_same_file_each_time(lorica, base, run, tmp_path):
    shutil.copytree(run / "adapter", tmp_path / "second")
    words = ("grid", base, "--adapters", f"{run},second", "--weights", "0,1", "--dtype", "float32")
    words = (*words, "--prompt", "a cat", *DRAW)
    first = lorica(*words, "--output", "one.png", "--json")
    assert first.code == 0, first.err
    assert lorica(*words, "--output", "two.png").code == 0
    one = (tmp_path / "one.png").read_bytes()
    assert one == (tmp_path / "two.png").read_bytes()
    (facts,) = first.rows
    with Image.open(tmp_path / "one.png") as picture:
        assert list(picture.size) == facts["size"]
        cells = np.asarray(picture.convert("RGB"))
    left, top = facts["size"][0] - 200, facts["size"][1] - 200  # cells of 96 pixels and a gap of 4
    corners = [(top, left), (top, left + 100), (top + 100, left), (top + 100, left + 100)]
    at = [cells[y : y + 96, x : x + 96] for y, x in corners]
    assert np.array_equal(at[1], at[2])  # the same adapter, twice, with the weights exchanged
    assert not np.array_equal(at[0], at[1]) and not np.array_equal(at[1], at[3])


def test_what_a_grid_refuses(lorica, base, run, tmp_path):
    words = ("grid", base, "--prompt", "a cat", "--output", "g.png")
    three = lorica(*words, "--adapters", f"{run},{run},{run}")
    assert three.code == 2 and "3 adapters are given" in three.err
    wrong = lorica(*words, "--adapters", run, "--weights", "0,x")
    assert wrong.code == 2 and "no number" in wrong.err
    (tmp_path / "g.png").touch()
    there = lorica(*words, "--adapters", run)
    assert there.code == 2 and "--overwrite" in there.err


def test_settings_of_texts_are_refused(lorica, base, data):
    words = (*TRAIN, "--model", base, "--data", data, "--output-dir", "run")
    result = lorica(*words, "--max-length", 10, "--train-on", "all", "--metrics", "bleu")
    assert result.code == 2
    for text in ("max_length has no effect", "train_on has no effect", "scored by loss alone"):
        assert re.search(text, result.err)


def test_settings_of_pictures_are_refused_elsewhere(lorica, tmp_path):
    rows = [{"prompt": f"{i}", "completion": "x"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = ("train", "--model", "embedded", "--data", "rows.jsonl", "--output-dir", "run")
    result = lorica(*words, "--resolution", 64)
    assert result.code == 2 and "resolution has no effect" in result.err


def test_commands_for_texts_say_that_they_know_no_pictures(lorica, base, data, run):
    words = ("--model", base, "--data", data)
    for line in (
        ("eval", run, "--data", data),
        ("chat", run),
        ("merge", run, "--output-dir", "merged"),
        ("plan", *words),
        ("check", data, "--model", base),
    ):
        result = lorica(*line)
        assert result.code == 2, (line, result.err)
        assert "draws pictures, which this command does not know" in result.err, line


def test_pictures_without_captions_are_told(lorica, base, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "pictures" / "a.png")
    result = lorica(*TRAIN, "--model", base, "--data", "pictures", "--output-dir", "run")
    assert result.code != 0 and "there is no a.txt beside it" in result.err
    assert not (tmp_path / "run").exists()
