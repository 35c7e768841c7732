"""No command opens a socket: nothing is fetched, nothing is reported to anybody."""

import sys

import pytest

from lorica.cli import COMMANDS

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


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in NOT_RUN])
def test_no_socket(lorica, stock, quick, finished_run, monkeypatch, name):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    text = COMMAND_LINES[name].format(stock=stock, run=finished_run, quick=" ".join(quick))
    SEEN.clear()
    WATCHING[0] = True
    try:
        done = lorica(*text.split())
    finally:
        WATCHING[0] = False
    assert done.code == 0, done.err
    assert SEEN == []
