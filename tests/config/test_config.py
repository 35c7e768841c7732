"""Settings: strict, explained, the same out as in."""

import dataclasses
import json
import random
import string
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.config import (
    ALIASES,
    RunConfig,
    TrainSettings,
    flag_layer,
    json_schema,
    known_settings,
    load_yaml,
    parse_flag,
    parse_yaml,
    resolve,
)
from lorica.config.names import NO_TWIN
from lorica.errors import ConfigError


@dataclass(frozen=True)
class Thin:
    """A method as this floor sees one: a frozen dataclass that checks its own ranges."""

    r: int = field(default=8, metadata={"help": "rank"})
    lora_alpha: float = field(default=16, metadata={"help": "scale times r"})
    target_modules: str | tuple[str, ...] = field(default="auto", metadata={"help": "layers"})
    rank_pattern: Mapping[str, int] = field(default_factory=dict, metadata={"help": "other ranks"})
    layers: str | tuple[int, ...] | None = field(default=None, metadata={"help": "numbers"})
    kind: ClassVar[str] = "thin"

    def __post_init__(self):
        wrong = [] if self.r > 0 else [f"r is {self.r}; it must be above 0"]
        wrong += [] if self.lora_alpha > 0 else [f"lora_alpha is {self.lora_alpha}"]
        if wrong:
            raise ConfigError("Thin cannot be used", problems=wrong)


@dataclass(frozen=True)
class Thick:
    """A second method, with a setting of its own."""

    r: int = 2
    width: int = field(default=3, metadata={"help": "how thick"})
    kind: ClassVar[str] = "thick"


METHODS = {"thin": Thin, "thick": Thick}
KNOWN = known_settings(METHODS)
NEEDED = {"model": "m", "data": "d.jsonl", "method": "thin"}


def problems_of(*layers) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(("given", NEEDED), *layers, methods=METHODS)
    return list(caught.value.problems)


def yaml_problem(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, name="run.yaml")
    return caught.value.what


# --- the models -------------------------------------------------------------------------------


def test_defaults_are_the_fields_usual_ones():
    train = TrainSettings()
    assert (train.learning_rate, train.batch_size, train.epochs) == (2e-4, 16, 3.0)
    assert train.max_steps is None and train.max_grad_norm == 1.0
    assert TrainSettings(max_steps=7).epochs is None, "one end is enough"
    both = TrainSettings(max_steps=7, epochs=2)
    assert (both.max_steps, both.epochs) == (7, 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 0),
        ("learning_rate", -1e-4),
        ("learning_rate", 1e3),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", True),
        ("learning_rate", "3e-4"),
        ("learning_rate", None),
        ("batch_size", 0),
        ("batch_size", 1.5),
        ("batch_size", True),
        ("batch_size", [4]),
        ("gradient_accumulation_steps", 0),
        ("epochs", 0),
        ("epochs", -1),
        ("max_steps", 0),
        ("max_steps", -1),
        ("max_length", 0),
        ("weight_decay", -0.1),
        ("adam_beta1", 1.0),
        ("adam_epsilon", 0),
        ("max_grad_norm", -1),
        ("lr_scheduler_type", "polynomial"),
        ("warmup_steps", -1),
        ("warmup_ratio", 1.0),
        ("seed", -1),
        ("seed", 2**32),
        ("dtype", "float16"),
        ("packing", 1),
        ("packing", "yes"),
        ("gradient_checkpointing", "true"),
        ("eval_steps", 0),
        ("early_stopping_patience", 0),
        ("save_total_limit", 0),
        ("logging_steps", 0),
    ],
)
def test_train_settings_refuse(key, value):
    with pytest.raises(ConfigError) as caught:
        TrainSettings(**{key: value})
    (problem,) = caught.value.problems
    assert problem.startswith(f"{key} is ") and KNOWN[key].expected in problem


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", ""),
        ("data", "a\nb"),
        ("output_dir", "x\0y"),
        ("task", "masked-lm"),
        ("columns", {"text": 1}),
        ("metrics", "bleu"),
        ("metrics", [1]),
        ("eval_size", 1.0),
        ("eval_size", -1),
        ("eval_size", True),
        ("eval_records", 0),
        ("trust_remote_code", 1),
        ("threads", 0),
        ("revision", 1234567),
    ],
)
def test_run_config_refuses(key, value):
    with pytest.raises(ConfigError) as caught:
        RunConfig(**{"model": "m", "data": "d", key: value})
    (problem,) = caught.value.problems
    assert problem.startswith(f"{key} is ") and KNOWN[key].expected in problem


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, ["warmup_ratio=0.1", "keep one"]),
        ({"warmup_steps": 30, "max_steps": 7}, ["warmup_steps=30", "max_steps=7"]),
        ({"decay_ratio": 0.1}, ["decay_ratio=0.1", "wsd"]),
        ({"lr_scheduler_type": "wsd", "decay_ratio": 0.9, "warmup_ratio": 0.2}, ["whole run"]),
        ({"eval_steps": 8, "max_steps": 7}, ["eval_steps=8", "never happen"]),
        ({"save_steps": 8, "max_steps": 7}, ["save_steps=8", "never happen"]),
    ],
)
def test_training_contradictions(values, words):
    with pytest.raises(ConfigError) as caught:
        TrainSettings(**values)
    (problem,) = caught.value.problems
    assert all(word in problem for word in words), problem


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"eval_data": "e", "eval_size": 5}, ["eval_size=5", "eval_data"]),
        ({"eval_size": 0, "eval_steps": 5}, ["eval_steps", "eval_size=0"]),
        ({"eval_size": 0, "early_stopping_patience": 2}, ["early_stopping_patience"]),
        ({"task": "seq2seq", "packing": True}, ["packing has no effect"]),
        ({"task": "text-classification", "system": "Be brief."}, ["system has no effect"]),
        ({"task": "text-classification", "chat_template": "t.j2"}, ["chat_template"]),
    ],
)
def test_contradictions_of_a_run(values, words):
    (problem,) = problems_of(("flags", values))
    assert problem.startswith("flags: ") and all(word in problem for word in words), problem


