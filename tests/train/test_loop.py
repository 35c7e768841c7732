"""The run around the step: what trains when, evaluation, the best, faults, what is written."""

import hashlib
import json
import math

import pytest
import torch
import transformers as hf

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.attach.handle import adapters
from lorica.base.known import Base
from lorica.config import TrainSettings
from lorica.data.encode import Example
from lorica.errors import ConfigError, DataError, NonFiniteError, TrainingError
from lorica.methods.lora import LoRA
from lorica.records.read import read_manifest
from lorica.tasks import CausalLM, TextClassification
from lorica.train import evaluations
from lorica.train.course import Course
from lorica.train.engine import Engine, Trainee
from lorica.train.loop import total_steps, train
from lorica.train.seed import derive_seed
from train.runs import model_with, outcome, rows, run
from train.words import WordTokenizer, examples, fast_tokenizer


def one(folder, model=None, *, data=None, resume=False, task=None, eval_data=None, **settings):
    """Train adapter a."""
    return train(
        model or model_with("a"),
        {"a": data or examples(1, 9)},
        TrainSettings(**{"learning_rate": 1e-2, "batch_size": 4, "max_steps": 4, **settings}),
        output_dir=folder,
        eval_data=eval_data,
        task=task or CausalLM.of(WordTokenizer()),
        resume=resume,
    )


def sha(folder):
    return hashlib.sha256((folder / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()


# --- which records come when ----------------------------------------------------------------------


def course(count, group=1, **settings):
    model = model_with("a")
    own = TrainSettings(**settings)
    trainee = Trainee(adapters(model)["a"], own, total_steps(count, own))
    return Course(trainee, examples(1, count), [], group)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(
    ("count", "size", "number"), [(1, 4, 1), (17, 3, 2), (12, 3, 2), (5, 8, 3)]
)
def test_every_record_once_per_epoch(count, size, number, group):
    own = course(count, group, batch_size=size, gradient_accumulation_steps=number, epochs=2.0)
    steps = math.ceil(count / (size * number))
    assert own.steps_per_epoch == steps
    assert own.trainee.total == 2 * steps
    orders = []
    for _ in range(2):
        seen = []
        for step in range(steps):
            micro = own.micro_batches()
            assert all(len(batch) <= size for batch in micro)
            if step < steps - 1:
                assert [len(batch) for batch in micro] == [size] * number
            seen += [e.row for batch in micro for e in batch]
            own.trainee.step += 1
        assert sorted(seen) == list(range(count))
        orders.append(seen)
    assert count <= size or orders[0] != orders[1]


def test_the_batches_of_a_step_depend_on_seed_and_step_only():
    first, second = course(17, 4, batch_size=3), course(17, 4, batch_size=3)
    first.trainee.step = second.trainee.step = 13
    first.micro_batches()
    second.trainee.step = 2
    second.micro_batches()
    second.trainee.step = 13
    assert first.micro_batches() == second.micro_batches()
    other = course(17, 4, batch_size=3, seed=1)
    other.trainee.step = 13
    assert other.micro_batches() != first.micro_batches()


def test_grouping_brings_similar_lengths_together():
    def padded(group):
        own, total = course(200, group, batch_size=8), 0
        for step in range(own.steps_per_epoch):
            own.trainee.step = step
            total += sum(max(map(len, b)) * len(b) for b in own.micro_batches())
        return total

    real = sum(map(len, examples(1, 200)))
    assert padded(1) > 1.5 * real
    assert padded(32) < 1.1 * real


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_steps": 3}, 3),
        ({"epochs": 2.0}, 20),
        ({"epochs": 1.1}, 11),
        ({"epochs": 0.25}, 3),
        ({"epochs": 2.0, "max_steps": 7}, 7),
        ({"epochs": 1.0, "max_steps": 70}, 10),
    ],
)
def test_number_of_steps(settings, steps):
    assert total_steps(40, TrainSettings(batch_size=4, **settings)) == steps


@pytest.mark.parametrize("count", [1, 2, 5])
def test_fewer_records_than_a_batch(tmp_path, count):
    report = one(tmp_path / "r", data=examples(4, count), batch_size=64, max_steps=3)
    assert report.steps == {"a": 3}
    assert [row["epoch"] for row in rows(tmp_path / "r")] == [3.0]
    assert report.best_step == {"a": 3}


# --- evaluation and the best ----------------------------------------------------------------------


