"""What is shown while training: on terminals, in pipes, for machines; and that no reader can stop a
run.
"""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
from rich.console import Console

from lorica.records.live import JsonLines, LiveDisplay, PlainLines, display_for
from lorica.records.phrases import verdict
from lorica.records.progress import Progress, Track
from lorica.records.stream import SurvivingStream
from records.run_rows import SCORES, manifest_for, rows_for

SCRIPT = """
import sys
from pathlib import Path
from lorica.records.live import display_for
from records.run_rows import SCORES, manifest_for, rows_for
adapters = sys.argv[2].split(",")
display = display_for(json="json" in sys.argv, quiet="quiet" in sys.argv)
display.event("info", "read 4,207 records")
display.start(manifest_for(*adapters))
for rows in zip(*(rows_for(adapter, 200, seed) for seed, adapter in enumerate(adapters))):
    for row in rows:
        display.step(row)
display.event("warning", "take care")
spent = {"seconds": 151.2, "total_seconds": 275}
display.finish({"status": "finished", "scores": SCORES, "resources": spent})
Path(sys.argv[1]).write_text("went on to the end")
"""


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS")}
    return kept | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm-256color"} | more


def run(tmp_path, *words: str, adapters: str = "e2e", **more: str) -> str:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "end"), adapters, *words]
    done = subprocess.run(command, capture_output=True, env=environment(**more), timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    return done.stdout.decode()


def run_in_terminal(tmp_path, *, adapters: str = "e2e", hang_up: bool = False, **more: str) -> str:
    """Run the script in a pseudo-terminal; with `hang_up` the terminal goes away at its first
    words.
    """
    controller, terminal = pty.openpty()
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "end"), adapters]
    process = subprocess.Popen(
        command, stdout=terminal, stderr=terminal, env=environment(COLUMNS="100", **more)
    )
    os.close(terminal)
    shown, limit = b"", time.monotonic() + 60
    while time.monotonic() < limit:
        if not select.select([controller], [], [], 0.2)[0]:
            continue
        try:
            part = os.read(controller, 65_536)
        except OSError:  # the other side is closed
            break
        shown += part
        if not part or hang_up:
            break
    os.close(controller)
    assert process.wait(60) == 0
    return shown.decode()


def test_plain_lines(tmp_path):
    lines = run(tmp_path).splitlines()
    assert lines[0] == "read 4,207 records"
    assert lines[1] == "training e2e on models/stories260k → runs/e2e"
    assert lines[2].startswith("step 5/200  epoch 0.05  loss 3.")
    assert "lr 4.88e-3" in lines[2] and "tokens/s 4,700" in lines[2] and "1.1 GiB" in lines[2]
    assert "eval_loss" in lines[11] and "eval_chrf" in lines[11] and "left 0:" in lines[11]
    assert lines[42] == "warning: take care"
    assert lines[43] == "finished after 4 min 35 s · trained for 2 min 31 s · 200 steps"
    assert lines[44] == (
        "better than the base: chrF 12.3 → 45.6 "
        "(difference +33.3, 95 % interval 31.0 to 35.5, p < 0.001, n = 630)"
    )
    assert "\x1b" not in "".join(lines)


def test_quiet_keeps_warnings_and_verdicts(tmp_path):
    lines = run(tmp_path, "quiet").splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "warning",
        "better than the base",
        "better than the base",
    ]


def test_json_lines_are_strict(tmp_path):
    values = [json.loads(line) for line in run(tmp_path, "json").splitlines()]
    assert [value["type"] for value in values] == [
        "event",
        "start",
        *["step"] * 40,
        "event",
        "finish",
    ]
    assert values[2]["step"] == 5 and values[2]["adapter"] == "e2e"
    assert values[-1]["summary"]["scores"] == SCORES


@pytest.mark.parametrize("word", ["", "json", "quiet"])
def test_reader_that_leaves_does_not_stop_the_run(tmp_path, word):
    command = f"'{sys.executable}' -c \"$SCRIPT\" '{tmp_path / 'end'}' e2e {word} | head -n 1; "
    command += "exit ${PIPESTATUS[0]}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, env=environment(SCRIPT=SCRIPT), timeout=60
    )
    assert done.returncode == 0
    assert done.stderr == b""
    assert len(done.stdout.splitlines()) == 1
    assert (tmp_path / "end").read_text() == "went on to the end"


def test_full_output_does_not_stop_the_run(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "end"), "e2e"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "end").exists()


def test_screen_in_a_terminal(tmp_path):
    shown = run_in_terminal(tmp_path)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "\x1b[?25l" in shown and shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # cursor
    for words in ("200/200", "100 %", "eval loss", "best 1.26", "at step 200", "grad norm"):
        assert words in text
    assert "✓ finished after 4 min 35 s · trained for 2 min 31 s" in text
    assert "⚠ take care" in text
    assert "better than the base in chrF" in text
    assert re.search(r"\x1b\[[0-9;]*3[0-9]m", shown)  # colours
    assert "Traceback" not in text


def test_no_color_is_respected(tmp_path):
    shown = run_in_terminal(tmp_path, NO_COLOR="1")
    assert "200/200" in shown
    assert not re.search(r"\x1b\[(?:[0-9;]*;)?[34][0-9]m", shown)
    assert "38;5" not in shown


