"""M: base models, their tokenizers and templates."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bad_input.case import Case
from data.chat_templates import byte_tokenizer
from lorica.base import hub
from lorica.base.known import base_of
from lorica.base.load import load_model
from lorica.base.tokenizer import load_tokenizer
from lorica.data import budget
from lorica.data.encode import CausalEncoder
from lorica.data.template import ChatTemplate
from lorica.errors import BaseModelError, DataError

INDEX = "model.safetensors.index.json"
SHARD = "model-0000{}-of-00002.safetensors"


@cache
def sound() -> Path:
    """A small llama with a byte-level tokenizer."""
    folder = Path(mkdtemp(prefix="lorica-base-"))
    tokenizer = byte_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loading(change: Callable[[Path], object]) -> Callable:
    """A sound base, changed, to be loaded; no code of its own runs."""

    def act(folder: Path) -> str:
        path = folder / "base"
        shutil.copytree(sound(), path)
        change(path)
        began = time.monotonic()
        try:
            model = load_model(path)
        finally:
            assert not (path / "ran").exists() and time.monotonic() - began < 5
        base = base_of(model)
        assert base is not None
        return (
            f"{type(model).__name__} in {next(model.parameters()).dtype}; {'; '.join(base.notes)}"
        )

    return act


def config(**changes: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        found = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**found, **changes}))

    return change


def content(name: str, raw: bytes) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(raw)


def tensors(edit: Callable[[dict], object]) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        found = load_file(path / "model.safetensors")
        edit(found)
        save_file(found, path / "model.safetensors", metadata={"format": "pt"})

    return change


def stored_as(dtype: torch.dtype) -> Callable[[Path], object]:
    return tensors(lambda found: found.update({k: v.to(dtype) for k, v in found.items()}))


def shards(edit: Callable[[Path, dict, dict], object]) -> Callable[[Path], object]:
    """The weights in two files with an index, changed."""

    def change(path: Path) -> None:
        found = load_file(path / "model.safetensors")
        (path / "model.safetensors").unlink()
        names = sorted(found)
        where = {name: SHARD.format(1 + (i >= len(names) // 2)) for i, name in enumerate(names)}
        for file in (SHARD.format(1), SHARD.format(2)):
            part = {name: found[name] for name in names if where[name] == file}
            save_file(part, path / file, metadata={"format": "pt"})
        edit(path, where, found)
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))

    return change


def _outside(path: Path, where: dict, _found: dict) -> None:
    (path / SHARD.format(2)).rename(path.parent / "outside.safetensors")
    for name, file in where.items():
        where[name] = "../outside.safetensors" if file == SHARD.format(2) else file


def _twice(path: Path, where: dict, found: dict) -> None:
    second, first = path / SHARD.format(2), sorted(found)[0]
    save_file({**load_file(second), first: found[first]}, second, metadata={"format": "pt"})


def _own_code(path: Path) -> None:
    config(model_type="evil", auto_map={"AutoConfig": "modeling_x.X"})(path)
    (path / "modeling_x.py").write_text(f"open({str(path / 'ran')!r}, 'w')\nclass X: pass\n")


def _own_code_of_known(path: Path) -> None:
    _own_code(path)
    config(model_type="llama")(path)


def _own_tokenizer_code(path: Path) -> None:
    _own_code(path)
    config(model_type="llama")(path)
    found = json.loads((path / "tokenizer_config.json").read_text())
    more = {"auto_map": {"AutoTokenizer": ["modeling_x.X", None]}, "tokenizer_class": "X"}
    (path / "tokenizer_config.json").write_text(json.dumps({**found, **more}))


def _pickled(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def _gguf(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.gguf").write_bytes(b"GGUF\3\0\0\0")


def _large(name: str) -> Callable[[Path], object]:
    return lambda path: ((path / name).touch(), os.truncate(path / name, 1 << 30))


def _slow_pattern(folder: Path) -> str:
    """A normalizer whose pattern takes exponential time: stopped by the library, told by us."""
    path = folder / "base"
    shutil.copytree(sound(), path)
    found = json.loads((path / "tokenizer.json").read_text())
    found["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}
    (path / "tokenizer.json").write_text(json.dumps(found))
    tokenizer = load_tokenizer(path)
    record = {"prompt": "a" * 60 + "b", "completion": "c"}
    return str(CausalEncoder(tokenizer).encode([record]))


def _double_bos(folder: Path) -> str:
    """A template that writes the BOS itself, and a tokenizer that adds one: one in the record."""
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = byte_tokenizer(source, adds_bos=True)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (example,) = CausalEncoder(tokenizer).encode([{"messages": turns}])
    ids = example.input_ids
    assert ids.count(tokenizer.bos_token_id) == 1
    return "one BOS in the record"


# --- names ----------------------------------------------------------------------------------------


def _named(name: str) -> Callable:
    """A name that is no folder, with a hub that cannot be reached: told in a second or two."""

    def act(folder: Path) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
            patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
            (folder / "models--org--tiny-llama").mkdir()
            patch.setattr(hub, "get_hf_file_metadata", _silent)
            hub._asked.cache_clear()
            began = time.monotonic()
            try:
                return str(load_model(name))
            finally:
                assert time.monotonic() - began < 2

    return act


def _silent(*_: object, **__: object) -> None:
    raise TimeoutError("timed out")


# --- templates ------------------------------------------------------------------------------------

MESSAGES = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
]


def template(source: Any, seconds: float = 5) -> Callable:
    def act(_folder: Path) -> str:
        began = time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(budget, "MAX_SECONDS", 1.0)  # else five
            try:
                spans = ChatTemplate(source, {"eos_token": "</s>"}).render(MESSAGES)
            finally:
                assert time.monotonic() - began < seconds
        return "".join(span.text for span in spans)

    return act


def _dropped(_folder: Path) -> str:
    chosen = ChatTemplate("{% for m in messages[1:] %}{{ m.content }}\n{% endfor %}")
    return f"told: {'; '.join(chosen.dropped(MESSAGES, chosen.render(MESSAGES)))}"


def _template_of_another_type(_folder: Path) -> str:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = 3
    return str(ChatTemplate.of(tokenizer))


def _loop(times: int, body: str, then: str = "") -> str:
    return f"{{% for i in range({times}) %}}{body}{{% endfor %}}{then}"


def _grown(start: str, step: str, then: str = "", times: int = 60) -> str:
    """A value that is made of itself so many times."""
    grow = _loop(times, f"{{% set n.a = {step} %}}")
    return f"{{% set n = namespace(a={start}) %}}{grow}{then}"


TEMPLATES = {  # what it tries -> the template
    "to reach Python: __class__": "{{ ''.__class__.__mro__ }}",
    "to reach Python: attr filter": "{{ (messages | attr('__init__')).__globals__ }}",
    "to reach Python: format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "to read a file": "{% include '/etc/passwd' %}",
    "three nested loops": _loop(99999, _loop(99999, _loop(99999, ""))),
    "a macro that calls itself": "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "a text of 10**9 letters": "{{ 'a' * 10**9 }}",
    "a text of 10**9 letters, doubled up": _grown("'x'", "n.a ~ n.a"),
    "10,000 texts of 60 MB": _grown("[]", "n.a + ['a' * 60000000 ~ i]", times=9999),
    "a list that holds itself twice, printed": _grown("[1]", "[n.a, n.a]", "{{ n.a }}"),
    "a list that holds itself twice, as JSON": _grown("[1]", "[n.a, n.a]", "{{ n.a | tojson }}"),
    "two such lists compared": _grown("[1]", "[n.a, n.a]", "{{ n.a == n.a }}"),
    "the same by dict and batch": _grown("1", "(dict(x=n.a, y=n.a), 1)|batch(2)|list"),
    "a number squared 60 times": _grown("3", "n.a * n.a"),
    "a number rounded to 10**8 places": "{{ 1.5 | round(100000000, 'ceil') }}",
    "long texts for letters": "{{ ('a' * 6000000).translate({97: 'a' * 6000000}) | length }}",
    "a format with long texts": "{{ ('%(a)s' * 10000) | format(a='a' * 6000000) | length }}",
    "60 million letters, sorted": "{{ ('ba' * 30000000) | sort | length }}",
    "lists added up": "{{ ([[1] * 1000] * 100000) | sum(start=[]) | length }}",
    "a block that is never written": "{% set a %}"
    + _loop(99999, "{{ 'a' * 1000000 }}")
    + "{% endset %}",
    "long work in a filter": _loop(999, "{{ range(99999) | map('string') | join }}"),
}


def _bad(id: str, name: str, act: Callable, *says: str, error: type = BaseModelError) -> Case:
    return Case(id, name, act, error, says)


def _fine(id: str, name: str, act: Callable, *says: str) -> Case:
    return Case(id, name, act, None, says)


CASES = (
    _bad(
        "M-01",
        "no config.json",
        loading(lambda path: (path / "config.json").unlink()),
        "has no config.json",
    ),
    _bad("M-01", "an empty config.json", loading(content("config.json", b"")), "is no JSON"),
    _bad(
        "M-01",
        "a config.json of 100,000 levels",
        loading(content("config.json", b"[" * 100_000)),
        "is no JSON",
    ),
    _bad(
        "M-01", "an unknown model_type", loading(config(model_type="lamma")), "did you mean llama?"
    ),
    _bad(
        "M-01",
        "auto_map with code of its own",
        loading(_own_code),
        "which is not run",
        "trust_remote_code",
    ),
    _fine(
        "M-01", "auto_map for a known model_type", loading(_own_code_of_known), "LlamaForCausalLM"
    ),
    _bad("M-01", "a tokenizer with code of its own", loading(_own_tokenizer_code), "custom code"),
    _bad(
        "M-01",
        "10,000,000 layers",
        loading(config(num_hidden_layers=10**7)),
        "num_hidden_layers is 10000000",
    ),
    _bad("M-01", "a size below zero", loading(config(hidden_size=-4)), "hidden_size is -4"),
    _bad(
        "M-01",
        "a misspelt name: tiny-lama",
        _named("tiny-lama"),
        "did not answer",
        "did you mean org/tiny-llama?",
    ),
    _bad(
        "M-01",
        "a name that nobody has",
        _named("nobody/nothing"),
        "no folder here",
        "not in the cache",
        "did not answer",
    ),
    _bad("M-01", "no possible name", _named("a b;c"), "no possible hub id"),
    _bad("M-01", "a name of 5,000 letters", _named("x" * 5_000), "File name too long"),
    _bad(
        "M-02",
        "a file of the index is not there",
        loading(shards(lambda path, *_: (path / SHARD.format(2)).unlink())),
        "lacks 1 weight files: model-00002-of-00002.safetensors",
    ),
    _bad(
        "M-02",
        "a file that the index does not name",
        loading(
            shards(
                lambda path, where, found: save_file(
                    {"z": torch.ones(2)}, path / "model-00003-of-00003.safetensors"
                )
            )
        ),
        "does not name model-00003-of-00003.safetensors",
    ),
    _bad(
        "M-02",
        "a tensor in two files",
        loading(shards(_twice)),
        "1 tensors lie in two files: lm_head.weight",
    ),
    _bad(
        "M-02",
        "an index that leads out",
        loading(shards(_outside)),
        "leads out of the folder: ../outside.safetensors",
    ),
    _bad(
        "M-02",
        "an index that is no JSON",
        loading(lambda path: (shards(lambda *_: None)(path), (path / INDEX).write_text("{"))),
        "is no JSON",
    ),
    _fine(
        "M-03",
        "tied, stored once",
        loading(
            lambda path: (
                config(tie_word_embeddings=True)(path),
                tensors(lambda found: found.pop("lm_head.weight"))(path),
            )
        ),
        "LlamaForCausalLM",
    ),
    *(
        _fine("M-04", f"stored as {name}", loading(stored_as(getattr(torch, name))), "torch.")
        for name in ("bfloat16", "float16", "float64")
    ),
    *(
        _bad("M-04", f"stored as {name}", loading(stored_as(dtype)), f"numbers of the type {name}")
        for name, dtype in (
            ("F8_E4M3", torch.float8_e4m3fn),
            ("I8", torch.int8),
            ("C64", torch.complex64),
        )
    ),
    _bad(
        "M-04",
        "quantized",
        loading(config(quantization_config={"quant_method": "gptq", "bits": 4})),
        "is quantized (gptq)",
    ),
    _bad(
        "M-05",
        "a vocabulary of another size",
        loading(config(vocab_size=100)),
        "lm_head.weight (of another shape)",
    ),
    _fine("M-05", "a BOS by template and tokenizer", _double_bos, "one BOS"),
    _bad(
        "M-06",
        "a tokenizer.json of 1 GB",
        loading(_large("tokenizer.json")),
        "at most 268,435,456 are read",
    ),
    _bad(
        "M-06",
        "a tokenizer.json that is none",
        loading(content("tokenizer.json", b"{")),
        "could not be loaded",
    ),
    _bad(
        "M-06",
        "a pattern that takes exponential time",
        _slow_pattern,
        "the tokenizer failed on a text",
        error=DataError,
    ),
    _bad(
        "M-06",
        "a chat template of 10 MB",
        template("x" * 10_000_000),
        "10,000,000 bytes",
        error=DataError,
    ),
    _bad(
        "M-06",
        "a chat template that is a number",
        _template_of_another_type,
        "the chat template is a int",
        error=DataError,
    ),
    _bad(
        "M-07",
        "pytorch_model.bin only",
        loading(_pickled),
        "pickled weights are never loaded",
        "weights_only=True",
    ),
    _bad("M-08", "GGUF beside a config", loading(_gguf), "GGUF is not read"),
    _bad(
        "M-08",
        "a .gguf file",
        lambda folder: ((folder / "x.gguf").write_bytes(b"GGUF"), load_model(folder / "x.gguf")),
        "is GGUF, which is not read",
    ),
    _bad(
        "M-08",
        "weights that are cut off",
        loading(lambda path: os.truncate(path / "model.safetensors", 3_000)),
        "cut off",
    ),
    _bad(
        "M-08",
        "weights that are a FIFO",
        loading(
            lambda path: (
                (path / "model.safetensors").unlink(),
                os.mkfifo(path / "model.safetensors"),
            )
        ),
        "not a regular file",
    ),
    *(
        _bad(
            "M-09",
            f"a template that tries {name}"
            if name.startswith("to ")
            else f"a template with {name}",
            template(source),
            "the chat template",
            error=DataError,
        )
        for name, source in TEMPLATES.items()
    ),
    _bad(
        "M-09",
        "a template that is none",
        template("{% for m in messages %}"),
        "no valid jinja2, line 1",
        error=DataError,
    ),
    _bad(
        "M-09",
        "a template that refuses",
        template("{{ raise_exception('no system role') }}"),
        "refuses the messages: no system role",
        error=DataError,
    ),
    _bad(
        "M-09",
        "a template of 5,000 levels",
        template("{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}"),
        "nested too deeply",
        error=DataError,
    ),
    _fine(
        "M-09",
        "a template that drops the system message",
        _dropped,
        "message 1 (system, content): 'be kind'".replace("'", "`"),
    ),
)
