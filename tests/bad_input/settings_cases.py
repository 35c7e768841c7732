"""C: settings and the command line."""

from __future__ import annotations

import random
import string
import time
from collections.abc import Callable
from pathlib import Path

from torch import nn

from architectures import ARCHITECTURES
from bad_input.case import Case
from lorica.attach.attach import attach
from lorica.attach.handle import adapters
from lorica.base.load import load_model
from lorica.cli.options import read_flags
from lorica.config import ALIASES, flag_layer, known_settings, load_yaml, parse_yaml, resolve
from lorica.config.settings import RunConfig
from lorica.data.read import read
from lorica.errors import BaseModelError, ConfigError, DataError, LoricaError, TargetError
from lorica.methods import METHODS
from lorica.methods.lora import LoRA
from lorica.records.folder import RunFolder

KNOWN = known_settings(METHODS)
LEAST = "model: m\ndata: d\n"


def yaml(text: str, least: str = LEAST) -> Callable:
    """A settings file with these lines beside model and data."""

    def act(folder: Path) -> str:
        began = time.monotonic()
        (folder / "run.yaml").write_text(least + text, encoding="utf-8")
        try:
            made = resolve(load_yaml(folder / "run.yaml"), methods=METHODS)
            given = [key for key, origin in made.origins.items() if origin.startswith("run.yaml")]
            return "taken: " + ", ".join(f"{key}: {made.values[key]}" for key in given)
        finally:
            assert time.monotonic() - began < 5

    return act


def values(**given: object) -> Callable:
    """The same from Python."""
    return lambda folder: resolve(("x", {"model": "m", "data": "d", **given}), methods=METHODS)


def slips(name: str, number: int, rng: random.Random) -> list[str]:
    """So many spellings with one letter dropped, added, changed or swapped with the next."""
    letters, found = string.ascii_lowercase + "_", set()
    while len(found) < number:
        at, letter = rng.randrange(len(name)), rng.choice(letters)
        swapped = name[:at] + name[at + 1 : at + 2] + name[at] + name[at + 2 :]
        kinds = (name[:at] + name[at + 1 :], name[:at] + letter + name[at:], swapped)
        found.add(rng.choice((*kinds, name[:at] + letter + name[at + 1 :])))
    return sorted(found - {name, *KNOWN, *ALIASES})


def _every_name(_folder: Path) -> str:
    """Every setting, misspelt by one letter in twelve ways: the suggestion is the setting."""
    rng, right, wrong = random.Random(0), 0, []
    for key in KNOWN:
        if len(key) < 3:
            continue
        spellings = slips(key, 12, rng)
        try:
            resolve(
                ("x", {"model": "m", "data": "d", **dict.fromkeys(spellings, 1)}), methods=METHODS
            )
        except ConfigError as error:
            told = {
                problem.split()[1]: problem for problem in error.problems if " is not a " in problem
            }
        else:
            raise AssertionError(f"misspellings of {key} were taken")
        for spelling in spellings:
            meant = f"did you mean {key}?" in told.get(spelling, "")
            right, wrong = right + meant, wrong + [spelling] * (not meant)
    total = right + len(wrong)
    assert total > 500 and right / total >= 0.97, wrong
    # as near to the one as to the other: of two betas, of target_r and targets, of seed and seeds
    assert all(word.startswith(("adam_beta", "targets", "see")) for word in wrong), wrong
    return f"{total} misspellings of {len(KNOWN)} settings refused, {right} with the right name"


# --- places ---------------------------------------------------------------------------------------


def llama() -> nn.Module:
    return ARCHITECTURES["llama"].build()


def placed(**settings: object) -> Callable:
    """An adapter with these settings on a small llama; where it is refused, nothing is on it."""

    def act(_folder: Path) -> str:
        model = llama()
        try:
            return attach(model, LoRA(**settings)).reason  # type: ignore[arg-type]
        finally:
            began_with = all(parameter.requires_grad for parameter in model.parameters())
            assert adapters(model) or began_with

    return act


def _hostile_pattern(folder: Path) -> str:
    began = time.monotonic()
    try:
        return placed(target_modules=r"regex:(\w+\.?)+X")(folder)
    finally:
        assert time.monotonic() - began < 3


# --- what contradicts -----------------------------------------------------------------------------