def test_everything_wrong_comes_in_one_error():
    with pytest.raises(ConfigError) as caught:
        TrainSettings(batch_size=0, lerning_rate=1e-4, dtype="bf16", max_steps=1.0)
    assert caught.value.exit_code == 2
    assert list(caught.value.problems) == [
        "batch_size is 0; expected a whole number from 1 to 65,536",
        "max_steps is 1.0; expected a whole number of at least 1 or null (write 1)",
        "dtype is 'bf16'; expected one of auto, float32, bfloat16 (did you mean bfloat16?)",
        "lerning_rate is not a setting; did you mean learning_rate?",
    ]


def test_settings_are_frozen_and_described():
    train = TrainSettings()
    with pytest.raises(Exception, match="frozen"):
        train.batch_size = 3
    for setting in KNOWN.values():
        assert setting.help or setting.group == "thick", setting.key
        assert setting.help == setting.help.strip() and not setting.help.endswith(".")


def test_rules_fill_what_follows():
    assert TrainSettings(epochs=None, max_steps=None).epochs == 3.0
    held = [RunConfig(model="m", data="d", eval_size=size) for size in (None, 0.25, 7, 0)]
    assert [run.num_held_out(133) for run in held] == [13, 33, 7, 0]
    assert RunConfig(model="m", data="d").num_held_out(1_000_000) == 500


def test_only_a_leading_tilde_of_a_path_means_anything(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunConfig(model="~/m", data="d").model == str(tmp_path / "m")
    for hostile in ("$(touch x)", "; rm -rf .", "`id`", "$HOME/m", "--model", "a b/ü", "x~/y", "~"):
        assert RunConfig(model=hostile, data="d").model == hostile


# --- YAML -------------------------------------------------------------------------------------


def test_yaml_values_follow_version_1_2():
    text = (
        "a: 1e-4\nb: no\nc: 010\nd: 12:30\ne: 2020-01-01\nf: .5\ng: 1_000\nh: -3\ni: ~\nj:\n"
        "k: 3e4\nl: '1'\nm: 0\nn: [1, x]\no: {p: true}\nq: 1e5x\n"
    )
    assert parse_yaml(text).values == {
        "a": 1e-4,
        "b": "no",
        "c": "010",
        "d": "12:30",
        "e": "2020-01-01",
        "f": 0.5,
        "g": "1_000",
        "h": -3,
        "i": None,
        "j": None,
        "k": 30000.0,
        "l": "1",
        "m": 0,
        "n": [1, "x"],
        "o": {"p": True},
        "q": "1e5x",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("r: 1\nlr: 2\nr: 3\n", "run.yaml:3: r is given twice"),
        ("columns: {a: x, a: y}\n", "a is given twice"),
        ("r: 1\n---\nr: 2\n", "another document"),
        ("r: !!python/object/apply:os.system [id]\n", "run.yaml:1: the tag"),
        ("r: !local 3\n", "the tag"),
        ("a: &x [1]\nb: *x\n", "anchors"),
        ("a: &x 1\n", "anchors"),
        ("a: *x\n", "anchors"),
        ("- r\n- 1\n", "is not a mapping"),
        ("just words\n", "is not a mapping"),
        ("", "holds no settings"),
        ("# only a comment\n", "holds no settings"),
        ("a:\n\t- 1\n", "run.yaml:2"),
        ("1: x\n", "a name must be a text"),
        ("null: x\n", "a name must be a text"),
        ("? [a]\n: 2\n", "a name must be a text"),
        ("a: 'x\n", "run.yaml:"),
        ("a: \x01\n", "run.yaml:1: the character U+0001"),
        ("a: " + "[" * 500 + "]" * 500, "nested deeper"),
        ("a: " + "x" * 1_000_001, "larger than"),
    ],
)
def test_yaml_that_could_hide_something_is_refused(text, words):
    assert words in yaml_problem(text)


