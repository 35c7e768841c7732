"""Several processes under torchrun, and what they must leave behind: the bits of one."""

import os
import signal
import subprocess
import sys

LORICA = ("-m", "lorica")


def line_of(number, *words):
    """The command line that starts so many processes; `words` may begin with torchrun's own."""
    start = ["--standalone", "--nproc-per-node", number, *words]
    return [sys.executable, "-m", "torch.distributed.run", *map(str, start)]


def torchrun(number, *words, folder):
    """So many processes in a folder, run to their end."""
    return subprocess.run(line_of(number, *words), cwd=folder, capture_output=True, text=True)


def dying(step, number=signal.SIGKILL, *, when="True"):
    """The code of a command line that sends itself a signal at one of its steps; 0: at none.

    Args:
        when: an expression; where it is false nothing is sent.
    """
    return f"""
import os, sys
from lorica.train.engine import Engine
step, calls = Engine.step, []
def dying(self, *words):
    calls.append(1)
    if len(calls) == {step} and {when}: os.kill(os.getpid(), {int(number)})
    return step(self, *words)
Engine.step = dying
from lorica.cli import main; main(sys.argv[1:])
"""


def same_adapters(first, second):
    """The files of the adapters of two runs are the same, to the last bit."""
    folders = sorted((first / "adapters").iterdir())
    assert folders and [f.name for f in folders] == sorted(os.listdir(second / "adapters"))
    for folder in folders:
        other = second / "adapters" / folder.name
        for name in ("adapter_model.safetensors", "adapter_config.json", "lorica.json"):
            assert (folder / name).read_bytes() == (other / name).read_bytes(), (folder, name)
