import os
import random
import stat

import pytest
import torch
from safetensors.torch import load_file

from lorica.errors import AdapterFileError
from lorica.files.safetensors_file import DTYPES, TensorFile, write_tensors


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "b.lora_A.weight": torch.randn(3, 7, generator=generator),
        "a.lora_B.weight": torch.randn(11, 3, generator=generator),
        "half": torch.randn(5, 1, 3, generator=generator).bfloat16(),
        "double": torch.randn(1, generator=generator, dtype=torch.float64),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
    }


def test_what_is_written_is_read_and_the_library_agrees(tmp_path):
    path = write_tensors(tmp_path / "x.safetensors", tensors())
    with TensorFile(path) as file:
        read = {name: file.read(name) for name in file.entries}
    library = load_file(path)
    assert set(read) == set(library) == set(tensors())
    for name, tensor in tensors().items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
        assert torch.equal(library[name], tensor)


def test_equal_tensors_give_equal_bytes(tmp_path):
    first = write_tensors(tmp_path / "1", tensors()).read_bytes()
    shuffled = list(tensors().items())
    for seed in range(5):
        random.Random(seed).shuffle(shuffled)
        strided = {n: t.t().contiguous().t() if t.dim() == 2 else t for n, t in shuffled}
        assert write_tensors(tmp_path / "2", strided).read_bytes() == first
    assert b'"format":"pt"' in first


def test_files_can_be_read_by_others(tmp_path):
    before = os.umask(0o077)
    try:
        path = write_tensors(tmp_path / "x", tensors())
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_what_is_not_written(tmp_path):
    bad = {
        "empty": torch.empty(0, 4),
        "nowhere": torch.empty(2, device="meta"),
        "nan": torch.tensor([1.0, float("nan")]),
        **{f"inf{i}": torch.tensor([float("inf")]) for i in range(5)},
    }
    with pytest.raises(AdapterFileError) as caught:
        write_tensors(tmp_path / "x", bad)
    assert len(caught.value.problems) == 6 and caught.value.problems[-1] == "and 3 more"
    assert not list(tmp_path.iterdir())


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = write_tensors(tmp_path / "x", {"a": torch.ones(40_000)})
    with TensorFile(path) as file:
        os.truncate(path, 9_000)
        with pytest.raises(AdapterFileError, match="became shorter"):
            file.read("a")


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_of_the_list(name, tmp_path):
    tensor = torch.arange(-6, 7).to(DTYPES[name])
    with TensorFile(write_tensors(tmp_path / "x", {"a": tensor})) as file:
        assert file.entries["a"].dtype == DTYPES[name] and torch.equal(file.read("a"), tensor)