def test_evaluation_comes_when_due_and_once_at_the_end(tmp_path, monkeypatch):
    seen, original = [], evaluations.mean_loss
    monkeypatch.setattr(
        evaluations, "mean_loss", lambda *a, **k: seen.append(1) or original(*a, **k)
    )
    one(tmp_path / "r", eval_data=examples(5, 3), max_steps=6, eval_steps=3, logging_steps=2)
    made = rows(tmp_path / "r")
    assert [row["step"] for row in made] == [2, 3, 4, 6]
    assert ["eval_loss" in row for row in made] == [False, True, False, True]
    assert len(seen) == 2


def test_without_eval_steps_it_evaluates_every_epoch(tmp_path):
    one(tmp_path / "r", eval_data=examples(5, 3), max_steps=7)  # 9 records in batches of 4
    assert [row["step"] for row in rows(tmp_path / "r")] == [3, 6, 7]


def test_the_logged_loss_is_the_mean_over_tokens(tmp_path):
    """Of the whole window, not of the last step, and weighted by trained tokens."""
    one(tmp_path / "one", logging_steps=1)
    one(tmp_path / "all", logging_steps=4)
    single = rows(tmp_path / "one")
    own = course(9, batch_size=4, max_steps=4)
    counts = []
    for step in range(4):
        own.trainee.step = step
        counts.append(sum(e.num_trained for b in own.micro_batches() for e in b))
    wanted = sum(r["loss"] * n for r, n in zip(single, counts, strict=True)) / sum(counts)
    assert rows(tmp_path / "all")[0]["loss"] == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("keep", [True, False])
def test_the_best_or_the_last_is_kept(tmp_path, keep):
    model = model_with("a")
    how = {"eval_steps": 1, "max_steps": 6, "learning_rate": 0.3, "keep_best": keep}
    report = one(tmp_path / "r", model, eval_data=examples(5, 6), **how)
    losses = [row["eval_loss"] for row in rows(tmp_path / "r")]
    best = min(losses)
    assert losses[-1] > best
    assert report.best_step["a"] == (losses.index(best) + 1 if keep else 6)
    assert report.eval_loss["a"] == (best if keep else losses[-1])
    task = CausalLM.of(WordTokenizer())
    with activate(model, "a"):
        again = evaluations.mean_loss(model, task, examples(5, 6), 4)
    assert again == report.eval_loss["a"]


def test_it_stops_after_so_many_evaluations_without_gain(tmp_path):
    how = {"eval_steps": 1, "max_steps": 40, "learning_rate": 0.5, "early_stopping_patience": 2}
    report = one(tmp_path / "r", eval_data=examples(5, 6), **how)
    losses = [row["eval_loss"] for row in rows(tmp_path / "r")]
    best = losses.index(min(losses))
    assert report.steps["a"] == len(losses) == best + 3
    assert report.stopped["a"].startswith("the evaluation loss has not fallen for 2 evaluations")
    assert read_manifest(tmp_path / "r/run.json")["training"]["stopped"]["a"] == report.stopped["a"]


def test_an_evaluator_adds_scores(tmp_path):
    def evaluator(model, adapter):
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"names": float(len(adapter.name))}

    model = model_with("a")
    train(
        model,
        {adapters(model)["a"]: examples(1, 3)},
        TrainSettings(max_steps=1),
        output_dir=tmp_path / "r",
        eval_data={"a": examples(2, 2)},
        task=CausalLM.of(WordTokenizer()),
        evaluator=evaluator,
    )
    assert rows(tmp_path / "r")[0]["eval_names"] == 1.0


def test_an_evaluation_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluations, "mean_loss", lambda *a, **k: math.nan)
    with pytest.raises(NonFiniteError, match=r"step 2: the evaluation loss is not finite \(nan\)"):
        one(tmp_path / "r", eval_data=examples(2, 2), eval_steps=2)


# --- repeatable -----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path):
    torch.manual_seed(1)
    one(tmp_path / "1", model_with("a", seed=3), seed=3)
    torch.manual_seed(2)
    one(tmp_path / "2", model_with("a", seed=3), seed=3)
    assert sha(tmp_path / "1") == sha(tmp_path / "2")
    assert rows(tmp_path / "1") == rows(tmp_path / "2")
    one(tmp_path / "3", model_with("a", seed=3), seed=4)
    one(tmp_path / "4", model_with("a", seed=4), seed=3)
    assert len({sha(tmp_path / n) for n in "134"}) == 3


