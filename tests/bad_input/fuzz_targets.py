"""What is fuzzed: five readers of strangers' bytes, functions of bytes and an empty folder.

An input is bytes throughout, so that a finding is a file in tests/corpus/TARGET/. The first byte
chooses among the files that a reader looks at, and the rest is what is in that file. Whatever the
bytes are, only a LoricaError may come out, within seconds, and no file may be left.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from lorica.attach.attach import attach, detach
from lorica.config import load_yaml, resolve
from lorica.data.read import read, read_splits
from lorica.data.template import ChatTemplate
from lorica.errors import LoricaError
from lorica.files.adapter import CONFIG, PROVENANCE, WEIGHTS, load_adapter, save_adapter
from lorica.methods import METHODS
from lorica.methods.lora import LoRA
from lorica.records.read import read_run
from lorica.train.checkpoint import MANIFEST, State, _own_digest, load, save

SECONDS = 5.0
LONGEST = 3_000  # characters of one sentence of a message
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
ADAPTER_FILES = (WEIGHTS, CONFIG, PROVENANCE)
RUN_FILES = ("run.json", "config.yaml", "metrics.jsonl", "events.jsonl", "samples.jsonl")
IDENTITY = {"base": "abc"}
CONTROL = ("<|im_start|>", "<|im_end|>", "</s>")


class Hang(BaseException):
    """The time for one input is over."""


@dataclass(frozen=True)
class Target:
    """A reader under test.

    Attributes:
        call: reads the bytes; an empty folder is at its disposal.
        seeds: sound and nearly sound inputs, to be changed.
        words: pieces that mean something there.
    """

    call: Callable[[bytes, Path], None]
    seeds: Callable[[], list[bytes]]
    words: tuple[bytes, ...]


def outcome(target: str, raw: bytes, folder: Path) -> str:
    """What came of one input: "read", or the error that told why not. Anything else is a finding,
    and raised; so is a message that would fill the screen.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _limit(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TARGETS[target].call(raw, folder)
            return "read"
    except LoricaError as error:
        longest = max(map(len, (error.what, *error.problems)))
        assert longest <= LONGEST, f"a message of {longest:,} characters: {error.what[:200]}"
        return f"{type(error).__name__}: {error.what}"
    finally:
        left = [path.name for path in folder.rglob("*") if ".tmp-" in path.name]
        shutil.rmtree(folder, ignore_errors=True)
        assert not left, f"files were left: {left}"


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise `Hang` in the main thread when the time is over."""

    def over(*_: object) -> None:
        raise Hang(f"more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _choice(raw: bytes, names: tuple[str, ...]) -> tuple[str, bytes]:
    return names[(raw[:1] or b"\0")[0] % len(names)], raw[1:]


# --- rows -----------------------------------------------------------------------------------------


def _rows(raw: bytes, folder: Path) -> None:
    ending, rest = _choice(raw, ENDINGS)
    (folder / f"train{ending}").write_bytes(rest)
    try:
        read(folder / f"train{ending}")
    except LoricaError:
        read_splits(folder, max_bad_rows=3)


def _row_seeds() -> list[bytes]:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    chat += [{"role": "assistant", "content": "yo", "train": True}]
    rows = [
        {"prompt": "a", "completion": "b", "references": ["c"]},
        {"messages": chat, "tools": [{"name": "f"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "input": "", "output": "b", "history": [["q", "a"]], "system": "x"},
        {"text": "good \ud83d\ude00", "label": 1},
        {"prompt": chat[:2], "completion": chat[2:]},
    ]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    seeds = [b"\0" + 3 * line for line in lines]
    seeds += [b"\1[" + line.strip() + b",\n" + line + b"]" for line in lines]
    seeds += [b'\1{"data": [' + lines[0] + b'], "version": 1e3}', b"\1" + lines[0] * 2]
    seeds += [b'\2prompt,completion\n"a ""b""",c\nd,"e\nf"\n', b"\2text;label\na;1\nb;0\n"]
    seeds += [b'\3text\tlabel\na "b" c\t1\n"d"\t0\n', b"\4one\n\ntwo\n<|endoftext|>\nthree\n"]
    seeds += [b"\0" + json.dumps(rows[0]).encode("utf-16"), b"\2" + "text\né\n".encode("utf-32")]
    return [*seeds, *_parquet_seeds()]


def _parquet_seeds() -> list[bytes]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return []
    stream = pyarrow.BufferOutputStream()
    table = pyarrow.table({"prompt": ["a", "b"], "completion": ["c", None], "n": [[1], [2, 3]]})
    pyarrow.parquet.write_table(table, stream)
    return [b"\5" + stream.getvalue().to_pybytes()]


# --- settings -------------------------------------------------------------------------------------


def _settings(raw: bytes, folder: Path) -> None:
    (folder / "run.yaml").write_bytes(raw)
    resolved = resolve(load_yaml(folder / "run.yaml"), methods=METHODS)
    (folder / "again.yaml").write_text(resolved.to_yaml(), encoding="utf-8")
    again = resolve(load_yaml(folder / "again.yaml"), methods=METHODS)
    assert again.values == resolved.values, "written and read again, the settings differ"


def _settings_seeds() -> list[bytes]:
    return [
        b"version: 1\nmodel: m\ndata: d.jsonl\noutput_dir: runs/x\nlearning_rate: 1e-4\nr: 8\n",
        b"model: m\ndata: d\ntarget_modules: [q_proj, v_proj]\ncolumns: {prompt: a, text: b}\n",
        b'model: "m"\ndata: d\nmax_steps: 10\nwarmup_steps: 2\neval_size: 0.1\nr: 4',
        b"model: m\ndata: d\nlr_scheduler_type: wsd\ndecay_ratio: 0.3\nsystem: |\n  be\n  kind\n",
        b"{model: m, data: d, lora_alpha: 16, metrics: [bleu], packing: auto, epochs: null}\n",
        b"model: m\ndata: d\nadd_bos: true\nseparator: '\\n'\neos_token: \"\\u2028\"\nthreads: 2\n",
    ]


# --- adapter folders ------------------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(5, 7), nn.Linear(5, 3)


@cache
def _model() -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([_Block(), _Block()])  # type: ignore[assignment]
    return model


@cache
def _sound_adapter() -> dict[str, bytes]:
    """The files of an adapter on the model above."""
    adapter = attach(
        _model(), LoRA(r=2, target_modules=("q_proj", "v_proj"), init_lora_weights="random")
    )
    with TemporaryDirectory() as folder:
        saved = save_adapter(adapter, Path(folder) / "sound")
        detach(_model(), adapter)
        return {name: (saved / name).read_bytes() for name in ADAPTER_FILES}


def _adapter(raw: bytes, folder: Path) -> None:
    changed, rest = _choice(raw, ADAPTER_FILES)
    for name, content in _sound_adapter().items():
        (folder / name).write_bytes(rest if name == changed else content)
    detach(_model(), load_adapter(_model(), folder))


def _adapter_seeds() -> list[bytes]:
    sound = _sound_adapter()
    config = json.loads(sound[CONFIG])
    patterns = {"target_modules": r"(.*\.)?(q|v)_proj", "rank_pattern": {r"layers\.0\..*": 2}}
    variants = [config, {**config, **patterns}, {**config, "layers_to_transform": [0, 1]}]
    seeds = [bytes([i]) + sound[name] for i, name in enumerate(ADAPTER_FILES)]
    return seeds + [b"\1" + json.dumps(variant).encode() for variant in variants]


# --- chat templates -------------------------------------------------------------------------------


def _template(raw: bytes, folder: Path) -> None:
    source, _, rest = raw.decode("utf-8", "surrogateescape").partition("\0")
    try:
        messages = json.loads(rest)
    except (ValueError, RecursionError):
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": rest}]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": messages}), encoding="utf-8")
    rows = read(folder / "rows.jsonl", format="chat").rows  # the way that messages take
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, CONTROL)
    for row in rows:
        spans = template.render(row["messages"])
        template.dropped(row["messages"], spans)
        template.render(row["messages"][:-1], add_generation_prompt=True)


