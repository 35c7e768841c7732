"""RunRecorder: rows survive crashes and full disks, and resuming drops what came too late."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lorica.errors import ConfigError, DataError, LoricaWarning
from lorica.records.write import Recorders, RunFolder, RunRecorder, merged, read_run
from records.run_rows import CONFIG, SCORES, manifest_for, rows_for


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_whole_run_reads_back(make_run):
    path = make_run()
    run = read_run(path)
    assert run.status == "finished"
    assert run.rows == tuple(rows_for("e2e", 200))
    assert run.manifest["scores"] == SCORES
    assert run.manifest["base"]["num_parameters"] == 260_032
    assert run.manifest["resources"] == {"seconds": 151.2, "device": "cpu"}
    assert run.manifest["started"] <= run.manifest["ended"]
    assert (path / "config.yaml").read_text() == CONFIG
    assert run.events[-1]["kind"] == "checkpoint"
    assert run.events[-1]["step"] == 200
    assert len(run.samples) == 2
    assert run.notes == ()


def test_settings_carry_their_origin(make_run):
    settings = {one.key: one for one in read_run(make_run()).settings}
    assert list(settings) == [
        "model",
        "data.path",
        "data.columns",
        "method.r",
        "method.lora_dropout",
        "method.target_modules",
        "train.learning_rate",
        "train.note",
        "train.early_stopping_patience",
        "seed",
    ]
    assert (settings["method.r"].value, settings["method.r"].origin) == ("8", "flag --r")
    assert settings["data.columns"].value == "{prompt: mr, completion: ref}"
    assert settings["data.columns"].origin == "rule: the columns mr and ref"
    assert settings["method.target_modules"].value == "[q_proj, v_proj]"
    assert settings["method.target_modules"].origin == "file run.yaml"
    assert (settings["train.note"].value, settings["train.note"].origin) == (
        "a # in quotes",
        "default",
    )
    assert settings["train.early_stopping_patience"].value == "null"
    assert settings["seed"].origin == ""
    assert [key for key, one in settings.items() if one.is_default] == [
        "method.lora_dropout",
        "train.note",
    ]


def test_rows_are_on_disk_at_once(tmp_path):
    with RunFolder.create(tmp_path) as folder:
        recorder = RunRecorder(folder)
        recorder.event("info", "reading data")  # before the start: kept
        recorder.start(manifest_for("a"))
        for row in rows_for("a", 15):
            recorder.step(row)
        assert steps(tmp_path) == [5, 10, 15]
        assert read_run(tmp_path).status == "running"
        assert read_run(tmp_path).events[0]["text"] == "reading data"
    assert read_run(tmp_path).status == "stopped"  # nobody holds it any more


@pytest.mark.parametrize("tail", [b"", b'{"step": 30, "lo', b'{"step": 30}', b"\0\0\0\0", b"\n"])
def test_resuming_drops_torn_and_later_rows(tmp_path, tail):
    with RunFolder.create(tmp_path) as folder:
        recorder = RunRecorder(folder, config=CONFIG)
        recorder.start(manifest_for("a"))
        for row in rows_for("a", 25):
            recorder.step(row)
        recorder.event("info", "late")
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(tail)
    started = read_run(tmp_path).manifest["started"]

    with RunFolder.open(tmp_path) as folder:
        recorder = RunRecorder(folder, resumed_step=15)
        recorder.start(manifest_for("a"))
        assert steps(tmp_path) == [5, 10, 15]
        recorder.step({"step": 20, "loss": 1.0})
        recorder.finish({"status": "finished"})
    run = read_run(tmp_path)
    assert steps(tmp_path) == [5, 10, 15, 20]
    assert run.events == ()
    assert [entry["step"] for entry in run.manifest["resumed"]] == [15]
    assert run.manifest["started"] == started
    assert (tmp_path / "config.yaml").read_text() == CONFIG


def test_resuming_twice_remembers_both(tmp_path):
    for resumed_step in (None, 5, 10):
        make = RunFolder.create if resumed_step is None else RunFolder.open
        with make(tmp_path) as folder:
            recorder = RunRecorder(folder, resumed_step=resumed_step)
            recorder.start(manifest_for("a"))
            recorder.finish({"status": "interrupted"})
    run = read_run(tmp_path)
    assert [entry["step"] for entry in run.manifest["resumed"]] == [5, 10]
    assert run.status == "interrupted"


def test_broken_line_in_the_middle_is_dropped_with_a_warning_on_resume(tmp_path):
    with RunFolder.create(tmp_path) as folder:
        RunRecorder(folder).start(manifest_for("a"))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with RunFolder.open(tmp_path) as folder:
        said: list[str] = []
        RunRecorder(folder, resumed_step=9, on_warning=said.append).start(manifest_for("a"))
    assert steps(tmp_path) == [1, 3]
    assert len(said) == 1 and "metrics.jsonl:2" in said[0]


def test_reading_is_strict_and_tells_all_problems(make_run):
    path = make_run()
    (path / "metrics.jsonl").write_text('{"step": 1}\n[2]\n{"step": 3}\n{"step": 4, "lo')
    (path / "samples.jsonl").write_text("nonsense\n")
    (path / "config.yaml").write_text("a: [1,\n")
    with pytest.raises(DataError) as caught:
        read_run(path)
    problems = "\n".join(caught.value.problems)
    assert "metrics.jsonl:2: expected an object, found list" in problems
    assert "samples.jsonl:1" in problems
    assert "config.yaml" in problems
    assert len(caught.value.problems) == 3  # the torn last line is none


def test_torn_last_line_is_passed_over_with_a_note(make_run):
    path = make_run()
    with open(path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 205, "loss": 1.')
    run = read_run(path)
    assert run.rows[-1]["step"] == 200
    assert run.notes == ("metrics.jsonl: the last line (41) is torn and was passed over",)


def test_no_run_is_an_error_that_names_the_runs_nearby(tmp_path, make_run):
    make_run("first")
    with pytest.raises(DataError, match="holds the runs first"):
        read_run(tmp_path / "frist")
    with pytest.raises(DataError, match=r"run\.json: .*line 1 column 1"):
        (tmp_path / "first" / "run.json").write_text("no")
        read_run(tmp_path / "first")


def test_full_disk_costs_rows_and_one_warning(tmp_path):
    with RunFolder.create(tmp_path) as folder:
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        recorder = RunRecorder(folder)
        recorder.start(manifest_for("a"))
        with pytest.warns(LoricaWarning, match="No space left on device") as caught:
            for row in rows_for("a", 100):
                recorder.step(row)
        assert len(caught) == 1
        assert "training goes on" in str(caught[0].message)
        recorder.finish({"status": "finished"})
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "finished"


def test_limit_on_file_size_leaves_whole_lines(tmp_path):
    """A disk that fills up in the middle of a line: the part is taken back, and later lines fit
    again.
    """
    script = """