def test_yaml_bomb_costs_nothing():
    rows = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    assert "anchors" in yaml_problem("\n".join(rows))


def test_a_file_is_read_with_its_lines(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes("\ufeffmodel: ü\r\n\r\nlr: 1e-4\r\n".encode())
    layer = load_yaml(path)
    assert layer.values == {"model": "ü", "lr": 1e-4}
    assert layer.origins == {"model": "run.yaml:1", "lr": "run.yaml:3"}


@pytest.mark.parametrize(
    ("raw", "words"),
    [(b"a: \xff\n", "byte 3 is not UTF-8"), (b"#" * 256_001, "larger than 256,000 bytes")],
)
def test_files_that_are_not_settings(tmp_path, raw, words):
    path = tmp_path / "run.yaml"
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=words):
        load_yaml(path)


def test_missing_files_and_folders_are_named(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="no such file"):
            load_yaml(path)


# --- the command line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("lr", "3", 3.0),
        ("batch_size", "16", 16),
        ("batch_size", "16.0", "16.0"),
        ("batch_size", "many", "many"),
        ("gradient_checkpointing", "true", True),
        ("gradient_checkpointing", "yes", "yes"),
        ("packing", "auto", "auto"),
        ("packing", "false", False),
        ("max_steps", "null", None),
        ("epochs", "none", None),
        ("seed", "none", "none"),
        ("metrics", "bleu,chrf", ["bleu", "chrf"]),
        ("metrics", "bleu", ["bleu"]),
        ("metrics", '["a,b"]', ["a,b"]),
        ("columns", "prompt=q,completion=a", {"prompt": "q", "completion": "a"}),
        ("columns", '{"prompt": "q, r"}', {"prompt": "q, r"}),
        ("rank_pattern", "q_proj=4", {"q_proj": 4}),
        ("target_modules", "all-linear", "all-linear"),
        ("target_modules", "q_proj,v_proj", ["q_proj", "v_proj"]),
        ("target_modules", "*.{q,v}_proj", "*.{q,v}_proj"),
        ("layers", "0,3,5", [0, 3, 5]),
        ("layers", "0-3", "0-3"),
        ("layers", "0,x", "0,x"),
        ("eval_size", "0.1", 0.1),
        ("eval_size", "10", 10),
        ("revision", "1e10", "1e10"),
        ("system", "true", "true"),
        ("model", "null", "null"),
        ("unheard_of", "1", "1"),
    ],
)
def test_flags_get_the_type_of_their_setting(name, text, value):
    made = parse_flag(name, text, KNOWN)
    assert made == value and type(made) is type(value)


def test_flags_know_how_they_were_written():
    layer = flag_layer({"--batch-size": "3", "rank": "2", "max_steps": "5"}, KNOWN)
    assert layer.values == {"batch_size": 3, "rank": 2, "max_steps": 5}
    written = {"batch_size": "--batch-size", "rank": "--rank", "max_steps": "--max-steps"}
    assert layer.origins == written


# --- layers -----------------------------------------------------------------------------------