def test_an_adapter_trains_beside_another_as_alone(tmp_path):
    data = {"a": examples(1, 17), "b": examples(2, 11)}
    how = {"early_stopping_patience": None, "max_steps": 5}
    run(tmp_path / "both", data=data, **how)
    model = model_with("a", "b")
    train(
        model,
        {"b": data["b"]},
        TrainSettings(**{**run.__globals__["SETTINGS"], **how}),
        output_dir=tmp_path / "alone",
        eval_data=examples(3, 7),
        task=CausalLM.of(WordTokenizer()),
    )
    together = (tmp_path / "both/adapters/b/adapter_model.safetensors").read_bytes()
    assert together == (tmp_path / "alone/adapter/adapter_model.safetensors").read_bytes()
    assert rows(tmp_path / "alone") == [r for r in rows(tmp_path / "both") if r["adapter"] == "b"]


def test_the_callers_model_and_random_numbers_are_left_as_they_were(tmp_path):
    model = model_with("a")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(11)
    wanted = torch.rand(3)
    torch.manual_seed(11)
    one(tmp_path / "r", model, gradient_checkpointing=True)
    assert torch.equal(torch.rand(3), wanted)
    assert not model.training
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.config._attn_implementation == "sdpa"
    model.train()
    one(tmp_path / "s", model)
    assert model.training


def test_seeds_of_steps_differ():
    assert len({derive_seed(s, t, m) for s in range(5) for t in range(5) for m in range(5)}) == 125


# --- precision ------------------------------------------------------------------------------------