def test_dumb_terminal_gets_plain_lines(tmp_path):
    shown = run_in_terminal(tmp_path, TERM="dumb")
    assert "\x1b" not in shown and "step 200/200" in shown


def test_terminal_that_hangs_up_does_not_stop_the_run(tmp_path):
    run_in_terminal(tmp_path, hang_up=True)
    assert (tmp_path / "end").read_text() == "went on to the end"


def test_several_adapters_are_a_table():
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    display = LiveDisplay(io.StringIO(), console=console)
    names = tuple(f"task-{index}" for index in range(12))
    display._manifest = manifest_for(*names)
    for name in names:
        for row in rows_for(name, 50):
            display.step(row)
    console.print(display.frame())
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "training task-0, task-1, task-2 and 9 more" in text
    assert "task-9" in text and "task-10" not in text and "and 2 more" in text


def test_ascii_terminals_keep_their_minus(tmp_path):
    shown = run(tmp_path, PYTHONIOENCODING="ascii")
    assert "-88.71   -93.90 to -84.10" in shown
    assert "12.3 -> 45.6" in shown


def test_text_from_data_cannot_steer_the_terminal():
    stream = io.StringIO()
    display = PlainLines(stream)
    display.event("info", "a\x1b[2Jb\x07\nc\u202e")
    assert stream.getvalue() == "a�[2Jb� c�\n"


def test_work_outside_of_the_steps(monkeypatch):
    stream = io.StringIO()
    display = PlainLines(stream)
    clock = iter([100.0, 110.0, *range(131, 140)])
    monkeypatch.setattr("lorica.records.lines.time.monotonic", lambda: next(clock))
    display.work("scoring", 0, 50)  # 100 s: told
    display.work("scoring", 9, 50)  # 10 s later: too soon
    display.work("scoring", 20, 50)  # 31 s later
    display.work("loading", 0, 0)  # cannot be counted
    display.work(None)
    assert stream.getvalue() == "scoring ...\nscoring ... 20 done\n"
    rows = io.StringIO()
    JsonLines(rows).work("scoring", 0, 50)
    told = {"type": "work", "what": "scoring", "done": 0, "total": 50}
    assert [json.loads(line) for line in rows.getvalue().splitlines()] == [told]


def test_screen_shows_work_before_and_after_the_steps(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, color_system=None)
    display = LiveDisplay(stream, console=console)
    display.work("scoring the base", 3, 8)
    display.event("info", "loaded")
    display.work(None)
    display.start(manifest_for("e2e"))
    display.work("scoring the tuned model", 5, 8)
    display.work(None)
    display.finish({"status": "finished"})
    shown = stream.getvalue()
    assert shown.index("scoring the base") < shown.index("· loaded")
    assert shown.index("training e2e") < shown.index("scoring the tuned model") and "5/8" in shown
    assert "scoring" not in shown[shown.rindex("✓ finished") :]


def test_an_interval_alone_is_no_verdict():
    score = {"base": 1.0, "tuned": 2.0, "low": 0.5, "high": 1.5, "p": 0.5, "num_records": 2}
    assert verdict("chrf", score).kind == "better"
    assert verdict("chrf", {**score, "verdict": "no evidence"}).kind == "unclear"
    assert verdict("chrf", {**score, "verdict": "better"}).kind == "better"


def test_choice_of_the_display():
    assert isinstance(display_for(io.StringIO()), PlainLines)
    assert isinstance(display_for(io.StringIO(), json=True), JsonLines)


def test_closed_stream_is_survived():
    stream = io.StringIO()
    surviving = SurvivingStream(stream)
    surviving.write("x")
    stream.close()
    surviving.write("y")
    surviving.flush()
    assert not surviving.alive and not surviving.isatty()


def test_time_left_is_never_negative_and_counts_down():
    now = [1_000.0]
    progress = Progress(clock=lambda: now[0])
    progress.start({"plan": {"max_steps": 100}})
    assert progress.seconds_left is None
    progress.take({"step": 60})  # resumed: the first 60 steps took no time here
    assert progress.seconds_left is None
    now[0] += 10
    progress.take({"step": 65})
    assert progress.seconds_left == pytest.approx(70)
    now[0] += 30
    assert progress.seconds_left == pytest.approx(40)
    now[0] += 3_600
    assert progress.seconds_left == 0
    progress.take({"step": 120})
    assert progress.seconds_left == 0
    assert progress.elapsed == pytest.approx(3_640)


def test_clock_of_the_day_is_not_used(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: -1e9)
    progress = Progress()
    progress.start({"plan": {"max_steps": 10}})
    progress.take({"step": 1})
    progress.take({"step": 2})
    assert 0 <= (progress.seconds_left or 0) < 1
    assert 0 <= progress.elapsed < 1


def test_track_follows_trend_and_best():
    track = Track()
    for step, value in enumerate([2.0, 1.5, 1.2, 1.0]):
        track.take({"step": step, "loss": value, "eval_loss": value})
    assert (track.trend, track.best, track.best_step) == (-1, 1.0, 3)
    for step in range(4, 40):
        track.take({"step": step, "loss": 3.0, "eval_loss": 3.0})
    assert (track.best_step, track.eval_loss) == (3, 3.0)
    for step in range(40, 5_000):
        track.take({"step": step, "loss": 3.0})
    assert track.trend == 0 and len(track.history) < 1_024