def test_a_later_layer_wins_and_every_value_has_an_origin():
    file = parse_yaml("model: m\ndata: d\nmethod: thin\nlr: 1e-4\nr: 4\n", name="run.yaml")
    resolved = resolve(file, flag_layer({"--r": "2", "max-steps": "9"}, KNOWN), methods=METHODS)
    assert resolved.train.learning_rate == 1e-4 and resolved.train.max_steps == 9
    assert resolved.method == Thin(r=2)
    assert resolved.origins["learning_rate"] == "run.yaml:4"
    assert resolved.origins["r"] == "--r" and resolved.origins["max_steps"] == "--max-steps"
    assert resolved.origins["lora_alpha"] == resolved.origins["epochs"] == "default"
    assert set(resolved.origins) == set(resolved.values)
    assert resolved.notes == ("run.yaml:4: lr is taken as learning_rate",)


def test_rules_are_named_as_origins():
    resolved = resolve(("given", {**NEEDED, "lr_scheduler_type": "wsd"}), methods=METHODS)
    assert resolved.origins["epochs"] == "rule: neither epochs nor max_steps is given"
    later = resolved.decided("max_length", 507, "the longest record has 507 tokens")
    assert later.train.max_length == 507
    assert later.origins["max_length"] == "rule: the longest record has 507 tokens"
    assert later.origins["lr_scheduler_type"] == "given" and later.origins["seed"] == "default"
    with pytest.raises(ConfigError, match="max_length is 0"):
        resolved.decided("max_length", 0, "nothing there")


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_every_alias_leads_to_a_setting_and_is_told(alias):
    from lorica.methods import METHODS as REAL

    key = ALIASES[alias]
    known = known_settings(REAL)
    assert key in known and alias not in known
    assert alias not in NO_TWIN
    text = {"r": "3", "lora_alpha": "3"}.get(key)
    if text:
        layer = flag_layer({alias: text}, known)
        made = resolve(("given", {"model": "m", "data": "d"}), layer, methods=REAL)
        assert getattr(made.method, key) == 3
        assert made.notes == (f"--{alias.replace('_', '-')}: {alias} is taken as {key}",)


def test_problems_of_all_layers_come_together_with_their_origins():
    file = parse_yaml(
        "lr: 1e-4\nlearning_rate: 3\nlora: {r: 3}\nbatch-size: 010\npacking: no\nr: 0\n"
        "bf16: true\nwidth: 4\nlearing_rat: 3\nlora_alpha: true\n",
        name="run.yaml",
    )
    assert problems_of(file, flag_layer({"--max-steps": "x"}, KNOWN)) == [
        "run.yaml:2: learning_rate and lr are the same setting; keep one",
        "run.yaml:3: lora is not a setting; settings lie flat, without sections",
        "run.yaml:7: bf16 is not a setting here: write dtype: bfloat16",
        "run.yaml:9: learing_rat is not a setting; did you mean learning_rate?",
        "run.yaml:8: width has no effect with the method thin",
        "run.yaml:4: batch_size is '010'; expected a whole number from 1 to 65,536 "
        "(write 10, without quotes or leading zeros)",
        "--max-steps: max_steps is 'x'; expected a whole number of at least 1 or null",
        "run.yaml:5: packing is 'no'; expected auto or true or false "
        "(write false; yes, no, on and off are plain texts in YAML 1.2)",
        "run.yaml:10: lora_alpha is true; expected a number",
        "run.yaml:6: r is 0; it must be above 0",
    ]


def test_what_is_missing_is_named_with_its_flag():
    with pytest.raises(ConfigError) as caught:
        resolve(("given", {}))
    assert [line.split(";")[0] for line in caught.value.problems] == [
        "model is missing",
        "data is missing",
    ]
    assert all("give it as --" in line for line in caught.value.problems)


@pytest.mark.parametrize("word", ["tihn", "ia3", 3, ["thin"], None])
def test_an_unknown_method_is_answered_with_those_there_are(word):
    problems = problems_of(("flags", {"method": word}))
    assert any(p.startswith("flags: method is") and "thin" in p for p in problems)


@pytest.mark.parametrize("version", [2, "1", True, None])
def test_the_version_of_the_file_is_checked(version):
    assert resolve(("given", {**NEEDED, "version": 1}), methods=METHODS).method == Thin()
    assert "version is" in problems_of(("file", {"version": version}))[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hf_token", "x"),
        ("api_key", "x"),
        ("wandb_api_key", "x"),
        ("password", "x"),
        ("model", "hf_" + "aB3" * 9),
        ("system", "use sk-proj-" + "aB3" * 9),
        ("data", "https://me:hunter2@host/x.jsonl"),
        ("columns", {"text": "ghp_" + "aB3" * 9}),
    ],
)
def test_secrets_are_refused_and_never_shown(key, value):
    with pytest.raises(ConfigError) as caught:
        resolve(("flags", {**NEEDED, key: value}), methods=METHODS)
    text = str(caught.value)
    assert "looks like a secret" in text and "aB3" not in text and "hunter2" not in text