def test_a_bfloat16_base_keeps_adapters_in_float32(tmp_path):
    model = model_with("a", dropout=0.0).to(torch.bfloat16)
    data = examples(1, 6)
    one(tmp_path / "r", model, data=data, max_steps=12, logging_steps=1, learning_rate=2e-2)
    losses = [row["loss"] for row in rows(tmp_path / "r")]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert {p.dtype for p in adapters(model)["a"].parameters()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert read_manifest(tmp_path / "r/run.json")["base"]["dtype"] == "bfloat16"


def test_gradient_checkpointing_gives_the_same_bytes(tmp_path):
    one(tmp_path / "r")
    one(tmp_path / "s", gradient_checkpointing=True)
    assert sha(tmp_path / "r") == sha(tmp_path / "s")


# --- faults ---------------------------------------------------------------------------------------


def poison(monkeypatch, step, what):
    """From step `step` on (1 is the first) the loss, or its gradient only, is not finite."""
    original = CausalLM.losses
    calls = []

    def losses(self, model, batch):
        calls.append(1)
        found = original(self, model, batch)
        if len(calls) < step:
            return found
        if what == "gradient":
            found[0].register_hook(lambda g: g * math.inf)
            return found
        return [found[0] * (math.nan if what == "nan" else math.inf)]

    monkeypatch.setattr(CausalLM, "losses", losses)


@pytest.mark.parametrize("what", ["nan", "inf", "gradient"])
def test_a_loss_that_is_not_finite(tmp_path, monkeypatch, what):
    """It ends before the optimizer step, says which one, and leaves the last state finite."""
    poison(monkeypatch, 3, what)
    model = model_with("a")
    with pytest.raises(NonFiniteError) as caught:
        one(tmp_path / "r", model, save_steps=1)
    told = str(caught.value)
    assert "adapter 'a', step 3" in told
    assert "learning rate 0.005" in told
    assert ("records of the micro-batch" in told) == (what != "gradient")
    assert all(p.isfinite().all() for p in adapters(model)["a"].parameters())
    manifest = read_manifest(tmp_path / "r/run.json")
    assert manifest["status"] == "failed"
    assert "step 3" in manifest["error"]
    assert max(p.name for p in (tmp_path / "r/checkpoints").iterdir()) == "step-00000002"
    monkeypatch.undo()
    one(tmp_path / "r", resume=True, save_steps=1)
    one(tmp_path / "whole")
    assert sha(tmp_path / "r") == sha(tmp_path / "whole")


def test_a_fault_of_one_adapter_leaves_no_gradient_with_the_other():
    model = model_with("a", "b", dropout=0.0)
    with torch.no_grad():
        next(iter(adapters(model)["b"].parameters())).fill_(math.nan)
    engine = Engine(model, CausalLM.of(WordTokenizer()))
    trainees = [Trainee(adapters(model)[n], TrainSettings(max_steps=2), 2) for n in "ab"]
    with pytest.raises(NonFiniteError, match="adapter 'b', step 1"):
        engine.step(trainees, [[examples(1, 2)], [examples(2, 2)]])
    assert [t.step for t in trainees] == [0, 0]
    clean = model_with("a", "b", dropout=0.0)
    other = Engine(clean, CausalLM.of(WordTokenizer()))
    alone = Trainee(adapters(clean)["a"], TrainSettings(max_steps=2), 2)
    engine.step(trainees[:1], [[examples(3, 2)]])
    other.step([alone], [[examples(3, 2)]])
    wanted = dict(adapters(clean)["a"].named_parameters())
    for key, tensor in adapters(model)["a"].named_parameters():
        assert torch.equal(tensor, wanted[key]), key


def test_tensors_that_are_not_finite_never_reach_a_checkpoint(tmp_path, monkeypatch):
    original = Engine.step

    def step(self, trainees, work):
        results = original(self, trainees, work)
        next(iter(trainees[0].adapter.parameters())).data[0, 0] = math.inf
        return results

    monkeypatch.setattr(Engine, "step", step)
    with pytest.raises(NonFiniteError, match="1 tensors are not finite"):
        one(tmp_path / "r", save_steps=1)
    assert not (tmp_path / "r/checkpoints").exists()


def test_any_other_error_is_written_down(tmp_path, monkeypatch):
    def broken(self, trainees, work):
        raise RuntimeError("out of luck, say")

    monkeypatch.setattr(Engine, "step", broken)
    with pytest.raises(RuntimeError):
        one(tmp_path / "r")
    manifest = read_manifest(tmp_path / "r/run.json")
    assert (manifest["status"], manifest["error"]) == ("failed", "RuntimeError: out of luck, say")


def test_a_layer_that_is_passed_by_is_named(tmp_path):
    model = model_with("a")
    model.model.layers[1].forward = lambda hidden_states, **other: hidden_states
    with pytest.raises(TrainingError, match="never called") as caught:
        one(tmp_path / "r", model, task=CausalLM.of(WordTokenizer(), packing=False))
    assert all("layers.1." in problem for problem in caught.value.problems)


# --- what cannot work is said before anything trains ----------------------------------------------


def test_records_without_anything_to_learn(tmp_path):
    data = [*examples(1, 3), Example([1, 2, 3], [-100] * 3), Example([4, 5], [-100] * 2)]
    with pytest.raises(DataError, match="2 of 5 examples have no trained token") as caught:
        one(tmp_path / "r", data=data)
    assert caught.value.problems == ("examples 3, 4, counted from 0",)
    assert not (tmp_path / "r").exists()
    engine = Engine(model := model_with("a"), CausalLM.of(WordTokenizer()))
    trainee = Trainee(adapters(model)["a"], TrainSettings(max_steps=1), 1)
    with pytest.raises(TrainingError, match="no token to learn"):
        engine.step([trainee], [[data[3:]]])


def test_records_that_are_too_long(tmp_path):
    long = Example([1] * 65, [-100] + [1] * 64)
    with pytest.raises(DataError, match="has 65 tokens, but the model has 64 positions"):
        one(tmp_path / "r", data=[long])


def test_no_records(tmp_path):
    with pytest.raises(DataError, match="no records for adapter 'a'"):
        train(
            model_with("a"), {"a": []}, output_dir=tmp_path / "r", task=CausalLM.of(WordTokenizer())
        )
    with pytest.raises(ConfigError, match="nothing to train"):
        train(model_with("a"), {}, output_dir=tmp_path / "r", task=CausalLM.of(WordTokenizer()))


def test_settings_without_effect_are_refused_all_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        one(
            tmp_path / "r",
            early_stopping_patience=3,
            eval_steps=2,
            eval_batch_size=5,
            packing=False,
            dtype="bfloat16",
            max_length=32,
        )
    assert [problem.split(" ")[0] for problem in caught.value.problems] == [
        "early_stopping_patience=3",
        "eval_steps=2",
        "eval_batch_size=5",
        "packing=False",
        "max_length=32",
        "dtype=bfloat16",
    ]


def test_packing_that_the_task_does_not_have_is_refused(tmp_path):
    model = ARCHITECTURES["bert"].build()
    activate(model, None)
    task = TextClassification(WordTokenizer(), ("0", "1", "2"))
    with pytest.raises(ConfigError, match="its task is not known"):
        train(model, {"a": []}, output_dir=tmp_path)
    attach(model, LoRA(r=2, target_modules="all-linear", modules_to_save=("classifier",)), name="a")
    with pytest.raises(ConfigError, match="packing=True has no effect on this task"):
        one(tmp_path / "r", model, task=task, packing=True)


def test_adapters_that_do_not_fit_the_data_are_refused(tmp_path):
    model = model_with("a", "b")
    task = CausalLM.of(WordTokenizer())
    with pytest.raises(ConfigError) as caught:
        train(
            model,
            {"a": examples(1, 3), adapters(model)["a"]: examples(1, 3)},
            output_dir=tmp_path / "r",
            eval_data={"b": examples(1, 2)},
            task=task,
        )
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="no adapter 'c'"):
        train(model, {"c": examples(1, 3)}, output_dir=tmp_path / "r", task=task)


