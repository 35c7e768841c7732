"""The memory of a run, estimated without weights, beside what torch really allocates."""

import dataclasses

import pytest
import torch
import transformers as hf
from torch.profiler import ProfilerActivity, profile

from lorica.attach.attach import attach
from lorica.attach.handle import adapters
from lorica.base.known import base_of
from lorica.base.load import load_model
from lorica.config import TrainSettings
from lorica.data.encode import Example
from lorica.data.facts import facts
from lorica.errors import ConfigError
from lorica.methods import LISA, AdaLoRA, LoRA, Sparse
from lorica.tasks import CausalLM, TextClassification
from lorica.tasks.last_layer import Place
from lorica.train import ledger
from lorica.train.budget import Work, chosen_batches, estimate
from lorica.train.engine import Engine, Trainee, at_rest, between_of
from lorica.train.machine import machine_bytes
from lorica.train.rehearsal import Scoring
from lorica.train.shadow import Request, make_shadow, try_out
from lorica.train.starts import attach_by_records

METHOD = LoRA(r=8, target_modules="all-linear")
MIB = 2**20


@pytest.fixture(scope="module")
def shadow():
    made = make_shadow(Request("embedded", dtype="float32"))
    made.place = Place("model.layers", "self_attn.o_proj")  # what running it would tell
    return made


@pytest.fixture(scope="module")
def task(shadow):
    return CausalLM.of(shadow.base.tokenizer)


@pytest.fixture(scope="module")
def examples(task):
    return task.encode(facts("train", num_records=40)).examples


def planned(shadow, task, examples, *, method=METHOD, scoring=None, **settings):
    """An estimate of training for a process that holds nothing."""
    train = TrainSettings(max_steps=4, **{"batch_size": 8, **settings})
    work = Work(examples, scoring=scoring or Scoring())
    return estimate(shadow, method, task, work, train, process=0, training_only=scoring is None)


def allocated(model, task, examples, *, method=METHOD, **settings) -> int:
    """Bytes that torch allocates at once in a real step over the largest batch."""
    train = TrainSettings(max_steps=4, **{"batch_size": 8, **settings})
    adapter = attach(model, method, name="real")
    engine = Engine(model, task, gradient_checkpointing=train.gradient_checkpointing)
    trainee = Trainee(adapter, train, 4)
    largest = max(
        (examples[i : i + 8] for i in range(0, len(examples), 8)),
        key=lambda block: sum(map(len, block)),
    )
    engine.step([trainee], [[largest]])  # the optimizer's tensors come with the first step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        engine.step([trainee], [[largest]])
    engine.close()
    return most_bytes(seen)


def most_bytes(seen) -> int:
    """The most that was allocated at once while the profiler looked."""
    live = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_moments_take_what_was_planned(shadow, task, examples, optim):
    method = LoRA(r=32, target_modules=["q_proj", "v_proj"])  # B of v is below 4,096 numbers
    same = in_order(examples)
    found = planned(shadow, task, same, method=method, optim=optim)
    model = load_model("embedded", dtype="float32")
    adapter = attach(model, method, name="real")
    trainee = Trainee(adapter, TrainSettings(max_steps=4, optim=optim), 4)
    Engine(model, CausalLM.of(base_of(model).tokenizer)).step([trainee], [[same[:8]]])
    kept = [
        tensor.nbytes
        for state in trainee.optimizer.state.values()
        for key, tensor in state.items()
        if key != "step"
    ]
    assert found.optimizer == sum(kept)
    wide = 8 * sum(p.numel() for p in adapter.parameters())
    assert found.optimizer == wide if optim == "adamw" else wide / 4 < found.optimizer < wide / 2


def test_moments_in_8_bits_are_refused_of_small_tensors_as_in_training(shadow, task, examples):
    with pytest.raises(ConfigError, match="optim=adamw_8bit has no effect"):
        planned(shadow, task, examples, method=LoRA(r=1), optim="adamw_8bit")


def in_order(examples):
    """The same records in every batch, so that both sides see the same largest one."""
    first = examples[:8]
    return [dataclasses.replace(e) for _ in range(4) for e in first]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_takes_what_was_planned(shadow, task, examples, checkpointing):
    same, how = in_order(examples), {"gradient_checkpointing": checkpointing}
    found = planned(shadow, task, same, **how)
    model = load_model("embedded", dtype="float32")
    real = allocated(model, CausalLM.of(base_of(model).tokenizer), same, **how)
    step = found.activations + found.logits + found.workspace + found.gradients
    assert step == pytest.approx(real, rel=0.05)
    assert found.weights == sum(p.nbytes for p in model.parameters()) + sum(
        b.nbytes for b in model.buffers()
    )


@pytest.mark.parametrize(
    "method",
    [
        AdaLoRA(init_r=8, target_modules="all-linear"),
        LISA(lisa_activated_layers=1),
        LoRA(r=8, trainable_token_indices=(5, 9)),
    ],
    ids=lambda method: method.kind,
)
def test_other_methods_take_what_was_planned(shadow, task, examples, method):
    same = in_order(examples)
    found = planned(shadow, task, same, method=method)
    model = load_model("embedded", dtype="float32")
    own = CausalLM.of(base_of(model).tokenizer)
    step = found.activations + found.logits + found.workspace + found.gradients
    real = allocated(model, own, same, method=method)
    assert step == pytest.approx(real, rel=0.08)  # what AdaLoRA frees was not seen to come
    adapter = adapters(model)["real"]
    idle = {id(p) for p in at_rest(adapter, between_of(adapter, 4, 0), 0)}
    assert bool(idle) == (method.kind == "lisa")
    training = sum(p.nbytes for p in adapter.parameters() if id(p) not in idle)
    # the running means of AdaLoRA are as large as the moments
    assert found.optimizer == (4 if method.kind == "adalora" else 2) * training


