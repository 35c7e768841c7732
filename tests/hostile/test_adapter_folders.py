"""Adapter folders from strangers: everything that is not exactly right is refused, and the model
stays as it was.
"""

import json
import os
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from architectures import ARCHITECTURES
from lorica.attach.attach import attach
from lorica.attach.handle import adapters
from lorica.attach.site import is_site
from lorica.errors import AdapterFileError, ConfigError, LoricaError
from lorica.files.adapter import CONFIG, PROVENANCE, WEIGHTS, load_adapter, save_adapter
from lorica.files.safetensors_file import MAX_HEADER_BYTES, MAX_TENSORS, TensorFile
from lorica.methods import LoReFT, PrefixTuning, PromptTuning
from lorica.methods.lora import LoRA

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def llama() -> nn.Module:
    return ARCHITECTURES["llama"].build()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound adapter folder on q_proj and v_proj, r = 3."""
    model = llama()
    adapter = attach(
        model, LoRA(r=3, target_modules=("q_proj", "v_proj"), init_lora_weights="random")
    )
    save_adapter(adapter, tmp_path / "x")
    return tmp_path / "x"


def refused(folder: Path, match: str | None = None) -> LoricaError:
    """The error of loading; checks that the model is as it was before."""
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AdapterFileError, match=match) as caught:
        load_adapter(model, folder)
    assert not adapters(model) and not any(is_site(m) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    return caught.value


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def craft(path: Path, header: dict | bytes, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(shape: list, start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


# --- the safetensors file -------------------------------------------------------------------------


def test_every_prefix_of_a_file_is_refused(folder, tmp_path):
    whole = (folder / WEIGHTS).read_bytes()[:]
    cut = tmp_path / "cut.safetensors"
    for length in [*range(0, 1200), *range(1200, len(whole), 97), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(AdapterFileError):
            TensorFile(cut)


def test_changed_bytes_never_pass_where_the_library_refuses(folder, tmp_path):
    """400 files with bytes of the header changed: never another exception, never milder than
    safetensors.
    """
    whole = (folder / WEIGHTS).read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(5)
    path = tmp_path / "changed.safetensors"
    for _ in range(400):
        raw = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 5))):
            raw[draw.randrange(header_end)] = draw.randrange(256)
        path.write_bytes(raw)
        try:
            with TensorFile(path) as file:
                for name in file.entries:
                    file.read(name)
        except AdapterFileError:
            continue
        with safe_open(path, "pt") as library:  # must not raise
            assert set(library.keys()) == set(file.entries)


HEADERS = {
    "zero length": (b"", b"", 0),
    "longer than the file": (b"{}", b"", 1000),
    "2 ** 63": (b"{}", b"", 2**63),
    "over the cap": (b"{" + b" " * (MAX_HEADER_BYTES + 8) + b"}", b"", None),
    "no brace first": (b' {"a":1}', b"", None),
    "no JSON": (b"{nonsense", b"", None),
    "a list": (b"{}[]", b"", None),
    "not UTF-8": (b'{"\xff":1}', b"", None),
    "deep": (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, b"", None),
    "NaN": (b'{"a": NaN}', b"", None),
    "a key twice": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
        None,
    ),
    "a field twice": (
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
        None,
    ),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": entry([1], 0, 4)}, bytes(4), None),
    "a digit too long": (b'{"a":{"dtype":"F32","shape":[1' + b"0" * 5000 + b"]}}", b"", None),
}
ENTRIES = {
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12),
    "the same bytes": ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, 8),
    "a hole": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12),
    "a hole at the start": ({"a": entry([1], 4, 8)}, 8),
    "trailing bytes": ({"a": entry([1], 0, 4)}, 5),
    "too few bytes": ({"a": entry([2], 0, 8)}, 7),
    "end before start": ({"a": entry([1], 4, 0)}, 4),
    "negative": ({"a": entry([1], -4, 0)}, 4),
    "negative shape": ({"a": entry([-1, -1], 0, 4)}, 4),
    "shape that wraps in 64 bits": (
        {"a": entry([4194305, 4194305, 211106198978564], 0, 16)},
        16,
    ),
    "shape and bytes differ": ({"a": entry([3], 0, 8)}, 8),
    "true for 1": ({"a": entry([True], 0, 4)}, 4),
    "a fraction": ({"a": entry([1.0], 0, 4)}, 4),
    "no list": ({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, 4),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, 4),
    "a field too many": ({"a": {**entry([1], 0, 4), "more": 1}}, 4),
    "empty": ({"a": entry([0], 0, 0)}, 0),
    "10,000 dimensions": ({"a": entry([1] * 10_000, 0, 4)}, 4),
    "unknown dtype": ({"a": entry([1], 0, 4, "F31")}, 4),
    "eight bit float": ({"a": entry([4], 0, 4, "F8_E4M3")}, 4),
    "four bit float": ({"a": entry([8], 0, 4, "F4")}, 4),
    "integers": ({"a": entry([1], 0, 4, "I32")}, 4),
    "an entry that is a number": ({"a": 7}, 0),
    "too many": (
        {str(i): entry([1], 4 * i, 4 * i + 4) for i in range(MAX_TENSORS + 1)},
        4 * MAX_TENSORS + 4,
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_bad_headers(case, tmp_path):
    header, data, length = HEADERS[case]
    with pytest.raises(AdapterFileError):
        TensorFile(craft(tmp_path / "x.safetensors", header, data, length))


@pytest.mark.parametrize("case", ENTRIES)
def test_bad_entries(case, tmp_path):
    header, size = ENTRIES[case]
    with pytest.raises(AdapterFileError):
        TensorFile(craft(tmp_path / "x.safetensors", header, bytes(size)))


def test_a_claim_of_terabytes_allocates_nothing(tmp_path):
    path = craft(tmp_path / "x.safetensors", {"a": entry([2**40], 0, 2**42)}, bytes(16))
    started = time.perf_counter()
    with pytest.raises(AdapterFileError, match="end at byte"):
        TensorFile(path)
    assert time.perf_counter() - started < 1


def test_a_sparse_file_of_many_gigabytes_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.truncate(17 * 2**30)
    with pytest.raises(AdapterFileError, match="at most"):
        TensorFile(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers(folder, value):
    def spoil(tensors):
        tensors[f"{Q}.lora_B.weight"][1, 2] = value

    edit_tensors(folder, spoil)
    refused(folder, "NaN or infinite")


# --- what is not a file, or not ours to read ------------------------------------------------------


def test_fifos_devices_folders_and_links_out(folder, tmp_path):
    path = folder / WEIGHTS
    outside = shutil.move(path, tmp_path / "outside.safetensors")
    os.mkfifo(path)
    refused(folder, "not a regular file")
    path.unlink()
    path.mkdir()
    refused(folder, "not a regular file")
    path.rmdir()
    for target in ("/dev/zero", outside, "/etc/hostname", "../outside.safetensors"):
        path.symlink_to(target)
        refused(folder, "leads out of its folder")
        path.unlink()
    path.symlink_to(folder / "nothing")
    refused(folder, "lacks|does not exist")


def test_links_of_a_hub_cache_are_followed(folder, tmp_path):
    snapshot, blobs = tmp_path / "m" / "snapshots" / "abc", tmp_path / "m" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, name in enumerate((CONFIG, WEIGHTS)):
        shutil.copy(folder / name, blobs / str(i))
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    assert load_adapter(llama(), snapshot).num_parameters > 0
    (tmp_path / "m" / "evil").write_bytes((folder / WEIGHTS).read_bytes())
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to("../../evil")
    refused(snapshot, "leads out of its folder")


def test_pickles_are_never_loaded(folder, tmp_path):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {ran}",)

    torch.save({"a": Evil()}, folder / "adapter_model.bin")
    shutil.copy(folder / "adapter_model.bin", folder / WEIGHTS)  # under the name of safetensors
    refused(folder, "pickle or a zip")
    (folder / WEIGHTS).unlink()
    error = refused(folder, "is a pickle")
    assert "weights_only=True" in (error.mend or "")
    assert not ran.exists()


def test_an_old_adapter_of_the_wild_is_refused_for_its_pickle(shared_data):
    refused(
        shared_data / "models" / "foreign_adapters" / "bloom_lora", "adapter_model.bin is a pickle"
    )


def test_what_is_no_adapter_folder(folder, tmp_path):
    refused(tmp_path / "nothing", "there is no folder")
    outer = tmp_path / "run"
    outer.mkdir()
    shutil.copytree(folder, outer / "adapter")
    assert "adapter?" in (refused(outer, "is no adapter").mend or "")
    (folder / CONFIG).unlink()
    refused(folder, "lacks adapter_config.json")


# --- the config -----------------------------------------------------------------------------------

CONFIGS = {
    "another method": ({"peft_type": "OFT"}, "peft_type"),
    "no method": ({"peft_type": None}, "peft_type"),
    "r as text": ({"r": "8"}, "wrong type"),
    "r true": ({"r": True}, "wrong type"),
    "r negative": ({"r": -1}, "whole number from 1"),
    "r enormous": ({"r": 10**9}, "whole number from 1"),
    "alpha negative": ({"lora_alpha": -4}, "lora_alpha"),
    "alpha in a pattern": ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern"),
    "rank in a pattern": ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern"),
    "dropout": ({"lora_dropout": 1.5}, "lora_dropout"),
    "dora without magnitudes": ({"use_dora": True}, "lora_magnitude_vector"),
    "bias": ({"bias": "lora_only"}, "biases"),
    "bias on B": ({"lora_bias": True}, "lora_B"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "sequence"),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, "deeper"),
    "tokens": ({"trainable_token_indices": [5]}, "embed_tokens.token_adapter"),
    "unknown and set": ({"use_magic": 3}, "use_magic"),
    "near a known key": ({"use_rslra": True}, "use_rslora"),
    "old merged linear": ({"enable_lora": [True, False, True]}, "enable_lora"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "changed the base"),
    "olora": ({"init_lora_weights": "olora"}, "path_initial_model"),
    "loftq": ({"init_lora_weights": "loftq"}, "changed the base"),
    "unknown init": ({"init_lora_weights": "magic"}, "init_lora_weights"),
    "numbers as targets": ({"target_modules": [3]}, "no name"),
    "text as layers": ({"layers_to_transform": ["0"]}, "layers_to_transform"),
    "look-around": ({"target_modules": r"(?<=q)_proj"}, "cannot be read"),
    "a pattern of 5,000": ({"target_modules": "(" + "a" * 5000 + ")"}, "characters"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_configs(case, folder):
    changes, word = CONFIGS[case]
    edit_config(folder, **changes)
    assert word in str(refused(folder))


def test_all_problems_of_a_config_are_told_at_once(folder):
    edit_config(folder, use_dora="yes", lora_bias=True, whatever=1, r="x")
    assert len(refused(folder).problems) == 4


RAW_CONFIGS = {
    "empty": b"",
    "no object": b"[1]",
    "deep": b'{"a":' * 3000 + b"1" + b"}" * 3000,
    "a key twice": b'{"peft_type": "LORA", "r": 8, "r": 4}',
    "NaN": b'{"peft_type": "LORA", "lora_alpha": NaN}',
    "not UTF-8": b'{"peft_type": "LOR\xff"}',
    "50 MB": b'{"peft_type": "LORA", "x": "' + b"a" * 50_000_000 + b'"}',
}


@pytest.mark.parametrize("case", RAW_CONFIGS)
def test_bad_bytes_of_a_config(case, folder):
    (folder / CONFIG).write_bytes(RAW_CONFIGS[case])
    refused(folder)


def test_patterns_cannot_be_slow(folder):
    started = time.perf_counter()
    edit_config(
        folder,
        target_modules=r"(\w+\.?)+X",
        rank_pattern={r"(.*a){30}": 3, r"(a|a)*b": 3},
    )
    refused(folder)
    assert time.perf_counter() - started < 10


def test_neutral_values_of_other_features_are_accepted(folder):
    edit_config(
        folder,
        use_new_thing=False,
        another=None,
        list_of=[],
        loftq_config=None,
        eva_config={"rho": 2},
    )
    assert load_adapter(llama(), folder).name == "default"


def test_modules_that_a_config_names_are_not_imported(folder, tmp_path, monkeypatch):
    (tmp_path / "evil_library.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    edit_config(
        folder,
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil_library"},
        megatron_core="evil_library",
        base_model_name_or_path="/etc/passwd",
    )
    assert load_adapter(llama(), folder).base["name"] == "/etc/passwd"


# --- tensors that do not fit ----------------------------------------------------------------------


def test_a_factor_without_the_other(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(f"{Q}.lora_B.weight"))
    assert "1 tensors are missing" in str(refused(folder, "does not fit"))


def test_a_place_without_tensors(folder):
    def drop(tensors):
        for factor in "AB":
            del tensors[f"{Q}.lora_{factor}.weight"]

    edit_tensors(folder, drop)
    assert f"{Q}: its two factors" in str(refused(folder))


def test_tensors_that_the_config_does_not_name(folder):
    edit_config(folder, target_modules=["v_proj"])
    error = str(refused(folder))
    assert "2 tensors of the file have no place" in error and "does not name" in error


def test_a_tensor_too_many(folder):
    edit_tensors(
        folder, lambda tensors: tensors.update({"base_model.model.extra.weight": torch.ones(2)})
    )
    assert "no such parameter" in str(refused(folder))


def test_a_parameter_of_the_base_is_not_overwritten(folder):
    """A key that names a base weight outside modules_to_save."""
    key = "base_model.model.model.norm.weight"
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.ones(36)}))
    assert "modules_to_save" in str(refused(folder))


@pytest.mark.parametrize("factor", ["A", "B"])
def test_transposed_factors(folder, factor):
    def turn(tensors):
        key = f"{Q}.lora_{factor}.weight"
        tensors[key] = tensors[key].t().contiguous()

    edit_tensors(folder, turn)
    assert "the base needs (3, 36) and (36, 3)" in str(refused(folder))


def test_a_rank_that_the_config_does_not_say(folder):
    edit_config(folder, r=4)
    assert "rank 3, but the config says 4" in str(refused(folder))


def test_the_wrong_prefix_is_explained(folder):
    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace("base_model.model.model.", "base_model.model.")] = tensors.pop(key)

    edit_tensors(folder, rename)
    error = refused(folder)
    assert "model.model" in (error.mend or "") and "8 tensors" in str(error)


def test_an_adapter_of_the_whole_on_the_bare_backbone(folder):
    model = llama().model
    with pytest.raises(AdapterFileError) as caught:
        load_adapter(model, folder)
    assert "'model'" in (caught.value.mend or "") and "this model lacks" in (
        caught.value.mend or ""
    )


def test_other_layouts_are_named(folder):
    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace(".lora_A.weight", ".lora_A.default.weight")] = tensors.pop(key)

    edit_tensors(folder, rename)
    assert "adapter's name inside the key" in str(refused(folder))


def test_an_empty_file(folder):
    craft(folder / WEIGHTS, {})
    assert "are missing" in str(refused(folder))
    edit_config(folder, target_modules=None)
    assert "holds no tensors" in str(refused(folder))


def test_an_adapter_for_more_layers_than_the_base_has(folder):
    def add(tensors):
        for factor in "AB":
            key = f"{Q}.lora_{factor}.weight"
            tensors[key.replace("layers.0", "layers.7")] = tensors[key].clone()

    edit_tensors(folder, add)
    assert "the base has no such module" in str(refused(folder))


def test_names_that_try_to_escape(folder):
    for name in ("../x", "/abs", "a/b", "", ".", "-rf", "a\x00b", "a" * 300, "é", "a b"):
        with pytest.raises(ConfigError):
            load_adapter(llama(), folder, name=name)


def test_our_own_extra_file_is_read_with_the_same_care(folder):
    (folder / PROVENANCE).write_text('{"base": {"digest": 5, "name": ["x"]}}')
    assert load_adapter(llama(), folder).base.get("digest") is None
    (folder / PROVENANCE).write_text("{")
    refused(folder, "no proper JSON")
    (folder / PROVENANCE).unlink()
    assert load_adapter(llama(), folder).num_parameters > 0


def test_edits_without_the_place_that_finds_their_tokens_are_refused(tmp_path):
    save_adapter(attach(llama(), LoReFT(r=2)), tmp_path / "x")
    config = json.loads((tmp_path / "x" / CONFIG).read_text())
    whole = dict(config["places"])
    edit_config(tmp_path / "x", places={k: v for k, v in whole.items() if k != "model"})
    assert "model: has no entry" in str(refused(tmp_path / "x"))
    edit_config(tmp_path / "x", places=whole, settings={**config["settings"], "r": 3})
    assert "this base needs" in str(refused(tmp_path / "x"))


def test_a_number_of_virtual_tokens_takes_no_memory(tmp_path):
    model = ARCHITECTURES["t5"].build()
    save_adapter(attach(model, PrefixTuning(num_virtual_tokens=3)), tmp_path / "x")
    config = json.loads((tmp_path / "x" / CONFIG).read_text())
    settings = {**config["settings"], "num_virtual_tokens": 65536, "prefix_projection": True}
    edit_config(tmp_path / "x", settings={**settings, "encoder_hidden_size": 65536})
    tracked = torch.zeros(1)
    with pytest.raises(AdapterFileError, match="missing from the file"):
        load_adapter(ARCHITECTURES["t5"].build(), tmp_path / "x")
    assert type(torch.empty(1)) is type(tracked)


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.full((4, 36), torch.nan), "not finite|NaN|finite"),
        (torch.zeros(4, 35), r"\(4, 35\), but this base needs \(4, 36\)"),
        (torch.zeros(4, 36, dtype=torch.int64), "int64 is no type of trained numbers"),
    ],
)
def test_virtual_tokens_that_are_none(tensor, match, tmp_path):
    save_adapter(attach(llama(), PromptTuning(num_virtual_tokens=4)), tmp_path / "x")
    save_file({"prompt_embeddings": tensor}, tmp_path / "x" / WEIGHTS)
    refused(tmp_path / "x", match)
