"""A run whose base several processes hold together: killed, gone on with, stopped, refused."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from lorica.base.processes import Processes, is_gone, joined
from lorica.cli.spread_run import _others
from lorica.config import load_yaml
from lorica.errors import ConfigError, LoricaError
from several_processes import LORICA, dying, line_of, same_adapters, torchrun
from train.runs import rows

SECOND_AT_FIRST = "(os.environ['RANK'], os.environ['TORCHELASTIC_RESTART_COUNT']) == ('1', '0')"
"""Of the processes the second one, before it was started again."""


@pytest.fixture(scope="module")
def several(stock, tmp_path_factory):
    """run.yaml of two adapters on a spread base."""
    values = {
        "model": str(stock / "llama"),
        "data": str(stock / "split"),
        "dtype": "float32",
        "batch_size": 8,
        "max_steps": 6,
        "logging_steps": 2,
        "eval_steps": 2,
        "save_steps": 2,
        "eval_records": 6,
        "max_new_tokens": 4,
        "shard_base": True,
        "adapters": [
            {"name": "a", "r": 2, "target_modules": "all-linear"},
            {"name": "b", "method": "dora", "r": 3, "lora_dropout": 0.1, "max_steps": 5},
        ],
    }
    file = tmp_path_factory.mktemp("spread") / "several.yaml"
    file.write_text(json.dumps(values))
    return file


def status(folder):
    return json.loads((folder / "run.json").read_text())["status"]


def dies(number, several, folder, *, restarts=0):
    (folder / "dying.py").write_text(dying(5, number, when=SECOND_AT_FIRST))
    both = ["--output-dir", "found", "--resume", "found"]
    words = ["--max-restarts", restarts, "dying.py", "train", several, *both]
    return torchrun(2, *words, folder=folder)


def same_as_one(lorica, several, folder):
    """What processes made together is what one makes, to the last bit."""
    assert lorica("train", several, "--no-shard-base", "--output-dir", "alone").code == 0
    assert rows(folder / "alone") == rows(folder / "found")
    same_adapters(folder / "alone", folder / "found")
    one, other = (folder / run / "samples.jsonl" for run in ("alone", "found"))
    assert one.read_bytes() == other.read_bytes()
    assert status(folder / "found") == "finished"


def test_a_process_that_is_killed_ends_the_others_and_the_run_goes_on(lorica, several, tmp_path):
    done = dies(signal.SIGKILL, several, tmp_path, restarts=1)
    assert done.returncode == 0 and done.stdout.count("\nreport ") == 1, done.stderr
    # the other process finds it gone, or is ended by torchrun before
    assert done.stderr.count("mend: go on with: ") == 1, done.stderr
    assert "lorica train --resume found" in done.stderr
    assert "going on from step 4" in done.stdout
    same_as_one(lorica, several, tmp_path)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_with_the_state_saved(lorica, several, tmp_path):
    done = dies(signal.SIGTERM, several, tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("stopped by SIGTERM: the state was saved") == 1, done.stderr
    assert status(tmp_path / "found") == "interrupted"
    assert (tmp_path / "found/checkpoints/step-00000005").is_dir()
    told = lorica("train", "--resume", "found")  # by itself it has no processes to spread it over
    assert told.code == 2 and "torchrun" in told.err
    done = torchrun(2, *LORICA, "train", "--resume", "found", folder=tmp_path)
    assert done.returncode == 0 and done.stdout.count("\nreport ") == 1, done.stderr
    same_as_one(lorica, several, tmp_path)


@pytest.mark.slow
def test_one_process_that_has_room_goes_on_with_it(lorica, several, tmp_path):
    assert dies(signal.SIGKILL, several, tmp_path).returncode != 0
    # the other process finds it gone, or is ended by torchrun while it says so
    assert status(tmp_path / "found") in ("failed", "interrupted")
    assert lorica("train", "--resume", "found", "--no-shard-base").code == 0
    same_as_one(lorica, several, tmp_path)


@pytest.mark.slow
def test_torchrun_that_is_stopped_stops_all(several, tmp_path):
    words = [*LORICA, "train", several, "--output-dir", "found", "--max-steps", "5000"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(line_of(2, *words), cwd=tmp_path, **how)
    while not [*tmp_path.glob("found/checkpoints/step-*")]:
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    err = process.communicate(timeout=60)[1]
    assert time.monotonic() - began < 25
    assert err.count("stopped by SIGTERM: the state was saved") == 1, err
    assert status(tmp_path / "found") == "interrupted"


@pytest.mark.slow
def test_what_all_find_wrong_is_said_once(several, tmp_path):
    words = [*LORICA, "train", several, "--output-dir", "found", "--target-modules", "no"]
    done = torchrun(2, *words, folder=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("lorica: ") == 1, done.stderr
    assert not (tmp_path / "found").exists()


def test_what_cannot_be_spread_is_refused(lorica, stock, several, monkeypatch):
    line = ["train", "--model", stock / "llama", "--data", stock / "pairs.jsonl", "--shard-base"]
    told = lorica(*line, "--output-dir", "run")
    assert told.code == 2 and "there is one" in told.err and "torchrun" in told.err
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    wrong = ["--quantize", "nf4", "--reuse-frozen-layers", "memory", "--task", "seq2seq"]
    told = lorica(*line, *wrong, "--init-lora-weights", "eva", "--seeds", "1,2")
    assert told.code == 2
    for words in ("packed weights", "leaves out layers", "seq2seq", "seeds", "records decide"):
        assert words in told.err, told.err
    values = load_yaml(several).values
    values["adapters"][1] |= {"init_lora_weights": "eva"}
    Path("wrong.yaml").write_text(json.dumps(values))
    told = lorica("train", "wrong.yaml")
    assert told.code == 2 and "records decide" in told.err
    told = lorica("search", *line[1:], "--output-dir", "found")
    assert told.code == 2 and "shard_base" in told.err, told.err
    assert not os.path.exists("run") and not os.path.exists("found")


def test_each_process_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"2 processes .* has 1 GPU"), joined(0, 2) as found:
        assert isinstance(found, Processes)


@pytest.mark.parametrize(
    ("words", "gone"),
    [
        ("[/pytorch/gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:5", True),
        ("[pair.cc:525] Read error [127.0.0.1]:37: Connection reset by peer", True),
        ("[unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation", True),
        ("NCCL error: remote process exited or there was a network error", True),
        ("Failed to recv, got 0 bytes. Connection was likely closed. Did the server crash?", True),
        ("The server socket has failed to listen. port: 29500, EADDRINUSE", False),
        ("NCCL error in NCCLUtils.cpp:1: unhandled cuda error", False),
        ("[gloo/types.h:9] op.preamble.length <= op.nbytes. 8 vs 4", False),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_only_what_a_gone_process_leaves_is_taken_for_it(words, gone):
    assert is_gone(RuntimeError(words)) is gone
    assert not is_gone(ValueError(words))
    told = pytest.raises(LoricaError if gone else RuntimeError, match=re.escape(words))
    with told, _others("run", 2):
        raise RuntimeError(words + "\nand much else")
