"""The Triton twins without a GPU: their tests in the interpreter, and every kernel compiled.

The interpreter shows that a kernel computes the right thing, but it takes what the compiler refuses
(a variable that changes its shape in a loop) and knows no limits. So every kernel is compiled for
real GPUs besides, which needs none; what it would use of them is read from the machine code.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lorica.ops.triton.choose import TWINS, twin

HERE = Path(__file__).parent
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""What a program may have of it on an A100 and on an H100 or H200, bytes."""

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def python(*arguments: str, **environment: str) -> str:
    """The output of a Python process of its own, which has to end well."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TRITON"))}
    paths = [str(HERE.parents[1] / "src"), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    own |= {"PYTHONPATH": os.pathsep.join(paths)} | environment
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=own, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


@needs_triton
def test_all_of_them_in_the_interpreter():
    """One process for all files: most of its time is importing."""
    options = ["-q", "--tb=short", "-p", "no:cacheprovider"]
    said = python("-m", "pytest", *options, str(HERE / "triton"), TRITON_INTERPRET="1")
    assert re.search(r"\d+ passed", said) and "skipped" not in said, said


@needs_triton
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_kernel_compiles_and_keeps_to_the_limits(capability, tmp_path):
    script = str(HERE / "triton" / "compiled.py")
    said = python(script, str(capability), TRITON_CACHE_DIR=str(tmp_path))
    rows = [line.split() for line in said.splitlines()]
    sources = (Path(path).read_text() for path in kernel_files())
    written = {
        name for text in sources for name in re.findall(r"^@triton.jit\ndef (\w+)", text, re.M)
    }
    assert {row[0] for row in rows} == written - {"_turn_heads", "_numbers"}  # called by others
    spilled = [row for row in rows if int(row[1])]
    assert not spilled, f"registers that spill into memory: {spilled}"
    assert max(int(row[2]) for row in rows) <= SHARED_MEMORY[capability]


def kernel_files() -> list[str]:
    import lorica.ops.triton as folder

    return [str(path) for path in Path(folder.__path__[0]).glob("*.py")]


def test_every_file_of_twins_is_in_the_table():
    helpers = {"__init__", "choose", "launch", "lora_kernels"}
    assert {Path(path).stem for path in kernel_files()} == helpers | set(TWINS)


@pytest.mark.parametrize("op", [name for names in TWINS.values() for name in names])
def test_a_cpu_takes_the_torch_path(op):
    assert twin(op, torch.zeros(1, dtype=torch.bfloat16)) is None


def test_an_op_without_a_twin_is_a_mistake():
    with pytest.raises(KeyError):
        twin("no such op", torch.zeros(1))
