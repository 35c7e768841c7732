"""A: adapter folders of strangers. Each is refused with the model as it was, or read in full."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from architectures import ARCHITECTURES
from bad_input.case import Case
from lorica.attach.attach import attach
from lorica.attach.handle import adapters
from lorica.base.known import Base
from lorica.errors import AdapterFileError, ConfigError, LoricaError, LoricaWarning
from lorica.files.adapter import CONFIG, PROVENANCE, WEIGHTS, load_adapter, save_adapter
from lorica.files.doubts import doubts
from lorica.files.safetensors_file import MAX_HEADER_BYTES, TensorFile
from lorica.methods.lora import LoRA

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def llama() -> nn.Module:
    return ARCHITECTURES["llama"].build()


@cache
def sound() -> dict[str, bytes]:
    """The files of an adapter on q_proj and v_proj, r = 3."""
    settings = LoRA(r=3, target_modules=("q_proj", "v_proj"), init_lora_weights="random")
    with TemporaryDirectory() as folder:
        save_adapter(attach(llama(), settings), Path(folder) / "x")
        return {name: (Path(folder) / "x" / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def written(folder: Path) -> Path:
    path = folder / "x"
    path.mkdir()
    for name, content in sound().items():
        (path / name).write_bytes(content)
    return path


def loading(
    change: Callable[[Path], object], *, on: Callable[[], nn.Module] = llama, **how: Any
) -> Callable:
    """A sound adapter folder, changed, to be loaded: within a second, and all or nothing."""

    def act(folder: Path) -> str:
        path, model = written(folder), on()
        change(path)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        began = time.monotonic()
        try:
            adapter = load_adapter(model, path, **how)
        except LoricaError:
            after = model.state_dict()
            assert not adapters(model) and before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert time.monotonic() - began < 5
            raise
        return f"{len(adapter.slots)} places read"

    return act


def config(**changes: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        found = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps({**found, **changes}))

    return change


def tensors(edit: Callable[[dict], object]) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        found = load_file(path / WEIGHTS)
        edit(found)
        save_file(found, path / WEIGHTS, metadata={"format": "pt"})

    return change


def content(name: str, raw: bytes) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(raw)


def header(raw: bytes | dict, data: int = 0, length: int | None = None) -> Callable:
    """A safetensors file with this header: refused by us before its data is looked at."""

    def act(folder: Path) -> str:
        text = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
        path = folder / "x.safetensors"
        size = len(text) if length is None else length
        path.write_bytes(struct.pack("<Q", size) + text + bytes(data))
        with TensorFile(path) as file:
            return f"{len(file.entries)} tensors"

    return act


def entry(shape: list, start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def place(make: Callable[[Path], object], name: str = WEIGHTS) -> Callable:
    """Something that is no plain file in the place of one."""

    def change(path: Path) -> None:
        (path / name).rename(path.parent / f"outside-{name}")
        make(path / name)

    return loading(change)


def _of_base(**facts: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = llama()
        model.__dict__["_lorica_base"] = Base(**{"task": "causal-lm", "digest": "", **facts})
        return model

    return build


def _other_digest(path: Path) -> None:
    (path / PROVENANCE).write_text('{"base": {"name": "org/base", "digest": "abc"}}')


def _other_name(folder: Path) -> str:
    """Another name alone may be the same model elsewhere: a warning."""
    path = written(folder)
    config(base_model_name_or_path="org/one")(path)
    try:
        load_adapter(_of_base(name="org/two")(), path)
    except LoricaWarning as warning:
        return f"warning: {warning}"
    raise AssertionError("nothing was said")


def _every_prefix(folder: Path) -> str:
    whole, path = sound()[WEIGHTS], folder / "cut.safetensors"
    for length in range(len(whole)):
        if length < 400 or length % 97 == 0 or length == len(whole) - 1:
            path.write_bytes(whole[:length])
            try:
                TensorFile(path)
            except AdapterFileError:
                continue
            raise AssertionError(f"{length} bytes of {len(whole)} were taken")
    return "no beginning of a file is taken for a file"


def _never_milder(folder: Path) -> str:
    """What we take, the library takes too."""
    whole, path, rng, taken = sound()[WEIGHTS], folder / "x.safetensors", random.Random(5), 0
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(600):
        raw = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5))):
            raw[rng.randrange(end)] = rng.randrange(256)
        path.write_bytes(raw)
        try:
            with TensorFile(path) as file:
                names = set(file.entries)
        except AdapterFileError:
            continue
        try:
            with safe_open(path, "pt") as library:
                assert set(library.keys()) == names
        except SafetensorError as error:
            raise AssertionError("taken here, refused by safetensors") from error
        taken += 1
    return f"600 changed headers: {600 - taken} refused; safetensors agrees on the others"


def _pickle(name: str) -> Callable:
    ran = []

    class Evil:
        def __reduce__(self) -> tuple:
            return ran.append, ("ran",)

    def change(path: Path) -> None:
        (path / WEIGHTS).unlink()
        torch.save({"a": 1}, path / name)

    act = loading(change)

    def checked(folder: Path) -> str:
        try:
            return act(folder)
        finally:
            assert not ran

    return checked


NAMES = (
    *("../x", "/abs", "a/b", "", ".", "..", "-rf", "a\0b", "a" * 300, "é", "a b", "..%2f", "a\\b"),
    *("%252e%252e", "C:", "a\n", "~", "$(x)", "a;b", "\u0430dapter", "x/", "./x", "a..\0", "*"),
)


def _names(folder: Path) -> str:
    path = written(folder)
    opened: list[str] = []
    sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
    for name in NAMES:
        try:
            load_adapter(llama(), path, name=name)
        except ConfigError:
            continue
        raise AssertionError(f"the name {name!r} was taken")
    beside = [p for p in opened if str(folder) in p and not p.startswith(str(path))]
    assert not beside, beside
    return f"{len(NAMES)} names refused, no file opened outside the folder"


def _swapped(folder: Path) -> str:
    """The file becomes a link to one outside, and back, while it is opened: never followed."""
    path, secret = written(folder) / WEIGHTS, folder / "secret.safetensors"
    plain, link = folder / "plain", folder / "link"
    shutil.copy(path, plain)
    save_file({"secret": torch.ones(3)}, secret)
    link.symlink_to(secret)
    stop = False

    def swap() -> None:
        while not stop:
            for source in (link, plain):
                fresh = folder / "fresh"
                if source is link:
                    fresh.symlink_to(secret)
                else:
                    os.link(plain, fresh)
                os.replace(fresh, path)

    thread = threading.Thread(target=swap)
    thread.start()
    outcomes = {"read": 0, "refused": 0}
    try:
        deadline = time.monotonic() + 30  # until both were met: threads may wait for each other
        while time.monotonic() < deadline and (
            sum(outcomes.values()) < 1_000 or 0 in outcomes.values()
        ):
            try:
                with TensorFile(path) as file:
                    assert "secret" not in file.entries
                outcomes["read"] += 1
            except AdapterFileError:
                outcomes["refused"] += 1
    finally:
        stop = True
        thread.join()
    assert outcomes["refused"], "it was never a link while it was opened"
    return "1,000 openings while it is swapped: 0 led outside"


def _not_imported(folder: Path) -> str:
    ran = folder / "ran"
    (folder / "evil_library.py").write_text(f"open({str(ran)!r}, 'w')")
    sys.path.insert(0, str(folder))
    mapping = {"base_model_class": "Evil", "parent_library": "evil_library"}
    try:
        told = loading(
            config(
                auto_mapping=mapping,
                megatron_core="evil_library",
                base_model_name_or_path="/etc/passwd",
            )
        )(folder)
    finally:
        sys.path.remove(str(folder))
    assert "evil_library" not in sys.modules and not ran.exists()
    return told


def _own_template(path: Path) -> None:
    (path / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    (path / "tokenizer_config.json").write_text("{")
    (path / "generation_config.json").write_text("[")


def _replaced_while_read(folder: Path) -> str:
    path = folder / WEIGHTS
    save_file({"a": torch.ones(300_000)}, path)
    with TensorFile(path) as file:
        os.truncate(path, 2_000)
        file.read("a")
    return "unseen"


def _bad(id: str, name: str, act: Callable, *says: str, error: type = AdapterFileError) -> Case:
    return Case(id, name, act, error, says)


def _fine(id: str, name: str, act: Callable, *says: str) -> Case:
    return Case(id, name, act, None, says or ("4 places read",))


def _spoil(value: float) -> Callable[[Path], object]:
    def edit(found: dict) -> None:
        found[f"{Q}.lora_B.weight"][1, 2] = value

    return tensors(edit)


@tensors
def _no_effect(found: dict) -> None:
    for key, tensor in found.items():
        if "lora_B" in key:
            tensor.zero_()


def doubting(change: Callable[[Path], object]) -> Callable:
    """A sound adapter folder, changed and loaded: what is said of it, as `eval` and `chat` do."""

    def act(folder: Path) -> str:
        path = written(folder)
        change(path)
        return " ".join(doubts(load_adapter(llama(), path))) or "no doubts"

    return act


def _turn(found: dict) -> None:
    found[f"{Q}.lora_A.weight"] = found[f"{Q}.lora_A.weight"].t().contiguous()


def _rename(found: dict) -> None:
    for key in list(found):
        found[key.replace("base_model.model.model.", "base_model.model.")] = found.pop(key)


ONE = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
TWICE = b"{" + ONE + b"," + ONE + b"}"
CASES = (
    _bad(
        "A-01",
        "weights of the base differ",
        loading(_other_digest, on=_of_base(name="b", digest="def")),
        "made for another base",
        "allow_other_base",
    ),
    Case(
        "A-01",
        "only the name of the base differs",
        _other_name,
        None,
        ("made for the base org/one, and this is org/two",),
    ),
    _bad(
        "A-01",
        "another architecture",
        loading(lambda path: None, on=lambda: ARCHITECTURES["gpt2"].build()),
        "does not fit this GPT2",
    ),
    _bad("A-02", "transposed", loading(tensors(_turn)), "the base needs (3, 36) and (36, 3)"),
    _bad(
        "A-02",
        "a rank that the config does not say",
        loading(config(r=4)),
        "rank 3, but the config says 4",
    ),
    _bad(
        "A-03",
        "A without B",
        loading(tensors(lambda found: found.pop(f"{Q}.lora_B.weight"))),
        "1 tensors are missing",
    ),
    _bad(
        "A-03",
        "a tensor too many",
        loading(tensors(lambda found: found.update(extra=torch.ones(2)))),
        "have no place",
    ),
    _bad("A-03", "another prefix", loading(tensors(_rename)), "8 tensors", "mend: "),
    *(
        _bad("A-04", f"a value that is {value}", loading(_spoil(float(value))), "NaN or infinite")
        for value in ("nan", "inf", "-inf")
    ),
    Case("A-04", "a B of zeros", doubting(_no_effect), None, ("it changes nothing",)),
    Case("A-04", "a value of 20,000", doubting(_spoil(2e4)), None, ("up to 2e+04", "stable?")),
    Case("A-04", "nothing to wonder at", doubting(_spoil(2.0)), None, ("no doubts",)),
    Case("A-05", "every beginning of a file", _every_prefix, None, ("no beginning",)),
    _bad("A-06", "a header of no bytes", header(b"", length=0), "a header of 0 bytes"),
    _bad(
        "A-06",
        "a header longer than the file",
        header(b"{}", length=1_000),
        "a header of 1,000 bytes in a file of 10",
    ),
    _bad(
        "A-06", "a header of 2**63 bytes", header(b"{}", length=2**63), "9,223,372,036,854,775,808"
    ),
    _bad(
        "A-06",
        "a header of more than 8 MiB",
        header(b"{" + b" " * MAX_HEADER_BYTES + b"}"),
        "8,388,608",
    ),
    _bad(
        "A-06",
        "20,001 tensors",
        header({str(i): entry([1], 4 * i, 4 * i + 4) for i in range(20_001)}, 80_004),
        "20,001 tensors",
    ),
    *(
        _bad("A-07", name, header(raw, data), words)
        for name, raw, data, words in (
            ("a key twice", TWICE, 4, "occurs twice"),
            ("overlap", {"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "overlaps"),
            ("the same bytes", {"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, 8, "overlaps"),
            ("a hole", {"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12, "after a hole"),
            ("bytes left over", {"a": entry([1], 0, 4)}, 5, "the data at byte 5"),
            ("a negative shape", {"a": entry([-1, -1], 0, 4)}, 4, "whole numbers"),
            (
                "a shape that wraps in 64 bits",
                {"a": entry([4194305, 4194305, 211106198978564], 0, 16)},
                16,
                "where its shape needs",
            ),
            ("no elements", {"a": entry([0], 0, 0)}, 0, "is empty"),
            ("10,000 dimensions", {"a": entry([1] * 10_000, 0, 4)}, 4, "at most 8"),
            ("an unknown dtype", {"a": entry([1], 0, 4, "F31")}, 4, "'F31'"),
            ("four bits", {"a": entry([8], 0, 4, "F4")}, 4, "'F4'"),
            ("eight bits", {"a": entry([4], 0, 4, "F8_E4M3")}, 4, "'F8_E4M3'"),
            ("not UTF-8", b'{"\xff":1}', 0, "no proper JSON"),
            ("20,000 levels", b'{"a":' * 20_000, 0, "no proper JSON"),
            ("metadata of numbers", {"__metadata__": {"a": 1}}, 0, "no table of strings"),
        )
    ),
    Case("A-07", "600 headers, changed at random", _never_milder, None, ("safetensors agrees",)),
    _bad(
        "A-08",
        "adapter_model.bin",
        _pickle("adapter_model.bin"),
        "is a pickle",
        "weights_only=True",
    ),
    _bad("A-08", "a pickle under the name of safetensors", _pickle(WEIGHTS), "pickle or a zip"),
    Case("A-09", "names that would leave the folder", _names, None, ("names refused",)),
    _bad(
        "A-10",
        "a link out of the folder",
        place(lambda path: path.symlink_to("../outside-" + WEIGHTS)),
        "leads out of its folder",
    ),
    _bad(
        "A-10",
        "a config that is a link to /etc/hostname",
        place(lambda path: path.symlink_to("/etc/hostname"), CONFIG),
        "leads out of its folder",
    ),
    Case("A-10", "swapped for a link while it is opened", _swapped, None, ("0 led outside",)),
    _bad("A-11", "a FIFO", place(os.mkfifo), "not a regular file"),
    _bad(
        "A-11",
        "/dev/zero",
        place(lambda path: path.symlink_to("/dev/zero")),
        "leads out of its folder",
    ),
    _bad("A-11", "a folder", place(Path.mkdir), "not a regular file"),
    _bad("A-12", "r = 1,000,000,000 in the config", loading(config(r=10**9)), "r is 1000000000"),
    _bad(
        "A-12",
        "a header that claims 4 TB",
        header({"a": entry([2**40], 0, 2**42)}, 16),
        "end at byte",
    ),
    _bad(
        "A-12",
        "a file of 17 GB",
        loading(lambda path: os.truncate(path / WEIGHTS, 17 << 30)),
        "at most 17,179,869,184",
    ),
    _bad(
        "A-13",
        "a config of 50 MB",
        loading(content(CONFIG, b'{"x": "' + b"a" * 50_000_000 + b'"}')),
        "larger than 64 KiB",
    ),
    _bad(
        "A-13",
        "a config of 3,000 levels",
        loading(content(CONFIG, b'{"a":' * 3_000)),
        "no proper JSON",
    ),
    _bad(
        "A-13",
        "a key twice in the config",
        loading(content(CONFIG, b'{"peft_type": "LORA", "r": 8, "r": 4}')),
        "occurs twice",
    ),
    *(
        _bad("A-13", name, loading(config(**changes)), words)
        for name, changes, words in (
            ("another method", {"peft_type": "OFT"}, "of PEFT's LORA, VERA"),
            ("r as text", {"r": "8"}, "of the wrong type"),
            ("a negative alpha", {"lora_alpha": -4}, "lora_alpha"),
            ("DoRA without its tensors", {"use_dora": True}, "lora_magnitude_vector"),
            ("an unknown setting", {"use_magic": 3}, "use_magic"),
            ("a misspelt setting", {"use_rslra": True}, "did the writer mean use_rslora?"),
        )
    ),
    _bad(
        "A-13",
        "four problems at once",
        loading(config(use_dora="yes", lora_bias=True, whatever=1, r="x")),
        "use_dora",
        "lora_bias",
        "whatever",
        "r is 'x'",
    ),
    _bad(
        "A-13",
        "rank_pattern with 1,000,000 entries",
        loading(config(rank_pattern={f"a{i}": 1 for i in range(100_000)})),
        "larger than 64 KiB",
    ),
    _fine("A-14", "modules to import and a base elsewhere", _not_imported),
    _bad(
        "A-15",
        "init_lora_weights: pissa",
        loading(config(init_lora_weights="pissa")),
        "changed the base",
    ),
    _fine("A-15", "init_lora_weights: eva", loading(config(init_lora_weights="eva"))),
    _fine("A-16", "a template and a tokenizer of its own", loading(_own_template)),
    _bad(
        "A-17",
        "an exponential pattern",
        loading(config(target_modules=r"(\w+\.?)+X", rank_pattern={r"(.*a){30}": 3})),
        "x",
    ),
    _bad("A-19", "cut off while it is read", _replaced_while_read, "became shorter"),
)