def test_an_encoder_takes_what_was_planned(tmp_path, shadow):
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.BertConfig(vocab_size=4096, intermediate_size=96, num_labels=3, **shape)
    hf.BertForSequenceClassification(config).save_pretrained(tmp_path)
    shadow.base.tokenizer.save_pretrained(tmp_path)
    labels = ("a", "b", "c")
    task = TextClassification(shadow.base.tokenizer, labels)
    same = [Example([5 + i] * (20 + i), [i % 3], i) for i in range(8)] * 4
    request = Request(str(tmp_path), "text-classification", "float32", labels)
    other = make_shadow(request)
    try_out(other, task, same)
    assert other.place is not None
    found = planned(other, task, same)
    model = load_model(tmp_path, task="text-classification", labels=labels, dtype="float32")
    real = allocated(model, task, same)
    step = found.activations + found.logits + found.workspace + found.gradients
    assert step == pytest.approx(real, rel=0.05)


def test_what_frozen_layers_leave_in_memory_is_planned(shadow, task, examples):
    upper = LoRA(r=4, target_modules="all-linear", layers_to_transform=[1])
    plain = planned(shadow, task, examples, method=upper)
    kept = planned(shadow, task, examples, method=upper, reuse_frozen_layers="memory")
    disk = planned(shadow, task, examples, method=upper, reuse_frozen_layers="disk")
    whole = planned(shadow, task, examples, reuse_frozen_layers="memory")
    width = shadow.model.config.hidden_size
    assert kept.states == sum(map(len, examples)) * width * 4
    assert kept.phases["training"] - plain.phases["training"] == kept.states
    assert plain.states == disk.states == whole.states == 0


def test_a_missing_head_is_known_from_the_headers(tmp_path, shadow):
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.BertConfig(vocab_size=300, intermediate_size=32, **shape)
    hf.BertModel(config).save_pretrained(tmp_path)
    shadow.base.tokenizer.save_pretrained(tmp_path)
    how = {"task": "text-classification", "labels": ("x", "y")}
    bare = make_shadow(Request(str(tmp_path), **how))
    loaded = load_model(tmp_path, **how)
    assert bare.base.new_modules == base_of(loaded).new_modules == ("classifier",)


def test_parts_add_up_and_cheaper_settings_are_cheaper(shadow, task, examples):
    whole = planned(shadow, task, examples)
    assert sum(getattr(whole, part) for part in whole.PARTS) == whole.total
    half = planned(shadow, task, examples, batch_size=4, gradient_accumulation_steps=2)
    assert half.activations < 0.65 * whole.activations
    assert half.gradients > whole.gradients, "the second part finds the gradients of the first"
    thin = planned(shadow, task, examples, method=LoRA(r=2, target_modules="all-linear"))
    assert thin.adapter == whole.adapter // 4
    # what the allocator keeps besides is a matter of a few pieces that fit or do not
    assert thin.total - thin.fragmentation < whole.total - whole.fragmentation
    redone = planned(shadow, task, examples, gradient_checkpointing=True)
    assert redone.activations < 0.5 * whole.activations
    assert planned(shadow, task, examples) == whole, "an estimate leaves the shadow as it was"


def test_scoring_can_be_the_peak(shadow, task, examples):
    scoring = Scoring(examples, batch_size=40, new_tokens=32)
    found = planned(shadow, task, examples, scoring=scoring, batch_size=1)
    assert found.phase == "scoring"
    assert found.total == found.phases["scoring"] > found.phases["training"]


@pytest.mark.parametrize(
    "method",
    [
        LoRA(r=8, target_modules="all-linear", init_lora_weights="lora_ga", init_records=6),
        Sparse(target_modules="all-linear", relevance_records=6),
        LoRA(r=8, target_modules="all-linear", init_lora_weights="eva", init_records=6),
    ],
    ids=["lora_ga", "sparse", "eva"],
)
def test_a_choice_by_gradients_has_a_peak_of_its_own(shadow, task, examples, method, monkeypatch):
    monkeypatch.setattr(ledger, "held", lambda events: None)  # the profiler sees what lives alone
    scoring = Scoring(examples[:2], batch_size=2, new_tokens=2)
    found = planned(shadow, task, examples, method=method, scoring=scoring)
    model = load_model("embedded", dtype="float32")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        attach_by_records(model, method, task, examples)
    real = most_bytes(seen)
    if not method.needs_gradients:
        assert "choosing" not in found.phases
        assert real < found.phases["training"]
        return
    plan = found.phases["choosing"] - found.weights
    assert 0.5 * plan < real < 1.05 * plan


def test_the_largest_batch_decides(shadow, task, examples):
    lone = dataclasses.replace(examples[0], input_ids=[7] * 200, labels=[7] * 200)
    settings = TrainSettings(max_steps=10, batch_size=4)
    _, largest = chosen_batches([*examples, lone], shadow.task(task), shadow, settings)
    assert lone in largest
    early = TrainSettings(max_steps=1, batch_size=4)
    usual, only = chosen_batches(examples, shadow.task(task), shadow, early)
    assert usual == only, "a run of one step sees one batch"


def test_the_miniature_tells_of_packing(shadow, task, examples):
    other = make_shadow(Request("embedded", dtype="float32"))
    other.packs = other.plain = False
    try_out(other, task, examples)
    assert (other.packs, other.plain, other.notes) == (True, True, [])
    assert other.place == shadow.place


def test_the_machine_has_memory():
    whole, free = machine_bytes(torch.device("cpu"))
    assert whole > 64 * MIB
    assert 0 < free <= whole
