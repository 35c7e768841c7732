"""Which parts of a model are recognised, and that a step with them is the step without."""

import pytest
import torch
import transformers
from torch import nn
from transformers.activations import ACT2FN

import lorica
from architectures import ARCHITECTURES
from exact.measured import threads
from lorica.attach.attach import attach, detach
from lorica.base.batch import beside, blocks
from lorica.base.lean import Lean, lean_parts
from lorica.config import TrainSettings
from lorica.methods import Bottleneck, LoRA, Selective
from lorica.tasks import CausalLM
from lorica.train.engine import Engine, Trainee
from train.words import WordTokenizer, examples

FOUND = {  # norms and feed-forward layers, functions
    "llama": (7, 1),
    "mistral": (7, 1),
    "qwen2": (7, 1),
    "qwen3": (11, 1),
    "gemma": (7, 1),
    "gemma2": (11, 1),
    "phi3": (5, 1),
    "gpt_neox": (0, 1),
    "gpt2": (0, 0),
    "opt": (0, 0),
    "mixtral": (5, 1),
    "t5": (12, 0),
    "bert": (0, 0),
}

T, K = 64, 32
"""Rows of the second step: its 53 tokens, and the 27 with a label, which alone go on behind the
attention of the last layer; both filled up to a multiple of 32.
"""


def frozen(name):
    return ARCHITECTURES[name].build().requires_grad_(False)


@pytest.mark.parametrize("name", FOUND)
def test_what_is_recognised(name):
    found = lean_parts(frozen(name))
    assert (len(found.forwards), len(found.functions)) == FOUND[name]
    assert not found.notes


def _step(name, lean, dtype=torch.float32):
    """Losses and tensors after two steps, and the bytes that the second kept for its backward."""
    model = frozen(name).to(dtype)
    adapter = attach(model, LoRA(r=4, target_modules="all-linear"), name="a")
    engine = Engine(model, CausalLM.of(WordTokenizer()))
    if not lean:
        engine.lean = Lean()
    trainee, kept = Trainee(adapter, TrainSettings(max_steps=2, learning_rate=1e-2), 2), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    losses = [engine.step([trainee], [[examples(0, 6)]])[0].loss]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        losses.append(engine.step([trainee], [[examples(1, 6)]])[0].loss)
    return losses, dict(adapter.named_parameters()), sum(kept.values())


@pytest.mark.parametrize("name", [n for n, found in FOUND.items() if sum(found) and n != "t5"])
def test_a_step_is_the_step_of_plain_autograd(name):
    """float32: losses, and every tensor after two steps of AdamW, whose first one is the sign."""
    ours, tensors, _ = _step(name, lean=True)
    plain, others, _ = _step(name, lean=False)
    assert ours == pytest.approx(plain, rel=1e-5)
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[key], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma", "mistral", "qwen3"])
def test_a_step_keeps_no_activation_of_the_gate(name):
    """float32: 53 features of all rows in the first of two layers, of those that go on in the other
    one, and nothing else is different.
    """
    _, _, ours = _step(name, lean=True)
    _, _, plain = _step(name, lean=False)
    assert plain - ours == (T + K) * 53 * 4


def test_bfloat16_keeps_no_wide_copies():
    """Norms keep their input as it is, where plain autograd keeps a float32 copy of it; but for the
    first one, which nothing trains below. Of the other four the last two see the rows that go on.
    """
    _, _, ours = _step("llama", lean=True, dtype=torch.bfloat16)
    _, _, plain = _step("llama", lean=False, dtype=torch.bfloat16)
    norms, gates = 2 * (T + K) * 36 * (4 - 2), (T + K) * 53 * 2
    assert plain - ours == norms + gates


def test_gradients_are_those_of_plain_autograd_and_the_model_is_as_it_was():
    model = frozen("llama")
    attach(model, LoRA(r=4, target_modules="all-linear"), name="a")
    before = [dict(m.__dict__) for m in model.modules()]
    space = vars(__import__(type(model).__module__, fromlist=["x"]))
    own = space["apply_rotary_pos_emb"]
    ids = torch.arange(3, 30)[None]
    grads = []
    for lean in (Lean(), lean_parts(model)):
        with lorica.activate(model, "a"), lean.running():
            model(ids, labels=ids).loss.backward()
        adapter = lorica.adapters(model)["a"]
        grads.append([p.grad.clone() for p in adapter.parameters()])
        for p in adapter.parameters():
            p.grad = None
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    assert space["apply_rotary_pos_emb"] is own
    for module, kept in zip(model.modules(), before, strict=True):
        assert set(module.__dict__) == set(kept) and "forward" not in module.__dict__