def test_words_that_only_resemble_secrets_pass():
    values = {**NEEDED, "model": "hf_models_of_ours/sk-learn-experiments-2024", "max_new_tokens": 9}
    assert resolve(("given", values), methods=METHODS).run.max_new_tokens == 9


def edits(word: str, rng: random.Random) -> set[str]:
    """All deletions and swaps of a word, some insertions and substitutions."""
    made = set()
    for place in range(len(word)):
        head, tail = word[:place], word[place:]
        letter = rng.choice(string.ascii_lowercase)
        made |= {head + tail[1:], head + letter + tail, head + letter + tail[1:]}
        if len(tail) > 1:
            made.add(head + tail[1] + tail[0] + tail[2:])
    return made


def test_typos_are_answered_with_the_right_name():
    rng = random.Random(0)
    meant = {typo: key for key in KNOWN if len(key) > 1 for typo in sorted(edits(key, rng))}
    typos = {typo: 1 for typo in meant if typo not in KNOWN and typo not in ALIASES}
    answers = problems_of(("flags", typos))
    assert len(answers) == len(typos) > 1500
    right = sum(
        f"did you mean {meant[typo]}?" in answer
        for typo, answer in zip(typos, answers, strict=True)
    )
    assert right / len(typos) >= 0.95, f"{right} of {len(typos)}"


# --- out again --------------------------------------------------------------------------------


def test_yaml_out_is_the_same_yaml_in():
    values = {**NEEDED, "lr": 1.5e-5, "rank_pattern": {"a.b": 3}, "metrics": ["bleu", "no"]}
    values |= {"layers": [0, 3], "eval_size": 0.25, "packing": True, "revision": "010"}
    resolved = resolve(("a\nb: c", values), methods=METHODS)
    text = resolved.to_yaml()
    again = resolve(parse_yaml(text), methods=METHODS)
    assert (again.run, again.train, again.method) == (resolved.run, resolved.train, resolved.method)
    assert again.to_yaml().count("\n") == text.count("\n")
    assert "learning_rate: 1.5e-05" in text and "# a?b: c" in text and "# default" in text


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff"), max_size=40)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    system=TEXTS,
    columns=st.dictionaries(TEXTS, TEXTS, max_size=3),
    targets=TEXTS | st.lists(TEXTS, max_size=3),
    rate=st.floats(1e-12, 1),
    alpha=st.floats(1e-30, 1e30) | st.integers(1, 10**20),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_values_survive_the_round(system, columns, targets, rate, alpha, seed):
    values = {"system": system, "columns": columns, "target_modules": targets}
    values |= {"learning_rate": rate, "lora_alpha": alpha, "seed": seed}
    resolved = resolve(("given", {**NEEDED, **values}), methods=METHODS)
    again = resolve(parse_yaml(resolved.to_yaml()), methods=METHODS)
    assert again.values == resolved.values and again.method == resolved.method


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text):
    try:
        layer = parse_yaml(text)
    except ConfigError as error:
        assert error.what
    else:
        assert set(layer.values) == set(layer.origins)


def test_schema_describes_every_setting():
    schema = json_schema(METHODS)
    assert json.loads(json.dumps(schema)) == schema
    assert schema["additionalProperties"] is False
    for key, setting in KNOWN.items():
        entry = schema["properties"][key]
        assert entry["description"] == setting.help
        assert {"type", "anyOf", "enum"} & set(entry), key
    assert schema["properties"]["batch_size"]["minimum"] == 1
    assert schema["properties"]["lora_rank"]["deprecated"] is True


def test_names_belong_to_one_group():
    run, train = set(RunConfig.model_fields), set(TrainSettings.model_fields)
    assert not run & train
    of_methods = {f.name for kind in METHODS.values() for f in dataclasses.fields(kind)}
    assert not (run | train) & of_methods
    assert KNOWN["width"].group == "thick" and KNOWN["r"].flag == "--r"


def test_config_loads_no_torch():
    code = "import sys, lorica.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_method_as_a_section_is_one_problem():
    with pytest.raises(ConfigError) as caught:
        resolve(
            ("run.yaml", {"model": "m", "data": "d", "method": {"r": "eight"}}), methods=METHODS
        )
    (problem,) = caught.value.problems
    assert "settings lie flat: write method: thin, and at the top level r: eight" in problem
