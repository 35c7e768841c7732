"""Several processes on one run: the bits of one; whose work is taken up; what is refused."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from lorica.cli import main, one_voice, ranks, search_crew, several_crew
from lorica.config import load_yaml
from lorica.errors import DataError, LoricaError
from lorica.files.adapter import save_adapter
from lorica.records.crew import Crew
from lorica.records.folder import RunFolder
from lorica.train import loop
from lorica.train.engine import Engine
from several_processes import LORICA, dying, same_adapters, torchrun
from train.runs import rows

PLACES = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
SECTION = {"r": [2, 4, 5], "learning_rate": [3e-3, 3e-2]}


@pytest.fixture(scope="module")
def settings(stock, tmp_path_factory):
    """run.yaml of a search."""
    values = {
        "model": str(stock / "llama"),
        "data": str(stock / "split"),
        "batch_size": 8,
        "max_steps": 16,
        "logging_steps": 4,
        "target_modules": "all-linear",
    }
    file = tmp_path_factory.mktemp("search") / "run.yaml"
    file.write_text(json.dumps({**values, "search": SECTION}))
    return file


@pytest.fixture(scope="module")
def several(settings):
    """run.yaml of four adapters."""
    values = json.loads(settings.read_text())
    del values["search"]
    own = {"eval_records": 6, "max_new_tokens": 6, "eval_steps": 4, "save_steps": 4}
    adapters = [
        {"name": "a", "r": 2, "max_steps": 7},
        {"name": "b", "r": 3, "lora_dropout": 0.1, "seed": 4, "max_steps": 9},
        {"name": "c", "method": "dora", "r": 2, "batch_size": 2},
        {"name": "d", "r": 4, "target_modules": ["q_proj", "v_proj"], "eval_records": 5},
    ]
    file = settings.parent / "several.yaml"
    file.write_text(json.dumps({**values, **own, "adapters": adapters}))
    return file


def started(rank, size, *line, folder, dies_at=0, script=False):
    """A process as torchrun starts it, without a torchrun that ends all when one dies; or a script
    that starts it.
    """
    both = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    places = {"RANK": str(rank), "LOCAL_RANK": str(rank), **both}
    words = [sys.executable, "-c", dying(dies_at), *map(str, line)]
    words = [*(("sh", "-c", '"$@"; exit $?', "sh") if script else ()), *words]
    how = {"cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env={**os.environ, **places}, **how)


def same_search(first, second):
    """Both folders hold the same answer, the same adapters, the same rows, and are whole."""
    one, other = (json.loads((f / "search.json").read_text()) for f in (first, second))
    candidates = zip(one.pop("candidates"), other.pop("candidates"), strict=True)
    assert all({**a, "run": 0} == {**b, "run": 0} for a, b in candidates)
    assert {**one, "resources": 0} == {**other, "resources": 0}
    assert rows(first) == rows(second)
    same_adapters(first, second)
    for name in ("run.yaml", "adapter/adapter_model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert json.loads((second / "run.json").read_text())["status"] == "finished"
    assert (second / "report.html").is_file() and not (second / "workers").exists()


@pytest.fixture(scope="module")
def alone(settings):
    """The search by one process."""
    return by_one("search", settings)


@pytest.fixture(scope="module")
def several_alone(several):
    """The four adapters by one process."""
    return by_one("train", several)


def by_one(command, file):
    folder = file.with_suffix("")
    with pytest.raises(SystemExit) as ended:
        main([command, str(file), "--output-dir", str(folder), "--quiet"])
    assert ended.value.code == 0
    return folder


def searched_by(number, settings, tmp_path, alone):
    line = ["search", settings, "--output-dir", "found"]
    done = torchrun(number, *LORICA, *line, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("chosen   ") == 1  # one table, one answer
    assert f"{number} processes" in done.stdout
    same_search(alone, tmp_path / "found")


def test_a_search_by_two_processes_is_that_of_one(settings, tmp_path, alone):
    searched_by(2, settings, tmp_path, alone)


@pytest.mark.slow
def test_a_search_by_four_processes_is_that_of_one(settings, tmp_path, alone):
    searched_by(4, settings, tmp_path, alone)


def killed(settings, tmp_path, who, **other):
    line = ["search", settings, "--output-dir", "found"]
    both = [
        started(rank, 2, *line, folder=tmp_path, **({"dies_at": 5} if rank == who else other))
        for rank in (0, 1)
    ]
    ended = [process.communicate(timeout=300) for process in both]
    assert both[who].returncode == -signal.SIGKILL, ended[who][1]
    assert both[1 - who].returncode == 0, ended[1 - who][1]
    return ended[1 - who][0]


def test_another_process_takes_up_what_a_killed_one_had(settings, tmp_path, alone):
    # the first one, so that the other one writes the answer too; a script may start a process
    said = killed(settings, tmp_path, 0, script=True)
    assert "chosen   " in said
    same_search(alone, tmp_path / "found")
    steps = re.findall(r"c00\d: going on from step (\d+)", told_in(tmp_path / "found"))
    assert steps and all(int(step) >= 2 for step in steps)


def told_in(folder):
    """What events.jsonl says."""
    lines = (folder / "events.jsonl").read_text().splitlines()
    return "\n".join(json.loads(line)["text"] for line in lines)


@pytest.mark.slow
def test_the_first_process_takes_up_what_another_had(settings, tmp_path, alone):
    killed(settings, tmp_path, 1)
    same_search(alone, tmp_path / "found")


@pytest.mark.slow
def test_torchrun_starts_the_same_line_again(settings, tmp_path, alone):
    once = "os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'"
    (tmp_path / "dying.py").write_text(dying(6, when=once))
    line = ["search", settings, "--output-dir", "found", "--resume", "found"]
    done = torchrun(2, "--max-restarts", 1, "dying.py", *line, folder=tmp_path)
    assert done.returncode == 0 and "chosen   " in done.stdout, done.stderr
    same_search(alone, tmp_path / "found")


@pytest.mark.slow
def test_when_all_are_killed_one_process_can_go_on(lorica, settings, tmp_path, alone):
    line = ["search", settings, "--output-dir", "found"]
    process = started(0, 2, *line, folder=tmp_path, dies_at=5)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    told = lorica("search", "--resume", "found", "--quiet")
    assert told.code == 0, told.err
    same_search(alone, tmp_path / "found")


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_adapters_of_a_list_are_those_of_one_process(several, several_alone, tmp_path, number):
    done = torchrun(number, *LORICA, "train", several, "--output-dir", "found", folder=tmp_path)
    assert done.returncode == 0 and done.stdout.count("\nreport ") == 1, done.stderr
    same_run(several_alone, tmp_path / "found")


def same_run(first, second):
    """Both folders hold the same adapters, scores and rows, and are whole."""
    same_adapters(first, second)
    assert rows(first) == rows(second)
    assert (first / "samples.jsonl").read_bytes() == (second / "samples.jsonl").read_bytes()
    one, other = (json.loads((f / "run.json").read_text()) for f in (first, second))
    for name, why in one["training"]["failed"].items():
        both = [[run["training"][key][name] for key in one["training"]] for run in (one, other)]
        assert why or both[0] == both[1]
    for key in ("failed", "steps"):
        assert one["training"][key] == other["training"][key]
    assert one["plan"] == other["plan"] and one.get("data") == other.get("data")
    assert other["status"] == "finished"
    for name, own in one["adapters"].items():
        assert {**own, "path": 0} == {**other["adapters"][name], "path": 0}
    assert (second / "report.html").is_file() and not (second / "workers").exists()


@pytest.fixture
def one_of_two(monkeypatch):
    """This process is the first of two."""
    for key, value in PLACES.items():
        monkeypatch.setenv(key, value)


def test_a_signal_leaves_a_run_that_goes_on(lorica, settings, tmp_path, alone, monkeypatch):
    original, calls = Engine.step, []

    def step(self, trainees, work):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, trainees, work)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", step)
        for key, value in PLACES.items():
            patch.setenv(key, value)
        told = lorica("search", settings, "--output-dir", "found", "--quiet")
    assert told.code == 128 + signal.SIGTERM, told.err
    assert "lorica search --resume found" in told.err and "workers" not in told.err
    assert status(tmp_path) == "interrupted"
    with RunFolder.open("found") as held, monkeypatch.context() as patch:  # another works there

        def leaving(*words):
            held.close()
            return original(*words)

        patch.setattr(Engine, "step", leaving)
        patch.setattr(search_crew, "load_adapter", failing)
        told = lorica("search", "--resume", "found")
        assert told.code == 1 and "the disk is gone" in told.err
        assert status(tmp_path) == "failed"  # whoever takes over the end says what became of it
    with RunFolder.open("found"):
        told = lorica("search", "--resume", "found")
        assert told.code == 0 and "another process writes the result: found" in told.out
    told = lorica("search", "--resume", "found", "--quiet")
    assert told.code == 0, told.err
    same_search(alone, tmp_path / "found")


def status(folder):
    return json.loads((folder / "found/run.json").read_text())["status"]


def failing(*words, **how):
    raise LoricaError("the disk is gone")


def test_only_what_is_whole_counts_as_written(
    lorica, several, several_alone, tmp_path, monkeypatch
):
    calls = []

    def save(*words, **how):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return save_adapter(*words, **how)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_adapter", save)
        for key, value in PLACES.items():
            patch.setenv(key, value)
        told = lorica("train", several, "--output-dir", "found")
    assert told.code == 128 + signal.SIGTERM and "the state was saved" in told.err, told.err
    first = tmp_path / "found/workers/1"
    assert len([*first.glob("adapters/*")]) == 2 and not (first / "checkpoints").exists()
    states = [*(tmp_path / "found/workers/states").glob("*/step-*")]
    assert {state.parent.name for state in states} == {"a", "b"}
    values = load_yaml(several).values | {"learning_rate": 0.05}
    (tmp_path / "other.yaml").write_text(json.dumps(values))
    told = lorica("train", "other.yaml", "--output-dir", "found", "--resume", "found")
    assert told.code == 2 and "was begun with other settings or data" in told.err
    assert "settings.learning_rate is 0.05, and was 0.0002" in told.err
    original, trained, other = Engine.step, set(), ExitStack()

    def step(self, trainees, work):
        if not trained:  # another process comes, which has nothing to do
            other.enter_context(Crew(tmp_path / "found", 1).present())
        trained.update(trainee.adapter.name for trainee in trainees)
        return original(self, trainees, work)

    monkeypatch.setattr(Engine, "step", step)
    monkeypatch.setattr(several_crew, "LOOK_EVERY", 0)
    with other:
        told = lorica("train", several, "--output-dir", "found", "--resume", "found", "--quiet")
    assert told.code == 0, told.err
    assert trained == {"c", "d"}  # the others were done, and had only to be written
    step = re.search(r"d is handed on after step (\d+)", told_in(tmp_path / "found"))
    assert step and f"d: going on from step {step[1]}" in told_in(tmp_path / "found")
    same_run(several_alone, tmp_path / "found")


def test_tensors_that_break_at_last_are_told(lorica, several, stock, monkeypatch, one_of_two):
    original, calls = Engine.step, []

    def step(self, trainees, work):
        calls.append(1)
        result = original(self, trainees, work)
        if len(calls) == 2:
            with torch.no_grad():
                next(trainees[0].adapter.parameters()).fill_(float("nan"))
        return result

    monkeypatch.setattr(Engine, "step", step)
    values = load_yaml(several).values
    del values["eval_steps"], values["save_steps"]
    adapters = [{"name": name} for name in "abcd"]
    values |= {"data": str(stock / "pairs.jsonl"), "max_steps": 2, "adapters": adapters}
    Path("broken.yaml").write_text(json.dumps(values))
    told = lorica("train", "broken.yaml", "--output-dir", "found", "--eval-size", "0")
    assert told.code == 1 and "adapter 'a', step 2: 1 tensors are not finite" in told.err
    assert "training" not in json.loads(Path("found/workers/1/run.json").read_text())


@pytest.mark.parametrize("broken", ["bd", "cd"])
def test_adapters_that_break_fail_alone(lorica, several, tmp_path, monkeypatch, broken):
    original = Engine.step

    def step(self, trainees, work):
        for trainee in trainees:
            if trainee.adapter.name in broken and trainee.step == 2:
                with torch.no_grad():
                    next(trainee.adapter.parameters()).fill_(float("nan"))
        return original(self, trainees, work)

    monkeypatch.setattr(Engine, "step", step)
    told = lorica("train", several, "--output-dir", "alone", "--quiet")
    assert told.code == 1 and "2 of 4 adapters failed" in told.err
    for key, value in PLACES.items():  # the other one never comes
        monkeypatch.setenv(key, value)
    for line in ([several, "--output-dir", "found"], ["--resume", "found"]):
        again = lorica("train", *line, "--quiet")
        assert again.code == 1 and again.err.replace("found", "alone") == told.err
    same_run(tmp_path / "alone", tmp_path / "found")
    monkeypatch.setenv("RANK", "1")
    again = lorica("train", "--resume", "found")
    assert (again.code, again.out, again.err) == (0, "", "")


def test_nothing_is_trained_twice(lorica, stock, quick, one_of_two):
    line = ["train", "--model", stock / "llama", "--data", stock / "pairs.jsonl", *quick]
    told = lorica(*line, "--output-dir", "run")
    assert (
        told.code == 2 and "each would do the same" in told.err and "without torchrun" in told.err
    )
    told = lorica(*line, "--seeds", "1,2", "--output-dir", "run")
    assert told.code == 2 and "several seeds" in told.err
    assert not os.path.exists("run")


def test_what_several_processes_cannot_share_is_refused(
    lorica, settings, several, tmp_path, one_of_two, monkeypatch
):
    told = lorica("search", settings)
    assert told.code == 2 and "several processes need one output_dir" in told.err
    told = lorica("train", several)
    assert told.code == 2 and "several processes need one output_dir" in told.err
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "run.json").write_text('{"lorica": "0", "run": {"command": "search"}}')
    (begun / "config.yaml").write_text(settings.read_text())
    told = lorica("search", "--resume", begun)
    assert told.code == 2 and "one process began the run" in told.err
    values = load_yaml(settings).values
    values["search"] = {**SECTION, "storage": "study.db"}
    shared = tmp_path / "shared.yaml"
    shared.write_text(json.dumps(values))
    told = lorica("search", shared, "--output-dir", "found")
    assert told.code == 2 and "storage is for searches on several machines" in told.err
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    told = lorica("search", settings, "--output-dir", "found")
    assert told.code == 2 and "processes of one machine" in told.err
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    told = lorica("search", settings, "--output-dir", "found")
    assert told.code == 2 and "nothing says that they are on one machine" in told.err


def test_an_error_of_all_is_told_once(lorica, settings, monkeypatch, one_of_two):
    line = ["search", settings, "--r", "no number", "--output-dir", "found"]
    first = lorica(*line)
    assert first.code == 2 and "no number" in first.err
    monkeypatch.setenv("RANK", "1")
    ended = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    ended.start()  # as torchrun does when the first one has failed
    told = lorica(*line)
    assert (told.code, told.out, told.err) == (2, "", "")
    ended.join()
    monkeypatch.setattr(one_voice, "HOLD_BACK", 0.2)
    again = lorica(*line)  # nobody else had it
    assert (again.code, again.err) == (2, first.err)


def test_a_process_that_torchrun_did_not_start_speaks_at_once(lorica, monkeypatch, one_of_two):
    monkeypatch.setenv("RANK", "1")
    began = time.monotonic()
    told = lorica("eval", "nowhere")  # work for one process
    assert told.code == 2 and told.err
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert one_voice.speaks(DataError("wrong"))
    assert time.monotonic() - began < one_voice.HOLD_BACK / 2


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [["--rank", "no number"], ["--data", "nowhere.jsonl"]])
def test_torchrun_tells_an_error_once(settings, tmp_path, wrong):
    line = ["search", settings, "--output-dir", "found", *wrong]
    done = torchrun(2, *LORICA, *line, folder=tmp_path)
    assert done.returncode and done.stderr.count("lorica: ") == 1, done.stderr


def test_memory_is_judged_for_each_process(lorica, settings, monkeypatch, one_of_two):
    monkeypatch.setattr(search_crew, "beside", lambda found: 2**30)
    told = lorica("search", settings, "--output-dir", "found")
    assert told.code == 3 and "--ignore-memory" in told.err


def test_nobody_waits_for_ever_for_the_first(lorica, several, monkeypatch, one_of_two):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(ranks, "TELL_AFTER", 0.1)
    monkeypatch.setattr(ranks, "GIVE_UP_AFTER", 0.3)
    told = lorica("train", several, "--output-dir", "found")
    assert told.code == 1 and "waits for the first one" in told.out
    assert "exec" in told.err


def test_an_earlier_run_is_not_taken_for_this_one(tmp_path, monkeypatch, one_of_two):
    before = ranks.ranks()
    parent = tmp_path / str(os.getppid())
    parent.mkdir()
    monkeypatch.setattr(ranks, "_PROCESSES", tmp_path)
    (parent / "stat").write_text("7 (a (b) c) S " + " ".join(map(str, range(4, 30))))
    assert ranks.ranks().token == f"{os.getppid()}-22-0" != before.token
    (parent / "stat").unlink()
    found = ranks.ranks()
    with RunFolder.create(tmp_path / "run") as folder:
        assert ranks.token_of(folder.path) is None
        folder.manifest.write_text(json.dumps({"processes": {"token": found.token}}))
        assert ranks._has_begun(folder.path, found)
    assert not ranks._has_begun(folder.path, found)