def test_a_warmup_longer_than_the_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="warmup_steps=50 is more than the 3 steps"):
        one(tmp_path / "r", max_steps=None, epochs=1.0, warmup_steps=50)


def test_shared_records_are_encoded_once(tmp_path, monkeypatch):
    calls, original = [], CausalLM.encode
    monkeypatch.setattr(
        CausalLM, "encode", lambda self, r: calls.append(len(r)) or original(self, r)
    )
    records = [{"prompt": "w5 w6", "completion": " w7 w8"}] * 4
    train(
        model_with("a", "b"),
        {"a": records, "b": records},
        TrainSettings(max_steps=1),
        output_dir=tmp_path / "r",
        eval_data=records[:2],
        task=CausalLM.of(fast_tokenizer(eos_token="</s>")),
    )
    assert calls == [4, 2]


# --- what is written ------------------------------------------------------------------------------


def test_the_manifest(tmp_path):
    report = run(tmp_path / "r", max_steps=4)
    manifest = read_manifest(tmp_path / "r/run.json")
    assert manifest["status"] == "finished"
    assert manifest["plan"] == {"max_steps": 4, "epochs": 2.0, "batch_size": 6}
    assert manifest["adapters"]["b"]["method"]["r"] == 4
    assert manifest["method"]["kind"] == "lora"
    assert manifest["resources"]["adapter_bytes"] > 1000
    assert manifest["training"] == json.loads(json.dumps(report.summary()))
    assert manifest["base"]["architecture"] == "LlamaForCausalLM"
    seconds = report.resources["seconds"]
    tokens = sum(r["tokens"] for r in rows(tmp_path / "r") if r["step"] == 4)
    assert report.tokens_per_second == pytest.approx(tokens / seconds)
    assert outcome(tmp_path / "r")[1]["a"]["step"] == 4


def test_notes_of_encoding_and_task_are_told(tmp_path):
    model = model_with("a", architecture="bloom")
    records = [{"prompt": "w5 " * 30, "completion": "w7"}] * 2
    task = CausalLM.of(fast_tokenizer(eos_token="</s>"), max_length=9)
    one(tmp_path / "r", model, data=records, task=task)
    events = (tmp_path / "r/events.jsonl").read_text()
    assert "cut to 9 tokens" in events
    assert "batches are padded, not packed" in events


# --- how records are asked ------------------------------------------------------------------------


def loaded(*names):
    """A model as `load_model` leaves it."""
    model = model_with(*names)
    model.__dict__["_lorica_base"] = Base("x", "causal-lm", "", fast_tokenizer(eos_token="</s>"))
    return model


def test_prompt_and_completion_are_parted_where_the_records_do_not(tmp_path):
    pairs = [{"prompt": "w7 w8", "completion": "w9"}, {"prompt": "w5", "completion": "w6"}]
    parted = [{**pair, "prompt": pair["prompt"] + "\n"} for pair in pairs]
    found = {}
    for name, data in (("bare", pairs), ("parted", parted)):
        model = loaded("a")
        train(model, {"a": data}, TrainSettings(max_steps=2), output_dir=tmp_path / name)
        facts = json.loads((tmp_path / name / "adapter/lorica.json").read_text())
        found[name] = facts["task"]["separator"]
    assert found == {"bare": "\n", "parted": ""}
    hf.AutoTokenizer.from_pretrained(tmp_path / "bare" / "adapter")  # goes with the adapter
    events = (tmp_path / "bare" / "events.jsonl").read_text()
    assert "no white space parts prompt and completion" in events
    with pytest.raises(ConfigError, match="part prompt and completion by white space, and some"):
        train(loaded("a", "b"), {"a": pairs, "b": parted}, output_dir=tmp_path / "both")