CLASSES = "task: text-classification\n"
CONTRADICTIONS = {  # lines -> words of the message
    "warmup_steps: 3\nwarmup_ratio: 0.1": "warmup_ratio=0.1 has no effect",
    "warmup_steps: 9\nmax_steps: 5": "more than max_steps=5",
    "decay_ratio: 0.5": "it belongs to wsd",
    "decay_ratio: 0.5\nlr_scheduler_type: cosine": "lr_scheduler_type=cosine",
    "decay_ratio: 0.5\nlr_scheduler_type: constant": "lr_scheduler_type=constant",
    "lr_scheduler_type: wsd\ndecay_ratio: 0.9\nwarmup_ratio: 0.2": "more than the whole run",
    "lr_scheduler_type: wsd\nmax_steps: 10\nwarmup_steps: 9": "more than the whole run",
    "eval_steps: 9\nmax_steps: 5": "eval_steps=9 is more than max_steps=5",
    "save_steps: 9\nmax_steps: 5": "save_steps=9 is more than max_steps=5",
    "early_stopping_patience: 5\neval_steps: 2\nmax_steps: 10": "it could never stop the run",
    "eval_data: e\neval_size: 0.1": "eval_size=0.1 has no effect beside eval_data",
    "eval_size: 0\neval_steps: 5": "eval_steps has no effect with eval_size=0",
    "eval_size: 0\nearly_stopping_patience: 5": "early_stopping_patience has no effect",
    "eval_size: 0\neval_batch_size: 5": "eval_batch_size has no effect",
    CLASSES + "packing: true\nsystem: x": "system has no effect",  # packing has one
    CLASSES + "chat_template: x": "chat_template has no effect",
    CLASSES + "system: x": "system has no effect",
    CLASSES + "separator: x": "separator has no effect",
    CLASSES + "train_on: all": "train_on has no effect",
    CLASSES + "add_bos: true": "add_bos has no effect",
    "task: seq2seq\npacking: true": "packing has no effect in seq2seq",
    "task: seq2seq\nchat_template: x": "chat_template has no effect in seq2seq",
    "task: seq2seq\nsystem: x": "system has no effect in seq2seq",
    "task: seq2seq\nseparator: x": "separator has no effect in seq2seq",
    "task: seq2seq\ntrain_on: last": "train_on has no effect in seq2seq",
    "task: seq2seq\nadd_bos: false": "add_bos has no effect in seq2seq",
    "lr: 0.1\nlearning_rate: 0.1": "are the same setting",
    "r: 4\nlora_rank: 8": "are the same setting",
    "eval_data: d": "eval_data is the same as data",
    "test_data: d": "test_data is the same as data",
    "output_dir: d": "output_dir is the same as data",
    "output_dir: m": "output_dir is the same as model",
    "eval_data: e\noutput_dir: e": "output_dir is the same as eval_data",
}
WITH_MODEL = {
    "model: embedded\ndata: d\nrevision: main": "revision=main has no effect",
    "model: embedded\ndata: d\ntrust_remote_code: true": "trust_remote_code has no effect",
    "model: m\ndata: '-'\neval_data: '-'": "which can be read once",
}


# --- names that would do something in a shell -----------------------------------------------------

INJECTIONS = (
    *(
        "$(touch x)",
        "`touch x`",
        "; touch x",
        "| touch x",
        "&& touch x",
        "|| touch x",
        "> x",
        "< x",
    ),
    *("$HOME", "${HOME}", "%HOME%", "~root", "~nobody/x", "*", "?", "[a-z]", "{a,b}", "!!", "!x"),
    *("a b", "a\tb", "a'b", 'a"b', "a\\b", "a\\nb", "é", "\u202ex", "\u200b", "..", "../x", "./-x"),
    *(
        "-rf",
        "--help",
        "-",
        "#",
        "x#y",
        "file:///etc/passwd",
        "http://x/y",
        "\\\\x\\y",
        "CON",
        "a:b",
    ),
    *("{{7*7}}", "{% raw %}", "%s%s%n", "' OR 1=1", "\x1b[31m", "x\ny", "x\0y", "a" * 300, ""),
)


def _injected(folder: Path) -> str:
    """Each string as a path of data, of a base and of the output, from Python and as a flag."""
    home = folder / "home"
    home.mkdir()
    for text in INJECTIONS:
        _try(lambda t=text: read(home / f"x{t}"))
        _try(lambda t=text: load_model(home / f"x{t}"))
        _try(
            lambda t=text: RunFolder.check(
                RunConfig(model="m", data="d", output_dir=t).output_dir or ""
            )
        )
        line = read_flags([f"--output-dir={text}", "--model=m", "--data=d"], KNOWN)
        _try(lambda given=line: resolve(flag_layer(given.flags, KNOWN), methods=METHODS))
    assert not list(home.iterdir()) and not list(Path.cwd().glob("x"))
    return f"{len(INJECTIONS)} strings in 4 places: nothing run, no file made"