def test_all_is_put_back_where_a_pass_fails():
    model = frozen("llama")
    lean = lean_parts(model)
    own = lean.functions[0][0]["apply_rotary_pos_emb"]
    with pytest.raises(RuntimeError, match="in the midst"), lean.running():
        assert lean.functions[0][0]["apply_rotary_pos_emb"] is not own
        raise RuntimeError("in the midst")
    assert lean.functions[0][0]["apply_rotary_pos_emb"] is own
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_what_adapters_sit_on_what_trains_and_what_others_replaced_is_left_alone():
    model = frozen("llama")
    norms = attach(model, Selective(parameters="norm"), name="norms")
    assert not any("Norm" in type(m).__name__ for m, _ in lean_parts(model).forwards)
    detach(model, norms)
    beside = attach(model, Bottleneck(layout="parallel"), name="beside")
    assert not any("MLP" in type(m).__name__ for m, _ in lean_parts(model).forwards)
    detach(model, beside)
    model.model.norm.weight.requires_grad_(True)
    layer = model.model.layers[0]
    layer.mlp.forward = layer.mlp.forward
    left = [m for m, _ in lean_parts(model).forwards]
    assert model.model.norm not in left and layer.mlp not in left and len(left) == 5


class OddRMSNorm(nn.Module):
    """Has the name and the form, and clips."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8), requires_grad=False), 1e-6

    def forward(self, x):
        return self.weight * (x / x.norm(dim=-1, keepdim=True)).clamp(max=0.5)


def test_a_part_that_computes_something_else_is_left_alone_and_told():
    model = nn.Sequential(OddRMSNorm(), nn.Linear(8, 8))
    found = lean_parts(model)
    assert not found.forwards
    assert found.notes == [
        "OddRMSNorm computes otherwise than others of its form, so it trains as it is"
    ]


def test_angles_of_another_dtype_are_turned_as_the_model_does():
    """OLMo 2 makes them in float32 and turns in float32, whatever it computes in."""
    config = transformers.Olmo2Config(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=53,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = transformers.Olmo2ForCausalLM(config).bfloat16().requires_grad_(False)
    adapter = attach(model, LoRA(r=4, target_modules="all-linear"), name="a")
    lean, ids = lean_parts(model), torch.arange(3, 30)[None]
    assert lean.functions
    with lorica.activate(model, adapter):
        wanted = model(ids).logits
        with lean.running():
            found = model(ids).logits
    assert found.dtype == torch.bfloat16
    assert (found - wanted).norm() <= 0.02 * wanted.norm()


@pytest.mark.parametrize(
    ("part", "apart"),
    [
        (nn.GELU("tanh"), True),
        (nn.SiLU(), True),
        (ACT2FN["gelu"], True),
        (nn.Softmax(-1), False),
        (nn.Flatten(), False),
        (nn.SiLU(inplace=True), False),
        (nn.ReLU(), False),  # exact, so it has no need
        (nn.Dropout(0.0), False),
    ],
    ids=str,
)
def test_activations_are_given_the_rows_of_each_adapter_by_themselves(monkeypatch, part, apart):
    seen, own = [], type(part).forward
    monkeypatch.setattr(type(part), "forward", lambda m, x: seen.append(len(x)) or own(m, x))
    model, x = nn.Sequential(part), torch.randn(1, 96, 8)
    lean = lean_parts(model)
    assert bool(lean.activations) is apart
    with threads(2), lean.running(), beside(model, [(0, 32), (32, 96)]):
        seen.clear()
        made = model(x.clone())
        assert seen == ([32, 64] if apart else [1])
        seen.clear()
        model(x[:, :64].clone())  # other rows than the pass has
        assert seen == [1]
    torch.testing.assert_close(made, own(part, x.clone()))


def test_one_thread_needs_no_cuts_where_nothing_is_left_over():
    model = nn.Sequential(nn.SiLU())
    with beside(model, [(0, 32), (32, 96)]):
        for number, width, sizes in ((1, 8, ()), (1, 7, (32, 64)), (2, 8, (32, 64))):
            with threads(number):
                assert blocks(model, torch.zeros(1, 96, width)) == sizes
    assert blocks(model, torch.zeros(1, 96, 7)) == ()


def test_hooks_still_run():
    model, seen = frozen("llama"), []
    model.model.norm.register_forward_hook(lambda *_: seen.append("norm"))
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: seen.append("mlp"))
    lean = lean_parts(model)
    assert seen == []  # trying the copies is nobody's business
    with lean.running():
        model(torch.arange(3, 9)[None])
    assert sorted(seen) == ["mlp", "norm"]