def _template_seeds() -> list[bytes]:
    chatml = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m.content | trim }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    marked = (
        "{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages %}"
        "{%- if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
        "{% endgeneration %}{% else %}{% set ns.n = ns.n + 1 %}{{ ns.n ~ m.content }}{% endif -%}"
        "{% endfor %}"
    )
    macro = (
        "{% macro show(x, n=3) %}{{ x | tojson(indent=2) }}{{ x | string | indent(n) }}"
        "{% endmacro %}"
        "{% for m in messages if m.role != 'system' %}{{ show(m) }}{{ loop.cycle('a', 'b') }}"
        "{{ m.content.split('a') | map('upper') | join(',') | replace('A', 'b') }}{% endfor %}"
    )
    think = (
        "{% set last = messages[1:] | selectattr('role', 'equalto', 'user') | list | length %}"
        "{% for m in messages %}{% set c = m.content.split('</think>')[-1].lstrip('\\n') %}"
        "{{ '%s' | format(m.role) }}{{ [c, last] | join * 2 }}{% if last is divisibleby 2 %}"
        "{{ raise_exception('no') }}{% endif %}{{ range(3) | sum ** 2 }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "hi </s>"}, {"role": "assistant", "content": "yo a"}]
    tail = b"\0" + json.dumps(messages * 2).encode()
    return [text.encode() + tail for text in (chatml, marked, macro, think)]


# --- checkpoints and run folders ------------------------------------------------------------------


@cache
def _sound_checkpoint() -> dict[str, bytes]:
    """The files of a checkpoint."""
    tensors = {"a": {"A": torch.ones(2, 3), "B": torch.zeros(3, 1)}}
    groups = {"adapters": tensors, "optimizers": tensors, "best": tensors}
    state = State(1, IDENTITY, {"threads": "1"}, counters={"a": {"step": 1}}, **groups)
    with TemporaryDirectory() as folder:
        path = save(Path(folder), state)
        files = (file for file in sorted(path.rglob("*")) if file.is_file())
        return {str(file.relative_to(path)): file.read_bytes() for file in files}


def _checkpoint(raw: bytes, folder: Path) -> None:
    """The first byte: a file of a checkpoint (with its hash, as a stranger would make it, or
    without, as a disk would), or one of a run folder.
    """
    names = tuple(_sound_checkpoint())
    changed, rest = _choice(raw, (*names, *names, *RUN_FILES))
    if changed in RUN_FILES:
        (folder / "run.json").write_bytes(b'{"lorica": "1"}')
        (folder / changed).write_bytes(rest)
        read_run(folder)
        return
    files = {**_sound_checkpoint(), changed: rest}
    if (raw[:1] or b"\0")[0] % (2 * len(names) + len(RUN_FILES)) >= len(names):
        _sign(files, changed)
    path = folder / "c" / "step-00000001"
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    load(folder / "c", IDENTITY)


def _sign(files: dict[str, bytes], changed: str) -> None:
    """Make the hashes fit again."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        manifest = json.loads(files[MANIFEST])
        if changed != MANIFEST:
            manifest["files"][changed]["sha256"] = hashlib.sha256(files[changed]).hexdigest()
        manifest["sha256"] = _own_digest(manifest)
        files[MANIFEST] = json.dumps(manifest).encode()


def _checkpoint_seeds() -> list[bytes]:
    sound = _sound_checkpoint()
    number = 2 * len(sound)
    seeds = [bytes([i % number]) + list(sound.values())[i % len(sound)] for i in range(number)]
    run = {"lorica": "1", "status": "running", "started": "2026", "data": {"train": {"path": "x"}}}
    seeds += [bytes([number]) + json.dumps(run).encode()]
    seeds += [bytes([number + 1]) + b"version: 1\n\n# run\nmodel: m  # --model\nr: [1, {a: 2}]\n"]
    row = b'{"step": 1, "loss": 0.5}\n'
    return seeds + [bytes([number + i]) + row * 2 for i in (2, 3, 4)]


_JSON_WORDS = (
    *(b"null", b"true", b"[]", b"{}", b'""', b"-1", b"1e999", b"NaN", b"\\ud800", b"\\u0000"),
    *(b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"18446744073709551616", b'{"a":1,"a":2}'),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\r", b"\xe2\x80\xa8", b"\x85", b"\xed\xa0\x80"),
)
TARGETS = {
    "rows": Target(
        _rows,
        _row_seeds,
        (*_JSON_WORDS, b'"messages"', b'"role"', b'"label"', b'"', b";", b"\t", b",,", b'"tool"'),
    ),
    "settings": Target(
        _settings,
        _settings_seeds,
        (
            *_JSON_WORDS,
            *(
                b"&a ",
                b"*a",
                b"!!python/object:os.system ",
                b"--- ",
                b"|\n  ",
                b"? ",
                b"- ",
                b"<<: ",
            ),
            *(b"no", b"012", b"12:30", b"2026-01-01", b"0x1F", b".inf", b"1e-4", b"~", b"# x\n"),
            *(b"learing_rate: 1\n", b"hf_token: hf_abcdefghijklmnopqrstuvwxyz\n", b"regex:(a+)+"),
        ),
    ),
    "adapter": Target(
        _adapter,
        _adapter_seeds,
        (
            *_JSON_WORDS,
            *(b"F16", b"F8_E4M3", b"data_offsets", b"__metadata__", b"shape", b"..", b"lora_A"),
            *(b"(a+)+$", b"(?<=q)", b"(a|a)*", b"a{1,99999}", b"(((((", b"[^", b"LORA", b"\\p{L}"),
        ),
    ),
    "template": Target(
        _template,
        _template_seeds,
        (
            *_JSON_WORDS,
            *(
                b"{% for x in range(99999) %}",
                b"{% endfor %}",
                b"{{ ",
                b" }}",
                b"{% set x = [x, x] %}",
            ),
            *(b"{% macro f(n) %}", b"{{ f(n) }}", b"{% endmacro %}", b" * 10", b" ** 9", b" ~ "),
            *(b"|list", b"|join", b"|map('string')", b"|tojson", b"|center(9999)", b"|round(9999)"),
            *(b".__class__", b"|attr('__init__')", b".format(", b".join(", b".replace('a', x)"),
            *(b"{% generation %}", b"{% endgeneration %}", b"namespace(", b"|sort", b"|batch(2)"),
            *(b"messages", b"loop.index", b"{% break %}", b"is defined", b"|dictsort", b"[::-1]"),
            *(b"|groupby('role')", b"|wordwrap(1)", b"strftime_now('%Y')", b"{%-", b"-%}", b"{#"),
        ),
    ),
    "checkpoint": Target(
        _checkpoint,
        _checkpoint_seeds,
        (
            *_JSON_WORDS,
            *(
                b'"../x"',
                b'"/dev/zero"',
                b'"step"',
                b'"files"',
                b'"schema"',
                b'"identity"',
                b"&a [",
            ),
            *(b"*a", b"best/", b"state.json", b'"counters"', b"unjudged", b"? ", b"!!x "),
        ),
    ),
}
