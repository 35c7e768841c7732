"""Rows that nobody reads leave the last layer early: the same losses and gradients, bit for bit
beside others; and texts that are packed for a classifier.
"""

import pytest
import torch
from torch.nn import functional as F

from architectures import ARCHITECTURES, ENCODERS
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.config import TrainSettings
from lorica.data.encode import Example
from lorica.errors import ConfigError
from lorica.methods.lora import LoRA
from lorica.methods.loreft import LoReFT
from lorica.ops.attention import short_attention
from lorica.tasks import CausalLM, TextClassification
from lorica.tasks.last_layer import keep_rows
from lorica.tasks.layout import lay_out
from lorica.train.engine import Engine, Trainee
from train.test_frozen import still
from train.words import WordTokenizer, examples, fast_tokenizer

DECODERS = ["llama", "gemma", "phi", "gpt_neox", "opt", "qwen3_moe"]
PACKED = ["bert", "roberta", "electra", "distilbert", "modernbert"]


def classifier(packing="auto"):
    return TextClassification(fast_tokenizer(pad_token="<pad>"), ("a", "b", "c"), packing=packing)


def texts(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 40, (count,), generator=generator).tolist()
    return [
        Example(torch.randint(5, 90, (n,), generator=generator).tolist(), [i % 3], i)
        for i, n in enumerate(lengths)
    ]


def adapted(model, name="x", r=3, seed=0):
    method = LoRA(r=r, target_modules="all-linear", init_lora_weights="random")
    return attach(model, method, name=name, seed=seed)


def gradients(model, adapter, task, block):
    """Loss and gradients by the engine's own way."""
    batch_task = Engine(model, task)
    with activate(model, None):
        batch = task.collate([block], model)
    with batch_task.running(), activate(model, adapter):
        (loss,) = task.losses(model, batch)
        loss.backward()
    found = {k: p.grad.clone() for k, p in adapter.named_parameters() if p.grad is not None}
    for p in adapter.parameters():
        p.grad = None
    return loss.item(), found, batch


def same(one, other):
    loss, found, _ = one
    wanted, gradient, _ = other
    assert loss == pytest.approx(wanted, rel=1e-6)
    assert found.keys() == gradient.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, gradient[key], rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", DECODERS)
def test_losses_and_gradients_are_those_of_all_rows(name):
    model = ARCHITECTURES[name].build()
    adapter = adapted(model)
    block = [Example(e.input_ids, [-100] * (len(e) - 2) + e.input_ids[-2:]) for e in examples(3, 9)]
    own, whole = CausalLM.of(WordTokenizer()), CausalLM.of(WordTokenizer())
    with activate(model, None):
        place = own.place(model)
        assert place is not None and place.projection
        whole.assume(model, packs=True, plain=whole._head(model) is not None)
    less, all_rows = (gradients(model, adapter, task, block) for task in (own, whole))
    assert less[2].kept is not None and all_rows[2].kept is None
    assert len(less[2].kept.rows) < less[2].kept.total
    same(less, all_rows)


def test_the_rest_of_the_last_layer_sees_fewer_rows():
    model, own = ARCHITECTURES["llama"].build(), CausalLM.of(WordTokenizer())
    block = [Example(e.input_ids, [-100] * (len(e) - 1) + e.input_ids[-1:]) for e in examples(3, 9)]
    batch, rows = own.collate([block], model), {}
    for name, module in model.named_modules():
        if name.endswith(("v_proj", "o_proj", "up_proj", "model.norm")):
            hook = lambda _m, _a, out, name=name: rows.update({name: out.shape[1]})  # noqa: E731
            module.register_forward_hook(hook)
    own.losses(model, batch)
    total = batch.inputs["input_ids"].shape[1]
    last = {"self_attn.o_proj", "mlp.up_proj"}
    fewer = {f"model.layers.1.{name}" for name in last} | {"model.norm"}
    assert {name for name, count in rows.items() if count == 32} == fewer
    assert {count for name, count in rows.items() if name not in fewer} == {total}


def test_what_is_kept_of_a_block_depends_on_it_alone():
    lengths = [[40, 30], [3, 4], [90]]
    wanted = [torch.arange(50, 60), torch.arange(1, 6), torch.arange(0, 89)]
    documents, _, _ = lay_out(lengths)
    together = keep_rows(documents, wanted)
    assert together is not None and together.total == 96 + 32 + 96
    start = before = 0
    for block, own, (a, b), chosen in zip(
        documents.blocks, wanted, together.ranges, together.chosen, strict=True
    ):
        alone = keep_rows(lay_out([list(block.lengths)])[0], [own])
        rows = torch.arange(block.size) if alone is None else alone.rows
        assert torch.equal(together.rows[a:b] - before, rows) and a == start
        assert torch.equal(together.rows[chosen] - before, own)
        start, before = b, before + block.size
    assert keep_rows(*_all_labelled()) is None


