"""Adapters with settings of their own, that join, leave and fail while the others go on."""

import math

import pytest
import torch

from lorica.attach.attach import attach
from lorica.attach.handle import adapters
from lorica.config import TrainSettings
from lorica.errors import CheckpointError, ConfigError, Interrupted, NonFiniteError
from lorica.methods.lora import LoRA
from lorica.records.read import read_manifest
from lorica.tasks.causal_lm import CausalLM
from lorica.train.director import Newcomer
from lorica.train.loop import train
from train.runs import model_with, outcome, rows, stop_after
from train.words import WordTokenizer, examples

OWN = {
    "a": {"learning_rate": 3e-2, "max_steps": 5, "batch_size": 2, "eval_steps": 2},
    "b": {"learning_rate": 1e-2, "max_steps": 9, "batch_size": 3, "warmup_steps": 2, "seed": 4},
    "c": {
        "learning_rate": 5e-3,
        "epochs": 2.0,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 0.1,
        "eval_steps": 1,
    },
    "d": {"learning_rate": 2e-2, "max_steps": 4, "batch_size": 1, "eval_steps": 2},
    "e": {
        "learning_rate": 2e-2,
        "max_steps": 6,
        "batch_size": 5,
        "eval_steps": 3,
        "optim": "adamw",
    },
}
RANKS = dict(zip(OWN, (2, 5, 12, 32, 3), strict=True))
DATA = {name: examples(10 + i, 7 + 5 * i) for i, name in enumerate(OWN)}
HELD_OUT = examples(3, 7)


def settings(name, **changes):
    return TrainSettings(**{"save_steps": 2, "logging_steps": 2, **OWN[name], **changes})


def put(model, name, **method):
    wide = ["q_proj", "o_proj", "up_proj", "down_proj"]  # k and v have no room for 32 ranks
    targets = wide if RANKS[name] > 12 else "all-linear"
    how = {"r": RANKS[name], "target_modules": targets, **method}
    return attach(model, LoRA(**how), name=name, seed=sum(map(ord, name)))


class Scripted:
    """Ends adapters at given steps, and sends newcomers in when others have ended."""

    def __init__(self, model, *, ends=(), joins=(), **method):
        self.model, self.ends, self.joins, self.method = model, dict(ends), dict(joins), method
        self.sent, self.heard = [], []

    def judge(self, evaluation):
        self.heard.append((evaluation.name, evaluation.step))
        assert len(evaluation.losses) == len(evaluation.tokens) == len(HELD_OUT)
        mean = math.fsum(evaluation.losses) / sum(evaluation.tokens)
        assert evaluation.scores["eval_loss"] == mean
        return "cut" if self.ends.get(evaluation.name) == evaluation.step else None

    def newcomers(self, standing):
        gone = {None} | {name for name, why in standing.items() if why}
        due = [n for n, after in self.joins.items() if after in gone and n not in self.sent]
        self.sent += due
        return [self.again(name) for name in due]

    def again(self, name):
        adapter = put(self.model, name, **self.method)
        return Newcomer(adapter, DATA[name], settings(name), HELD_OUT)

    @property
    def state(self):
        return {"sent": list(self.sent), "heard": [list(pair) for pair in self.heard]}

    def restore(self, state):
        self.sent, self.heard = list(state["sent"]), [tuple(pair) for pair in state["heard"]]