def _try(call: Callable[[], object]) -> None:
    try:
        call()
    except LoricaError:
        return


def _kept_as_it_is(_folder: Path) -> str:
    """What is in a path comes out of the settings file as it went in."""
    for text in INJECTIONS:
        try:
            made = resolve(("x", {"model": "m", "data": "d", "output_dir": text}), methods=METHODS)
        except ConfigError:
            continue  # empty, or with control characters
        again = resolve(parse_yaml(made.to_yaml()), methods=METHODS)
        assert again.run.output_dir == made.run.output_dir
        assert made.run.output_dir == text or text.startswith("~/")
    return "written to config.yaml and read again, every path is the same"


def _order(folder: Path) -> str:
    """The command line before the file before the default; the environment sets nothing."""
    (folder / "run.yaml").write_text(LEAST + "r: 4\nseed: 5\n")
    layers = load_yaml(folder / "run.yaml"), flag_layer({"--r": "16"}, KNOWN)
    found = resolve(*layers, methods=METHODS)
    assert (found.method.r, found.train.seed, found.train.batch_size) == (16, 5, 16)
    r, seed, rest = (found.origins[key] for key in ("r", "seed", "batch_size"))
    return f"r 16 from {r}, seed 5 from {seed}, the rest by {rest}"


def _every_problem(_folder: Path) -> str:
    yaml("learing_rate: 1\nbatch_size: 0\nr: '8'\neval_size: 0\neval_steps: 3\n")(_folder)
    raise AssertionError("accepted")


def _bad(id: str, name: str, act: Callable, *says: str, error: type = ConfigError) -> Case:
    return Case(id, name, act, error, says)


def _line(id: str, text: str, *says: str) -> Case:
    return _bad(id, text.replace("\n", ", ")[:60], yaml(text), *says)