import resource, signal, sys
from lorica.records.write import RunFolder, RunRecorder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
said = []
with RunFolder.create(sys.argv[1]) as folder:
    recorder = RunRecorder(folder, on_warning=said.append)
    recorder.start({"lorica": "0"})
    resource.setrlimit(resource.RLIMIT_FSIZE, (505, resource.RLIM_INFINITY))
    for step in range(20):
        recorder.step({"step": step, "loss": 1.5, "pad": "x" * 40})
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    recorder.step({"step": 99})
    recorder.finish({})
print(len(said), said[0])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert done.stdout.startswith("1 ") and "File too large" in done.stdout
    kept = steps(tmp_path)
    assert kept[-1] == 99
    assert kept[:-1] == list(range(len(kept) - 1)) and 2 < len(kept) < 12


def test_unwritable_folder_stops_before_training(tmp_path):
    with RunFolder.create(tmp_path / "run") as folder:
        (tmp_path / "run" / "metrics.jsonl").mkdir()
        with pytest.raises(ConfigError, match="cannot write the run folder"):
            RunRecorder(folder).start(manifest_for("a"))


def test_manifest_that_cannot_be_written_later_is_a_warning(tmp_path, monkeypatch):
    said: list[str] = []
    with RunFolder.create(tmp_path) as folder:
        recorder = RunRecorder(folder, on_warning=said.append)
        recorder.start(manifest_for("a"))

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("lorica.records.write.write_file", full)
        recorder.finish({"status": "finished"})
    assert len(said) == 1 and "run.json" in said[0]


def test_merging_is_deep_and_leaves_its_arguments():
    old = {"adapters": {"a": {"path": "x", "num": 1}}, "n": 1}
    new = {"adapters": {"a": {"num": 2}, "b": {}}, "n": {"m": 1}}
    assert merged(old, new) == {
        "adapters": {"a": {"path": "x", "num": 2}, "b": {}},
        "n": {"m": 1},
    }
    assert old == {"adapters": {"a": {"path": "x", "num": 1}}, "n": 1}


def test_fan_out_keeps_the_order():
    class Noted:
        def __init__(self):
            self.heard = []

        def start(self, manifest):
            self.heard.append(("start", manifest))

        def step(self, row):
            self.heard.append(("step", row))

        def event(self, kind, text):
            self.heard.append((kind, text))

        def finish(self, summary):
            self.heard.append(("finish", summary))

    first, second = Noted(), Noted()
    both = Recorders([first, second])
    both.start({"a": 1})
    both.step({"step": 1})
    both.event("info", "x")
    both.finish({})
    expected = [("start", {"a": 1}), ("step", {"step": 1}), ("info", "x"), ("finish", {})]
    assert first.heard == second.heard == expected


def test_config_comments_do_not_change_the_settings():
    assert yaml.safe_load(CONFIG)["method"]["target_modules"] == ["q_proj", "v_proj"]