def together(folder, names, director=None, *, model=None, resume=False, **script):
    model = model or model_with()
    handles = {put(model, name): name for name in names}
    return train(
        model,
        {handle: DATA[name] for handle, name in handles.items()},
        {handle: settings(name) for handle, name in handles.items()} or settings("a"),
        output_dir=folder,
        eval_data=HELD_OUT if names else None,
        task=CausalLM.of(WordTokenizer()),
        director=director or (Scripted(model, **script) if script else None),
        resume=resume,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The bytes and rows of every adapter that trained for itself."""
    found = {}
    for name in OWN:
        folder = tmp_path_factory.mktemp("alone") / name
        together(folder, [name])
        found[name] = (folder / "adapter/adapter_model.safetensors").read_bytes(), rows(folder)
    return found


def check_as_alone(folder, alone, names):
    told = rows(folder)
    for name in names:
        written = (folder / f"adapters/{name}/adapter_model.safetensors").read_bytes()
        assert written == alone[name][0], name
        own = [{k: v for k, v in r.items() if k != "turn"} for r in told if r["adapter"] == name]
        assert own == alone[name][1], name


def test_each_trains_by_its_own_settings_to_the_bits_of_a_run_alone(tmp_path, alone):
    report = together(tmp_path / "r", list(OWN))
    assert report.steps == {"a": 5, "b": 9, "c": 6, "d": 4, "e": 6}
    check_as_alone(tmp_path / "r", alone, OWN)


def test_joining_and_leaving_leave_the_others_bits_alone(tmp_path, alone):
    script = {"ends": {"c": 3}, "joins": {"d": "a", "e": "c"}}
    report = together(tmp_path / "r", ["a", "b", "c"], **script)
    assert report.stopped == {"a": None, "b": None, "c": "cut", "d": None, "e": None}
    assert report.steps == {"a": 5, "b": 9, "c": 3, "d": 4, "e": 6}
    check_as_alone(tmp_path / "r", alone, "abde")
    manifest = read_manifest(tmp_path / "r/run.json")
    assert list(manifest["adapters"]) == list("abced")  # c ends before a
    assert manifest["training"]["stopped"]["c"] == "cut"
    turns = [r["turn"] for r in rows(tmp_path / "r") if r["adapter"] == "e" and "eval_loss" in r]
    assert turns == [6, 9]


def test_the_director_may_bring_everybody(tmp_path, alone):
    together(tmp_path / "r", [], joins={"a": None, "b": None, "d": "a"})
    check_as_alone(tmp_path / "r", alone, "abd")


@pytest.mark.parametrize("turn", [1, 3, 5, 8])
def test_a_run_with_joins_and_leaves_goes_on_to_the_same_bits(tmp_path, monkeypatch, turn):
    script = {"ends": {"c": 3}, "joins": {"d": "a", "e": "c"}}
    heard = []
    for folder in ("whole", "stopped"):
        model = model_with()
        if folder == "stopped":
            with monkeypatch.context() as patch:
                stop_after(patch, turn)
                with pytest.raises(Interrupted):
                    together(tmp_path / folder, ["a", "b", "c"], model=model_with(), **script)
        director = Scripted(model, **script)
        again = folder == "stopped"
        together(tmp_path / folder, ["a", "b", "c"], director, model=model, resume=again)
        heard.append(director.heard)
    assert heard[0] == heard[1]
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_newcomers_of_a_checkpoint_need_their_director(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted):
            together(tmp_path / "r", ["a", "b", "c"], ends={"c": 3}, joins={"e": "c"})
    with pytest.raises(CheckpointError, match="adapters that do not train here: e"):
        together(tmp_path / "r", ["a", "b", "c"], resume=True)


# --- faults ---------------------------------------------------------------------------------------


def poison(monkeypatch, *hits):
    """The loss of the n-th adapter of a pass is NaN in the k-th pass: (k, n), both from 0."""
    original, count = CausalLM.losses, iter(range(1_000_000))

    def losses(self, model, batch):
        found, number = original(self, model, batch), next(count)
        return [x * math.nan if (number, i) in hits else x for i, x in enumerate(found)]

    monkeypatch.setattr(CausalLM, "losses", losses)


def test_a_fault_ends_one_adapter_and_leaves_the_others_bits_alone(tmp_path, alone, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, (4, 1))  # c accumulates two batches: the third step of b
        report = together(tmp_path / "r", ["a", "b", "c"])
    assert "adapter 'b', step 3: the loss is not finite" in report.failed["b"]
    assert (report.failed["a"], report.failed["c"], report.steps["b"]) == (None, None, 2)
    check_as_alone(tmp_path / "r", alone, "ac")
    kept = dict(adapters_of(tmp_path / "r/adapters/b"))
    assert kept
    assert all(t.isfinite().all() for t in kept.values())
    manifest = read_manifest(tmp_path / "r/run.json")
    assert manifest["training"]["failed"]["b"] == report.failed["b"]
    events = (tmp_path / "r/events.jsonl").read_text()
    assert "it ends here, and the others go on" in events


def adapters_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_tensors_that_were_never_finite_are_not_written(tmp_path, alone):
    model = model_with()
    b, a = put(model, "b"), put(model, "a")
    with torch.no_grad():
        next(iter(b.parameters())).fill_(math.nan)
    report = train(
        model,
        {b: DATA["b"], a: DATA["a"]},
        {b: settings("b"), a: settings("a")},
        output_dir=tmp_path / "r",
        eval_data=HELD_OUT,
        task=CausalLM.of(WordTokenizer()),
    )
    assert set(report.folders) == {"a"}
    check_as_alone(tmp_path / "r", alone, "a")


def test_where_all_fail_the_run_fails(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, (2, 1), (4, 0))  # pass 3 repeats 2 without b
        with pytest.raises(NonFiniteError, match="all 2 adapters failed") as caught:
            together(tmp_path / "r", ["a", "b"])
    assert len(caught.value.problems) == 2
    assert read_manifest(tmp_path / "r/run.json")["status"] == "failed"


# --- what cannot be -------------------------------------------------------------------------------


def test_settings_of_the_run_must_agree(tmp_path):
    model = model_with("a", "b")
    own = {"a": settings("a"), "b": settings("b", save_steps=3, gradient_checkpointing=True)}
    data = {name: DATA[name] for name in "ab"}
    with pytest.raises(ConfigError) as caught:
        train(model, data, own, output_dir=tmp_path / "r", task=CausalLM.of(WordTokenizer()))
    assert caught.value.problems == (
        "gradient_checkpointing is False for 'a', True for 'b'",
        "save_steps is 2 for 'a', 3 for 'b'",
    )
    assert not (tmp_path / "r").exists()


def test_every_adapter_needs_settings_and_only_those_that_train(tmp_path):
    model = model_with("a", "b")
    own = {"a": settings("a"), adapters(model)["a"]: settings("b")}
    with pytest.raises(ConfigError) as caught:
        train(
            model,
            {"b": DATA["b"]},
            own,
            output_dir=tmp_path / "r",
            task=CausalLM.of(WordTokenizer()),
        )
    assert caught.value.problems == (
        "'b' trains, and has no settings",
        "there are settings for 'a', which does not train",
        "an adapter has settings twice, by handle and by name",
    )


def test_without_anybody_there_is_nothing_to_train(tmp_path):
    with pytest.raises(ConfigError, match="nothing to train"):
        together(tmp_path / "r", [], joins={"a": "nobody"})
