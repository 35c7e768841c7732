"""The twins run in Triton's interpreter on a CPU, or compiled on a CUDA device.

The interpreter has to be chosen before Triton is imported, and then for the whole process; so
`tests/ops/test_triton_twins.py` runs the files of this folder in processes of their own. In any
other process they are collected only where there is a CUDA device, and then marked `gpu`.
"""

import os
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETS and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not INTERPRETS and item.path.parent.name == "triton":
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETS else "cuda")


@pytest.fixture(autouse=True)
def _quiet():
    """A GPU says nothing of exp(large): neither shall NumPy, which the interpreter computes in."""
    with np.errstate(all="ignore"):
        yield


def _mend_bfloat16() -> None:
    """Let the interpreter treat bfloat16 as a GPU does.

    Triton 3.7's holds it as 16 unsigned bits. It multiplies matrices of these bits as if they were
    integers, and cuts a float32 off where hardware rounds to nearest even.
    """
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def wide(handle: Any) -> np.ndarray:
        if handle.dtype.scalar != bfloat16:
            return handle.data
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def cast_impl(self: Any, handle: Any, to: Any) -> Any:
        if handle.dtype.scalar != float32 or to.scalar != bfloat16:
            return cast(self, handle, to)
        values = torch.from_numpy(np.ascontiguousarray(handle.data)).bfloat16()
        bits = values.view(torch.int16).numpy().view(np.uint16).reshape(handle.data.shape)
        return TensorHandle(bits, bfloat16)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        product = np.matmul(wide(a), wide(b), dtype=d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot


if INTERPRETS:
    _mend_bfloat16()
