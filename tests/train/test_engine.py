"""The optimizer step: accumulation, packing, adapters beside others, faults."""

import math
import weakref

import pytest
import torch
import transformers

from architectures import ARCHITECTURES
from exact.measured import threads
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.config import TrainSettings
from lorica.data.encode import Example
from lorica.errors import NonFiniteError, TrainingError
from lorica.methods.dora import DoRA
from lorica.methods.lora import LoRA
from lorica.tasks.causal_lm import CausalLM
from lorica.tasks.seq2seq import Seq2Seq
from lorica.train.engine import Engine, Trainee
from lorica.train.passes import draws, passes_of
from train.words import WordTokenizer, examples, fast_tokenizer


def build(name="llama", dtype=torch.float32):
    return ARCHITECTURES[name].build().to(dtype)


def task(packing="auto"):
    return CausalLM.of(WordTokenizer(), packing=packing)


def trained(
    model, names, *, steps=3, settings=None, ranks=None, packing="auto", data_seed=0, together=True
):
    """Tensors of every adapter after some steps, trained together or one after the other."""
    settings = settings or TrainSettings(learning_rate=5e-3, max_steps=steps, weight_decay=0.01)
    ranks = ranks or dict.fromkeys(names, 4)
    handles = {
        n: attach(model, LoRA(r=ranks[n], target_modules="all-linear"), name=n, seed=i)
        for i, n in enumerate(names)
    }
    engine = Engine(model, task(packing))
    trainees = {n: Trainee(handles[n], settings, steps) for n in names}
    work = {
        n: [[examples(100 * i + s + data_seed, 2 + i)] for s in range(steps)]
        for i, n in enumerate(names)
    }
    for step in range(steps):
        if together:
            engine.step(list(trainees.values()), [work[n][step] for n in names])
        else:
            for n in names:
                engine.step([trainees[n]], [work[n][step]])
    return {n: {k: p.detach().clone() for k, p in handles[n].named_parameters()} for n in names}


@pytest.mark.parametrize("seed", range(5))
def test_layers_that_training_drops_at_random_are_not_reported(seed):
    model = build("bart")
    for part in (model.model.encoder, model.model.decoder):
        part.layerdrop = 0.9
    adapter = attach(model, LoRA(r=2, target_modules=["q_proj", "lm_head"]), name="a")
    own = Seq2Seq(fast_tokenizer(eos_token="</s>", pad_token="<pad>"))
    trainee = Trainee(adapter, TrainSettings(max_steps=1, seed=seed), 1)
    Engine(model, own).step([trainee], [[[Example([5, 6, 2], [7, 8, 2])]]])
    assert model.training


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_training_beside_others_gives_the_same_bits_as_alone(name):
    names = ["a", "b", "c"]
    ranks = {"a": 4, "b": 5, "c": 12}
    together = trained(build(name), names, ranks=ranks)
    alone = trained(build(name), names, ranks=ranks, together=False)
    for n in names:
        assert together[n].keys() == alone[n].keys()
        for key, tensor in together[n].items():
            assert torch.equal(tensor, alone[n][key]), f"{n}: {key}"
        assert any(t.abs().sum() > 0 for k, t in together[n].items() if k.endswith(".B"))


def test_the_segments_really_share_one_pass(monkeypatch):
    calls = []
    original = CausalLM.losses
    monkeypatch.setattr(
        CausalLM, "losses", lambda self, m, b: calls.append(len(b.labels)) or original(self, m, b)
    )
    trained(build(), ["a", "b", "c"], steps=2)
    assert calls == [3, 3]


def test_accumulating_equals_one_large_batch():
    data = examples(7, 9)
    results = []
    for micro in ([data], [data[:2], data[2:3], data[3:]]):
        model = build().double()
        adapter = attach(
            model, LoRA(r=3, target_modules="all-linear", init_lora_weights="random"), name="x"
        )
        for p in adapter.parameters():
            p.data = p.data.double()
        engine = Engine(model, task())
        trainee = Trainee(adapter, TrainSettings(learning_rate=1e-2, max_steps=1), 1)
        before = {k: p.detach().clone() for k, p in adapter.named_parameters()}
        (result,) = engine.step([trainee], [micro])
        results.append((result, {k: p.detach() - before[k] for k, p in adapter.named_parameters()}))
    assert results[0][0].loss == pytest.approx(results[1][0].loss, rel=1e-6)
    assert results[0][0].trained_tokens == results[1][0].trained_tokens
    assert results[0][0].grad_norm == pytest.approx(results[1][0].grad_norm, rel=1e-9)


