"""Which heads take the lean loss, and that the others give the same numbers on their own path."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.methods import LoRA, PrefixTuning, PromptTuning, Selective
from lorica.tasks import CausalLM, Seq2Seq
from lorica.tasks.head import head_losses, is_plain
from lorica.tasks.probe import plain_decoder_head
from train.words import WordTokenizer, examples, fast_tokenizer

HEAD = Selective(parameters="head")


def head(*, bias=False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(12, 31, bias=bias).requires_grad_(False)


def test_a_frozen_linear_layer_is_plain():
    assert is_plain(head()) and is_plain(head(bias=True))
    assert not is_plain(head().requires_grad_(True))
    assert not is_plain(nn.Sequential(head()))


def test_a_head_that_somebody_watches_is_called():
    called = []
    watched = head()
    watched.register_forward_hook(lambda *_: called.append(1))
    own = head()
    own.forward = lambda x: F.linear(x, own.weight) * 2
    hidden, targets = torch.randn(5, 12), torch.arange(5)
    for module, factor in ((watched, 1), (own, 2)):
        assert not is_plain(module)
        wanted = F.cross_entropy(factor * hidden @ module.weight.t(), targets, reduction="none")
        torch.testing.assert_close(head_losses(module, hidden, targets), wanted)
    assert called == [1]


def test_under_autocast_the_head_is_cast():
    module, hidden = head(), torch.randn(5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head_losses(module, hidden, torch.arange(5))
        wanted = F.cross_entropy(module(hidden).float(), torch.arange(5), reduction="none")
    assert torch.equal(found, wanted)


def gradients(model, adapter, task, block):
    """Loss and gradients of an adapter's tensors over a batch."""
    with activate(model, adapter):
        (loss,) = task.losses(model, task.collate([block], model))
    for parameter in adapter.parameters():
        parameter.grad = None
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in adapter.parameters())]


def adapted(model, targets):
    adapter = attach(model, LoRA(r=3, target_modules=targets), name="a")
    for number, (name, parameter) in enumerate(adapter.named_parameters()):
        if name.endswith(".B"):
            generator = torch.Generator().manual_seed(number)
            parameter.data = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data.double()
    return adapter


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "phi", "bart", "t5-untied"])
def test_lean_and_plain_agree_in_loss_and_gradients(name, monkeypatch):
    """A hook on the head makes the task take the plain path."""
    if name == "t5-untied":
        model = ARCHITECTURES["t5"].build()
        model.config.tie_word_embeddings = False
        model.config.scale_decoder_outputs = False
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)
    else:
        model = ARCHITECTURES[name].build()
    if name in ("bart", "t5-untied"):
        task = Seq2Seq(fast_tokenizer("<s> $A </s>", eos_token="</s>", pad_token="<pad>"))
        records = [{"source": "w7 w8 w9", "target": "w10"}, {"source": "w1", "target": "w2 w3 w4"}]
        block = task.encode(records).examples
        assert plain_decoder_head(model) is model.get_output_embeddings()
    else:
        task, block = CausalLM.of(WordTokenizer()), examples(3, 4)
    adapter = adapted(model.double(), "all-linear")
    output = model.get_output_embeddings()
    assert is_plain(output)
    lean = gradients(model, adapter, task, block)
    output.register_forward_hook(lambda *_: None)
    plain = gradients(model, adapter, task, block)
    for one, other in zip(lean, plain, strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", [PromptTuning, PrefixTuning], ids=lambda m: m.kind)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_virtual_tokens_act_before_a_lean_head_too(name, method):
    """Encoder and decoder are then called apart from the model around them."""
    model = ARCHITECTURES[name].build()
    model.config.scale_decoder_outputs = False  # of T5: then its head is plain
    adapter = attach(model, method(num_virtual_tokens=3), name="a")
    task = Seq2Seq(fast_tokenizer("<s> $A </s>", eos_token="</s>", pad_token="<pad>"))
    records = [{"source": "w7 w8 w9", "target": "w10"}, {"source": "w1", "target": "w2 w3 w4"}]
    block = task.encode(records).examples
    lean = gradients(model, adapter, task, block)
    task.assume(model, plain=False)
    plain = gradients(model, adapter, task, block)
    for one, other in zip(lean, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_tied_t5_scales_before_its_head_and_goes_whole():
    assert plain_decoder_head(ARCHITECTURES["t5"].build()) is None


@pytest.mark.parametrize(
    "method", [LoRA(r=2, target_modules=["lm_head"]), HEAD], ids=["lora", "head"]
)
def test_an_adapted_head_trains(method):
    model = ARCHITECTURES["llama"].build()
    adapter = attach(model, method, name="a")
    task, block = CausalLM.of(WordTokenizer()), examples(3, 4)
    assert not is_plain(model.get_output_embeddings())
    _, *found = gradients(model, adapter, task, block)
    assert any(g.abs().max() > 0 for g in found)
