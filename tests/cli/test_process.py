"""The command as a process of its own: quick help, exit codes, clean streams, signals, pipes.

Starting Python and importing torch takes longer than a run. It is part of the test where the start
is what matters (help, a signal, memory); the other processes are forks of this one.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lorica
from faults import rig

SOURCE = str(Path(lorica.__file__).parents[1])
START = "from lorica.cli import main; main()"


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": SOURCE, "NO_COLOR": "1", **more}


def process(words, **how) -> subprocess.Popen:
    command = [sys.executable, "-c", START, *map(str, words)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), **{**streams, **how})


def forked(words, folder: Path, output: Path, before=lambda: None) -> rig.Run:
    """A fork that runs a command line in `folder`, both its streams going into `output`."""

    def prepare() -> None:
        os.chdir(folder)
        os.environ["NO_COLOR"] = "1"
        before()

    return rig.start([str(word) for word in words], output, before=prepare)


def test_help_is_quick_and_loads_no_torch():
    code = (
        "import sys, time; from lorica.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as end:\n"
        "    heavy = {'torch', 'transformers', 'pydantic', 'rich.live', 'numpy'} & {*sys.modules}\n"
        "    print('HEAVY', sorted(heavy), end.code, time.process_time())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    last = done.stdout.splitlines()[-1]
    assert last.startswith("HEAVY [] 0 "), last
    assert float(last.split()[-1]) < 0.6, (
        f"seconds of the processor, torch alone takes more: {last}"
    )
    assert "train " in done.stdout


def test_settings_are_told_wrong_with_code_2(tmp_path):
    out, err = tmp_path / "out", tmp_path / "err"

    def apart() -> None:
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)

    running = forked(["train", "--data", "x", "--lora-r", "8"], tmp_path, out, apart)
    assert running.wait() == 2 and out.read_text() == ""
    assert "model is missing" in err.read_text() and "Traceback" not in err.read_text()


def test_a_signal_stops_and_a_pipe_may_break(stock, quick, tmp_path):
    data = ["--model", stock / "llama", "--data", stock / "pairs.jsonl", *quick]
    data[data.index("--max-steps") + 1] = "100000"
    data[data.index("--eval-steps") + 1] = "100000"
    running = process(["train", *data, "--json", "--output-dir", "run"], cwd=tmp_path)
    assert running.stdout is not None
    for line in running.stdout:
        if json.loads(line)["type"] == "step":
            break
    running.send_signal(signal.SIGTERM)
    rest, err = running.communicate(timeout=120)
    assert running.returncode == 143
    assert all(json.loads(line) for line in rest.splitlines())
    assert err.startswith("lorica: stopped by SIGTERM") and "--resume run" in err
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "interrupted"


def test_a_reader_that_leaves_does_not_stop_a_run(stock, quick, tmp_path):
    data = ["--model", stock / "llama", "--data", stock / "pairs.jsonl", *quick]
    ear, mouth = os.pipe()

    def into_the_pipe() -> None:
        os.dup2(mouth, 1)
        os.close(mouth)
        os.close(ear)

    words = ["train", *data, "--output-dir", "run"]
    running = forked(words, tmp_path, tmp_path / "err", into_the_pipe)
    os.close(mouth)
    head = subprocess.run(["head", "-1"], stdin=ear, capture_output=True, text=True)
    os.close(ear)
    assert running.wait() == 0, running.words
    assert head.stdout.startswith("data: ") and "\x1b" not in head.stdout
    assert "BrokenPipe" not in running.words
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("colour", ["1", None])
def test_a_terminal(stock, quick, tmp_path, colour):
    """On a terminal of its own: a screen that ends with scores and with what to type next."""
    data = ["--model", stock / "llama", "--data", stock / "pairs.jsonl", *quick]
    controller, terminal = os.openpty()

    def look() -> None:
        os.environ.update(TERM="xterm-256color", COLUMNS="80", LINES="40")
        if colour is None:
            del os.environ["NO_COLOR"]

    words = ["train", *data, "--output-dir", "run"]
    running = forked(words, tmp_path, Path(os.ttyname(terminal)), look)
    os.close(terminal)
    shown, limit = b"", time.monotonic() + 120
    while time.monotonic() < limit:
        if select.select([controller], [], [], 0.2)[0]:
            try:
                part = os.read(controller, 65_536)
            except OSError:
                break
            shown += part
    os.close(controller)
    assert running.wait(60) == 0
    text = shown.decode()
    assert "scoring the base on" in text and "scoring the tuned model" in text
    assert text.rstrip().endswith("lorica merge run --output-dir FOLDER")
    assert "\x1b[?25h" in text, "the cursor comes back"
    assert ("\x1b[32m" in text or "\x1b[1;3" in text) is (colour is None)


def test_the_memory_of_a_small_run_is_what_was_planned(tmp_path, stock):
    """Libraries that are imported late are part of it: they are most of what a small run adds."""
    words = ["--model", stock / "llama", "--data", stock / "pairs.jsonl", "--max-steps", 3]
    command = ["train", *map(str, words), "--output-dir", str(tmp_path / "run")]
    running = process(command, cwd=tmp_path)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    found = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))
    planned = found["resources"]["planned_memory_bytes"]
    assert found["resources"]["peak_memory_bytes"] == pytest.approx(planned, rel=0.12)