def test_every_step_counts_as_a_write():
    """DoRA keeps norms as long as no tensor's count of writes changes."""
    model = build()
    adapter = attach(model, LoRA(r=2, target_modules="all-linear"), name="x")
    counts = {name: p._version for name, p in adapter.named_parameters()}
    engine, trainee = Engine(model, task()), Trainee(adapter, TrainSettings(max_steps=1), 1)
    engine.step([trainee], [[examples(7, 3)]])
    assert all(p._version > counts[name] for name, p in adapter.named_parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma", "gpt_neox", "qwen3", "phi"])
def test_packed_equals_the_documents_alone(name):
    """Loss and gradients of a packed batch are those of its documents, one at a time."""
    data = examples(3, 5)
    model = build(name).double()
    adapter = attach(
        model, LoRA(r=3, target_modules="all-linear", init_lora_weights="random"), name="x"
    )
    for p in adapter.parameters():
        p.data = p.data.double()
    packed, single = task(), task(packing=False)
    with activate(model, None):
        assert packed.packs(model), packed.notes

    def gradients(which, blocks):
        total = 0.0
        with activate(model, "x"):
            for block in blocks:
                (loss,) = which.losses(model, which.collate([block], model))
                loss.backward()
                total += loss.item()
        found = {k: p.grad.clone() for k, p in adapter.named_parameters()}
        for p in adapter.parameters():
            p.grad = None
        return total, found

    loss_packed, grad_packed = gradients(packed, [data])
    loss_alone, grad_alone = gradients(single, [[e] for e in data])
    assert loss_packed == pytest.approx(loss_alone, rel=1e-5)
    for key, value in grad_packed.items():
        torch.testing.assert_close(value, grad_alone[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox"])
def test_one_document_leaves_the_others_bits_alone(name):
    """Changing one packed document changes no bit of another one's loss."""
    data = examples(11, 4)
    model, packed = build(name), task()
    assert packed.packs(model)
    changed = list(data)
    changed[1] = Example([(i * 7 + 3) % 90 + 1 for i in data[1].input_ids], data[1].labels)

    def each(block):
        batch = packed.collate([block], model)
        with torch.no_grad():
            return packed.each_loss(model, batch, [block])[0]

    before, after = each(data), each(changed)
    assert before[1] != after[1]
    assert [before[i] for i in (0, 2, 3)] == [after[i] for i in (0, 2, 3)]


def test_a_model_that_leaks_is_padded_and_says_so():
    model, own = ARCHITECTURES["bloom"].build(), task()
    assert not own.packs(model)
    assert "padded" in own.notes[0]
    data = examples(5, 3)
    (loss,) = own.losses(model, own.collate([data], model))
    alone = sum(own.losses(model, own.collate([[e]], model))[0].item() for e in data)
    assert loss.item() == pytest.approx(alone, rel=1e-5)


def test_a_loss_that_is_not_finite_changes_nothing():
    model = build()
    adapter = attach(model, LoRA(r=3, target_modules="all-linear"), name="x")
    with torch.no_grad():
        next(iter(adapter.parameters())).fill_(math.nan)
    before = {k: p.detach().clone() for k, p in adapter.named_parameters()}
    trainee = Trainee(adapter, TrainSettings(max_steps=2), 2)
    with pytest.raises(NonFiniteError, match="step 1"):
        Engine(model, task()).step([trainee], [[examples(1, 2)]])
    assert trainee.step == 0
    for key, p in adapter.named_parameters():
        assert torch.equal(p, before[key]) or torch.isnan(before[key]).all()


def test_gradient_checkpointing_gives_the_same_bits():
    found = []
    for on in (False, True, "offload"):
        model = build()
        adapter = attach(model, LoRA(r=4, target_modules="all-linear"), name="x")
        engine = Engine(model, task(), gradient_checkpointing=on)
        trainee = Trainee(adapter, TrainSettings(max_steps=2, learning_rate=1e-2), 2)
        for seed in (1, 2):
            engine.step([trainee], [[examples(seed, 3)]])
        found.append({k: p.detach().clone() for k, p in adapter.named_parameters()})
        engine.close()
    for other in found[1:]:
        assert all(torch.equal(v, other[k]) for k, v in found[0].items())


@pytest.mark.parametrize(("how", "stays"), [(True, True), ("offload", False)])
def test_offload_keeps_a_copy_of_what_a_layer_was_given(how, stays):
    """The copy is the host's; on a CPU both lie in the same memory."""
    model, own = build(), task()
    adapter = attach(model, LoRA(r=4, target_modules="all-linear"), name="x")
    engine, given = Engine(model, own, gradient_checkpointing=how), []
    model.model.layers[1].register_forward_pre_hook(
        lambda module, inputs: given.append(weakref.ref(inputs[0]))
    )
    model.train()
    batch = own.collate([examples(1, 3)], model)
    given.clear()  # trying the model out ran it too
    with activate(model, adapter), engine.running():
        (loss,) = own.losses(model, batch)
        assert [one() is not None for one in given] == [stays]
        loss.backward()
    engine.close()


def test_checkpointing_lets_nothing_below_the_adapter_be_differentiated():
    model = build()
    adapter = attach(
        model, LoRA(r=4, target_modules="all-linear", layers_to_transform=[1]), name="x"
    )
    model.enable_input_require_grads()
    earlier = model._require_grads_hooks
    hooks = len(model.get_input_embeddings()._forward_hooks)
    engine = Engine(model, task(), gradient_checkpointing=True)
    assert model._require_grads_hooks is earlier, "somebody asked for these"
    assert len(model.get_input_embeddings()._forward_hooks) == hooks
    model.disable_input_require_grads()
    asked = []
    model.model.layers[0].register_forward_hook(lambda m, x, y: asked.append(y.requires_grad))
    trainee = Trainee(adapter, TrainSettings(max_steps=1), 1)
    engine.step([trainee], [[examples(1, 3)]])
    assert asked and not any(asked)


def test_checkpointing_where_there_is_none_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    attach(model, LoRA(r=2, target_modules=["0"]), name="x")
    with pytest.raises(TrainingError, match="no gradient checkpointing"):
        Engine(model, _Shapeless(), gradient_checkpointing=True)


class _Shapeless:
    kind = "shapeless"

    def shares(self, model):
        return False


def test_clipping_is_each_adapters_own():
    """A wild neighbour does not scale the gradients of a tame one."""
    tame_alone = trained(
        build(), ["a"], settings=TrainSettings(max_steps=3, max_grad_norm=0.01, learning_rate=1e-2)
    )
    both = trained(
        build(),
        ["a", "b"],
        settings=TrainSettings(max_steps=3, max_grad_norm=0.01, learning_rate=1e-2),
    )
    assert all(torch.equal(v, both["a"][k]) for k, v in tame_alone["a"].items())


def tried(
    names, *, dropout=0.0, dtype=torch.float32, together=True, steps=2, method=None, model=None
):
    """Tensors of adapters of mixed rank after some steps, each with its own rate and seed."""
    model = model() if model else build(dtype=dtype)
    handles, trainees = {}, {}
    for i, n in enumerate(names):
        own = LoRA(r=(2, 5, 12, 4)[i % 4], target_modules="all-linear", lora_dropout=dropout)
        own = method(n) or own if method else own
        handles[n] = attach(model, own, name=n, seed=ord(n))
        how = TrainSettings(learning_rate=1e-2 / (1 + i), seed=i, max_steps=steps)
        trainees[n] = Trainee(handles[n], how, steps)
    engine = Engine(model, task())
    for step in range(steps):
        work = {n: [examples(50 * ord(n) + step, 1 + i % 4)] for i, n in enumerate(names)}
        for group in [names] if together else [[n] for n in names]:
            engine.step([trainees[n] for n in group], [work[n] for n in group])
    return {n: {k: p.detach().clone() for k, p in handles[n].named_parameters()} for n in names}


def assert_equal_bits(found, wanted):
    for name, tensors in found.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, wanted[name][key]), f"{name}: {key}"
        assert any(t.abs().sum() > 0 for k, t in tensors.items() if k.endswith(".B"))


def passes(monkeypatch):
    """How many blocks each pass has, from now on."""
    calls, original = [], CausalLM.losses
    monkeypatch.setattr(
        CausalLM, "losses", lambda self, m, b: calls.append(len(b.labels)) or original(self, m, b)
    )
    return calls


@pytest.mark.parametrize("number", [2, 3, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_is_drawn_by_adapter_and_row(monkeypatch, number, dropout):
    calls = passes(monkeypatch)
    together = tried("abcdefgh"[:number], dropout=dropout)
    assert calls == [number, number]
    assert_equal_bits(together, tried("abcdefgh"[:number], dropout=dropout, together=False))


@pytest.mark.slow
def test_dropout_over_a_base_in_bfloat16():
    how = {"dropout": 0.3, "dtype": torch.bfloat16}
    assert_equal_bits(tried("abc", **how), tried("abc", together=False, **how))


def wide(name, dtype, **settings):
    """Layers with 1,003 features inside: those of five adapters are more than torch gives to
    one thread, and no multiple of what its vector loops take at once times threads.
    """
    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 1003,
        "num_hidden_layers": 2,  # the first one's activations see all rows, the last one's some
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    config = getattr(transformers, f"{name}Config")(
        **{**sizes, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **settings}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)


STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
WIDE = {
    "a gated layer": ("Llama", {}),
    "one with GELU by its tanh": ("Gemma", {"head_dim": 32}),
    "an activation by itself": ("Phi", {"hidden_act": "gelu_pytorch_tanh", **STILL}),
}


@pytest.mark.parametrize("number", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", WIDE)
def test_the_number_of_threads_does_not_let_neighbours_matter(monkeypatch, kind, dtype, number):
    name, settings = WIDE[kind]
    how = {"model": lambda: wide(name, dtype, **settings), "steps": 3}
    calls = passes(monkeypatch)
    with threads(number):
        together = tried("abcde", **how)
        assert calls == [5] * 3
        assert_equal_bits(together, tried("abcde", **how, together=False))


def test_a_base_in_bfloat16_of_real_width():
    """A processor that multiplies bfloat16 takes other kernels for other widths."""
    sizes = {"hidden_size": 256, "intermediate_size": 690, "num_attention_heads": 4}
    how = {
        "model": lambda: wide("Llama", torch.bfloat16, initializer_range=0.02, **sizes),
        "dropout": 0.2,
    }
    assert_equal_bits(tried("abc", **how), tried("abc", together=False, **how))


def test_an_adapter_that_cannot_share_a_pass_goes_alone(monkeypatch):
    def method(name):
        return DoRA(r=3, target_modules="all-linear") if name == "b" else None

    calls = passes(monkeypatch)
    together = tried("abc", method=method)
    assert calls == [2, 1] * 2
    assert_equal_bits(together, tried("abc", method=method, together=False))


def test_how_a_step_is_cut_into_passes_changes_no_bit(monkeypatch):
    whole = tried("abcd", dropout=0.2)
    calls = passes(monkeypatch)
    monkeypatch.setitem(passes_of.__globals__, "MOST_TOKENS", 40)
    assert_equal_bits(tried("abcd", dropout=0.2), whole)
    assert len(calls) > 2
    assert sum(calls) == 8


def test_dropout_of_a_head_that_the_model_has_not_does_not_keep_adapters_apart():
    shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"intermediate_size": 32}

    def made(**more):
        config = transformers.GPTNeoXConfig(**shape, **more)
        return transformers.GPTNeoXForCausalLM(config)

    assert made().config.classifier_dropout > 0
    assert not draws(made())
    assert draws(made(attention_dropout=0.1))
    assert draws(made(hidden_dropout=0.1))
    with_the_head = transformers.GPTNeoXForTokenClassification(transformers.GPTNeoXConfig(**shape))
    assert draws(with_the_head)
