"""No command opens a socket: nothing is fetched, nothing is reported to anybody."""

import json
import sys

import pytest

import tiny_pipelines
from lorica import LoRA, attach, load_model, save_adapter
from lorica.cli import COMMANDS, main

SEEN: list[str] = []
WATCHING = [False]


def _watch(event: str, arguments: tuple) -> None:
    if WATCHING[0] and event in ("socket.connect", "socket.getaddrinfo", "socket.bind"):
        SEEN.append(f"{event} {arguments[1:] if event != 'socket.getaddrinfo' else arguments[:1]}")


sys.addaudithook(_watch)

COMMAND_LINES = {
    "train": "train --model {stock}/llama --data {stock}/pairs.jsonl --output-dir run {quick}",
    "check": "check {stock}/pairs.jsonl --model {stock}/llama",
    "clean": "clean {stock}/pairs.jsonl --output clean.jsonl --near",
    "inspect": "inspect {stock}/llama",
    "plan": "plan --model {stock}/llama --data {stock}/pairs.jsonl {quick}",
    "methods": "methods",
    "eval": "eval {run} --data {stock}/other.jsonl --max-new-tokens 4",
    "chat": "chat {run}",
    "merge": "merge {run} --output-dir merged",
    "average": "average {run} {run} --output-dir averaged",
    "search": "search {made}/search.yaml --output-dir found --max-steps 2 --batch-size 8",
    "export": "export {run} --format mlx --output exported",
    "convert": "convert {run} converted --format vllm",
    "verify": "verify {run} {made}/merged",
    "mix": "mix {run} --method svd --r 1 --output-dir mixed",
    "extract": "extract {made}/merged {stock}/llama --output-dir extracted",
    "grid": "grid {made}/pipeline --adapters {made}/style --weights 0,1 --prompt a --output g.png",
    "report": "report {run}",
    "config": "config",
}
NOT_RUN = {"demo"}
"""`lorica demo` is `lorica train` on what travels with the package, and takes a minute."""


def test_every_command_is_watched():
    assert {*COMMANDS} - NOT_RUN <= {*COMMAND_LINES}


def test_the_watch_sees():
    import socket

    WATCHING[0] = True
    try:
        with pytest.raises(ConnectionError), socket.socket() as one:
            one.connect(("127.0.0.1", 9))
    finally:
        WATCHING[0] = False
    assert any("127.0.0.1" in text for text in SEEN)
    SEEN.clear()


@pytest.fixture(scope="module")
def made(stock, finished_run, tmp_path_factory):
    """What some commands are given: a merged model, a pipeline with an adapter, settings."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(finished_run), "--output-dir", str(folder / "merged")])
    assert ended.value.code == 0
    pipeline = load_model(tiny_pipelines.write("sd", folder / "pipeline"), task="text-to-image")
    save_adapter(attach(pipeline, LoRA(r=2, target_modules="to_q")), folder / "style")
    settings = {
        "model": str(stock / "llama"),
        "data": str(stock / "split"),
        "search": {"r": [1, 2]},
    }
    (folder / "search.yaml").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in NOT_RUN])
def test_no_socket(lorica, stock, quick, finished_run, made, monkeypatch, name):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    given = {"stock": stock, "run": finished_run, "made": made, "quick": " ".join(quick)}
    text = COMMAND_LINES[name].format(**given)
    SEEN.clear()
    WATCHING[0] = True
    try:
        done = lorica(*text.split())
    finally:
        WATCHING[0] = False
    assert done.code == 0, done.err
    assert SEEN == []
