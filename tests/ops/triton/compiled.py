"""Compile every kernel for a GPU that need not be there, and say what it would use.

    python tests/ops/triton/compiled.py 90

The argument is a compute capability. The twins run on tensors of the CPU, but what they launch is
compiled instead: with the very arguments, so with the specialisations of a real run. A line for
each: kernel, bytes of registers that spill into memory, bytes of shared memory, constants.
"""

import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lorica.base.four_bit import NF4
from lorica.ops.lora import Segment
from lorica.ops.packed import Packed
from lorica.ops.triton import cross_entropy, four_bit, lora, rms_norm, rope, swiglu
from lorica.ops.triton.choose import TWINS

DUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Absent:
    """The driver of a device of this compute capability that can only be compiled for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    made = kernel.run(*arguments, grid=grid, warmup=True, **constants)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.run([DUMP, "-res-usage", file.name], capture_output=True, text=True)
    stack = re.search(r"STACK:(\d+)", said.stdout)
    assert stack is not None, said
    print(kernel.fn.__name__, stack[1], made.metadata.shared, constants)


def tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, requires_grad=True)


def by_elements(dtype: torch.dtype) -> None:
    """The kernels without matrix products, forward and backward, at the widths of real models."""
    swiglu.swiglu(*(tensor(8, 2048, dtype=dtype) for _ in range(2))).sum().backward()
    for width in (128, 4096, 8192):
        weight = tensor(width, dtype=dtype).detach()
        rms_norm.rms_norm(tensor(8, width, dtype=dtype), weight, 1e-5).sum().backward()
    q, k = (tensor(2, heads, 16, 128, dtype=dtype) for heads in (32, 8))
    angles = torch.zeros(1, 16, 128, dtype=dtype)
    torch.cat(rope.rotate(q, k, angles, angles), 1).sum().backward()
    head = tensor(8192, 64, dtype=dtype).detach()
    targets = torch.zeros(16, dtype=torch.long)
    cross_entropy.linear_cross_entropy(tensor(16, 64, dtype=dtype), head, targets).sum().backward()


def products(dtype: torch.dtype) -> None:
    """The kernels of LoRA and of four-bit weights, at the sizes that have their own tiles."""
    for rank in (16, 32, 64):
        segments = [
            Segment(a, a + 512, tensor(rank, 1024, dtype=dtype), tensor(1024, rank, dtype=dtype))
            for a in (0, 512)
        ]
        x, y = (tensor(1024, 1024, dtype=dtype) for _ in range(2))
        adapted = lora.lora_linear(x, y * 1, segments)
        assert adapted is not None
        adapted.sum().backward()
    for kind in (NF4(), NF4(32), NF4(64, double_quant=False)):  # with tiles of their own
        stored = kind.pack(torch.ones(512, 512))
        weight = Packed((512, 512), dtype, stored, kind.unpack, kind.form())
        for rows, transposed in ((1, False), (64, False), (128, True)):
            x = tensor(rows, 512, dtype=dtype).detach()
            four_bit.multiplied(x, weight, transposed=transposed)


def main() -> None:
    driver.set_active(Absent(int(sys.argv[1])))
    for file in (*(name for name in TWINS if name != "lora"), "lora_kernels"):
        import_module(f"lorica.ops.triton.{file}").launch = compile_only  # pyright: ignore
    by_elements(torch.bfloat16)
    by_elements(torch.float32)
    products(torch.bfloat16)  # in float32 torch multiplies


if __name__ == "__main__":
    main()