def _all_labelled():
    documents, _, _ = lay_out([[40], [20]])
    return documents, [torch.arange(39), torch.arange(19)]


def test_an_adapter_on_whole_layers_has_all_rows_while_it_acts():
    model, own = ARCHITECTURES["llama"].build(), CausalLM.of(WordTokenizer())
    attach(model, LoReFT(r=2, layers_to_transform=[1]), name="x")
    block = [Example(e.input_ids, [-100] * (len(e) - 1) + e.input_ids[-1:]) for e in examples(3, 9)]
    rows = []
    model.model.norm.register_forward_hook(lambda _m, _a, out: rows.append(out.shape[1]))
    losses = []
    for names in (None, "x"):
        with activate(model, names):
            batch = own.collate([block], model)
            rows.clear()
            losses.append(own.losses(model, batch)[0].item())
            total = batch.inputs["input_ids"].shape[1]
            assert rows[-1:] == [32 if names is None else total]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5), "LoReFT begins without effect"


@pytest.mark.parametrize("name", ["gpt2"])
def test_a_model_without_such_a_place_runs_whole(name):
    own = CausalLM.of(WordTokenizer())
    model = ARCHITECTURES[name].build()
    assert own.packs(model) and own.place(model) is None


# --- classifiers ----------------------------------------------------------------------------------


def test_which_encoders_pack():
    """The list is used nowhere; it tells when a change of transformers costs speed."""
    packs = {name for name in ENCODERS if not classifier().pads(ARCHITECTURES[name].build())}
    assert packs >= set(PACKED)
    own = classifier()
    assert own.pads(ARCHITECTURES["albert"].build())
    assert own.notes == [
        "batches are of similar lengths, padded, not packed: it has no list of layers that each "
        "run once"
    ]
    with pytest.raises(ConfigError, match="this model cannot: it does not take another attention"):
        classifier(packing=True).pads(ARCHITECTURES["deberta-v2"].build())


@pytest.mark.parametrize("count", [1, 13, 40])
@pytest.mark.parametrize("name", PACKED)
def test_packed_texts_are_classified_as_padded_ones(name, count):
    model = still(ARCHITECTURES[name].build())
    adapter, block = adapted(model), texts(count)
    packed, padded = (gradients(model, adapter, classifier(p), block) for p in (True, False))
    assert packed[2].kept is not None and packed[2].inputs["input_ids"].shape[0] == 1
    assert padded[2].inputs["input_ids"].shape[0] == count
    same(packed, padded)


def test_packed_predictions_are_those_of_padded_texts():
    model = ARCHITECTURES["bert"].build()
    records = [{"text": "w7 w8 w9 " * n, "label": "abc"[n % 3]} for n in range(1, 14)]
    made = [classifier(p).predict(model, records, batch_size=5) for p in (True, False)]
    for one, other in zip(*made, strict=True):
        assert one.output == other.output
        assert one.nll == pytest.approx(other.nll, rel=1e-5)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_classifiers_train_beside_others_to_the_same_bits(checkpoints):
    def after(names):
        model, own = still(ARCHITECTURES["bert"].build()), classifier()
        handles = {n: adapted(model, n, r=3 + i, seed=i) for i, n in enumerate("ab")}
        engine = Engine(model, own, gradient_checkpointing=checkpoints)
        trainees = [Trainee(handles[n], TrainSettings(max_steps=2), 2) for n in names]
        blocks = {"a": texts(7, 1), "b": texts(40, 2)}
        for _ in range(2):
            engine.step(trainees, [[blocks[n]] for n in names])
        assert "forward" not in own._end(model).layer.__dict__
        return {n: [p.detach().clone() for p in handles[n].parameters()] for n in names}

    together = after("ab")
    for name in "ab":
        for one, other in zip(together[name], after(name)[name], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("masked", [False, True])
def test_short_attention_is_attention(masked):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(3, 2, 7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    )
    real = torch.arange(7) < torch.tensor([7, 3, 1])[:, None] if masked else None
    real = None if real is None else real[:, None, None]
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=real, scale=0.3)
    torch.testing.assert_close(short_attention(q, k, v, real, 0.3), wanted)
    assert torch.autograd.gradcheck(lambda *t: short_attention(*t, real, 0.3), (q, k, v))