CASES = (
    _line("C-01", "learing_rate: 0.1", "run.yaml:3", "did you mean learning_rate?"),
    Case(
        "C-01", "every setting, misspelt by one letter", _every_name, None, ("with the right name",)
    ),
    _line("C-01", "optimizer: sgd", "adamw"),
    _line("C-01", "lora: {r: 8}", "settings lie flat"),
    _bad("C-01", "five problems at once", _every_problem, "learing_rate", "batch_size", "r is '8'"),
    _line("C-02", "learning_rate: '3e-4'", "write 0.0003, without quotes"),
    _line("C-02", "batch_size: true", "batch_size is true; expected a whole number from 1"),
    _line("C-02", "batch_size: 1.5", "batch_size is 1.5"),
    _line("C-02", "batch_size: null", "empty (null)"),
    _line("C-02", "batch_size: [1]", "batch_size is [1]"),
    _line("C-02", "packing: no", "write false"),
    Case(
        "C-02", "learning_rate: 1e-4", yaml("learning_rate: 1e-4"), None, ("learning_rate: 0.0001",)
    ),
    _line("C-02", "seed: 010", "without quotes or leading zeros"),
    _line("C-02", "seed: 12:30", "seed is '12:30'"),
    _line("C-02", "max_steps: 2026-01-01", "max_steps is '2026-01-01'"),
    _line("C-02", "\tseed: 1", "run.yaml:3", "'\\t'"),
    _line("C-02", "a: &x [1]\nb: [*x, *x]", "anchors (&) and aliases (*) are not taken"),
    _bad("C-02", "seed: 5,000 digits", yaml(f"seed: {'9' * 5000}"), "too many digits"),
    _bad("C-02", "3,000 levels", yaml("a: " + "[" * 3000), "nested deeper than 10"),
    *(
        _line("C-03", f"r: {r}", f"r is {word}")
        for r, word in (
            ("0", "0; it must"),
            ("-1", "-1"),
            ("true", "true"),
            ("1000000000", "1000000000"),
            ("8.0", "8.0"),
        )
    ),
    _bad(
        "C-03",
        "r above what a layer can have",
        placed(r=99, target_modules=("q_proj",)),
        "r=99 is more than the layer's own rank",
        error=LoricaError,
    ),
    _line("C-03", "rank_pattern: {q_proj: 0}", "rank_pattern['q_proj'] is 0"),
    *(
        _line("C-04", f"lora_alpha: {a}", "lora_alpha is")
        for a in ("0", "-1", ".nan", ".inf", "1e30", "10001")
    ),
    _line("C-04", "alpha_pattern: {q_proj: 1e30}", "alpha_pattern['q_proj']"),
    _bad(
        "C-05",
        "targets that match nothing",
        placed(target_modules=("query",)),
        "query",
        "q_proj",
        error=TargetError,
    ),
    _bad(
        "C-05",
        "one of two targets matches nothing",
        placed(target_modules=("q_proj", "query")),
        "query",
        error=TargetError,
    ),
    _bad(
        "C-05",
        "everything excluded",
        placed(target_modules=("q_proj",), exclude_modules=("q_proj",)),
        "q_proj",
        error=TargetError,
    ),
    _bad(
        "C-05",
        "a layer that is not there",
        placed(target_modules=("q_proj",), layers_to_transform=(99,)),
        "99",
        error=LoricaError,
    ),
    _bad("C-06", "an exponential pattern as target", _hostile_pattern, error=LoricaError),
    *(
        _line("C-07", text, words)
        for text, words in (
            ("learning_rate: 0", "above 0 and at most 1"),
            ("learning_rate: -1", "above 0"),
            ("learning_rate: 1000", "at most 1"),
            ("learning_rate: .inf", "at most 1"),
            ("batch_size: 0", "from 1 to 65,536"),
            ("epochs: 0", "above 0"),
            ("max_length: 0", "from 2"),
            ("lora_dropout: 1.0", "between 0 and 0.99"),
            ("adam_beta2: 1.0", "below 1"),
            ("weight_decay: -1", "from 0 to 10"),
            ("max_grad_norm: -1", "of at least 0"),
            ("save_total_limit: 0", "from 1"),
            ("num_samples: 99999999", "from 0 to 10,000"),
            ("threads: 0", "from 1 to 4,096"),
            ("eval_size: 1.5", "a share below 1"),
            ("lr_scheduler_type: cosin", "did you mean cosine?"),
        )
    ),
    *(_line("C-08", text, words) for text, words in CONTRADICTIONS.items()),
    *(
        _bad("C-08", text.replace("\n", ", "), yaml(text, ""), words)
        for text, words in WITH_MODEL.items()
    ),
    Case("C-09", "strings that a shell would act on", _injected, None, ("nothing run",)),
    Case("C-09", "the same, through the settings file", _kept_as_it_is, None, ("is the same",)),
    _line("C-09", 'output_dir: "a\\nb"', "output_dir is 'a\\nb'; expected a path"),
    _line("C-09", 'output_dir: ""', "output_dir is ''"),
    _bad(
        "C-09",
        "a base that is misspelt: embeded",
        lambda _: load_model("embeded"),
        "did you mean embedded?",
        error=BaseModelError,
    ),
    _bad(
        "C-09",
        "data that is misspelt",
        lambda folder: ((folder / "train.jsonl").touch(), read(folder / "trian.jsonl")),
        "did you mean train.jsonl?",
        error=DataError,
    ),
    _line("C-10", "hf_token: abc", "looks like a secret"),
    _line("C-10", "api_key: abc", "looks like a secret"),
    _bad("C-10", "a token as a value", yaml("system: hf_" + "a1" * 15), "looks like a secret"),
    _bad(
        "C-10",
        "a password in an address",
        yaml("chat_template: https://me:secret@host/x"),
        "looks like a secret",
    ),
    _bad("C-11", "a name twice", yaml("seed: 1\nseed: 2"), "run.yaml:4", "given twice"),
    _bad("C-11", "two documents", yaml("--- \na: 1"), "another document"),
    _bad(
        "C-11",
        "a tag of Python",
        yaml("seed: !!python/object/apply:os.system [x]"),
        "the tag",
        "not taken",
    ),
    _bad("C-11", "10 MB", yaml("#" * 10_000_000), "larger than 256,000 bytes"),
    _bad("C-11", "a list", yaml("- a\n- b", ""), "not a mapping"),
    _bad("C-11", "nothing", yaml("", ""), "holds no settings"),
    _bad(
        "C-11",
        "10,000 names",
        yaml("\n".join(f"k{i}: 1" for i in range(10_000))),
        "more than there are settings",
    ),
    _bad(
        "C-11",
        "Latin-1",
        lambda folder: ((folder / "x.yaml").write_bytes(b"a: \xe9"), load_yaml(folder / "x.yaml")),
        "byte 3 is not UTF-8",
    ),
    Case(
        "C-12",
        "one setting in several places",
        _order,
        None,
        ("r 16 from --r, seed 5 from run.yaml:4",),
    ),
)
