"""Virtual tokens and prefixes: that they act as if they were tokens, on the rows they are for, and
leave nothing behind.
"""

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.cache_utils import DynamicCache

import lorica
from architectures import ARCHITECTURES, inputs_of, said
from lorica.attach.activate import activate
from lorica.attach.attach import attach, detach
from lorica.errors import ActivationError, ConfigError, LoricaError, MergeError, TargetError
from lorica.methods import LoRA, PrefixTuning, PromptTuning, PTuning
from lorica.tasks.probe import packing_fault
from lorica.tasks.task import num_positions

DECODERS = ("llama", "gpt2", "opt", "bloom", "gemma2", "qwen3_moe")
READERS = ("bert", "roberta", "modernbert", "t5", "bart")
WITH_PREFIX = (*DECODERS, "bert", "roberta", "t5", "bart")
EVEN = {("prefix", name) for name in ("bert", "roberta", "bart")}
"""Where all rows need as many virtual tokens."""
KINDS: dict[str, Any] = {"prompt": PromptTuning, "prefix": PrefixTuning}


def of(kind: str, count: int) -> Any:
    return KINDS[kind](num_virtual_tokens=count)


def cases(decoders: tuple[str, ...] = DECODERS, others: tuple[str, ...] = READERS) -> Any:
    found = [("prompt", name) for name in (*decoders, *others)]
    found += [("prefix", n) for n in (*decoders, *others) if n in WITH_PREFIX]
    return pytest.mark.parametrize(("kind", "name"), found)


def row(inputs: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {key: value[index : index + 1] for key, value in inputs.items()}


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@cases()
def test_the_base_is_as_it_was(kind, name):
    model = ARCHITECTURES[name].build()
    inputs = inputs_of(name, model)
    before, keys = said(name, model, **inputs), list(model.state_dict())
    types = {path: type(module) for path, module in model.named_modules()}
    adapter = attach(model, of(kind, 4), name="a")
    assert list(model.state_dict()) == keys
    assert list(adapter.parameters())
    assert not [p for p in model.parameters() if p.requires_grad]
    with activate(model, "a"):
        adapted = said(name, model, **inputs)
    assert adapted.shape == before.shape and (adapted - before).abs().max() > 1e-4
    with activate(model, None):
        assert torch.equal(said(name, model, **inputs), before)
    detach(model, "a")
    assert {path: type(module) for path, module in model.named_modules()} == types
    assert torch.equal(said(name, model, **inputs), before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_embeddings_of_tokens_act_as_these_tokens(name):
    model = ARCHITECTURES[name].build()
    inputs = inputs_of(name, model)
    ids = torch.tensor([11, 5, 23])
    front = {"input_ids": ids, "attention_mask": torch.ones(3), "token_type_ids": torch.zeros(3)}
    longer = {
        key: torch.cat([front[key].expand(3, 3).to(value.dtype), value], 1)
        if key in front
        else value
        for key, value in inputs.items()
    }
    expected = said(name, model, **longer)
    expected = expected[:, 3:] if name in ("llama", "gpt2") else expected
    adapter = attach(model, PromptTuning(num_virtual_tokens=3), name="a")
    table = model.get_input_embeddings()
    with torch.no_grad():
        next(iter(adapter.parameters())).copy_(table(ids))
    with activate(model, "a"):
        close(said(name, model, **inputs), expected)


@cases()
def test_rows_with_prompts_of_their_own_equal_each_alone(kind, name):
    """Different lengths where that is possible, none, and an adapter on layers beside."""
    model = ARCHITECTURES[name].build()
    even = (kind, name) in EVEN
    attach(model, of(kind, 5), name="long", seed=1)
    attach(model, of(kind, 5 if even else 2), name="short", seed=2)
    lora = attach(model, LoRA(r=2, target_modules="attention"), name="lora")
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    rows: list[Any] = ["long", "short", {"lora": 0.5, "short": 1.0}]
    if not even:
        rows += [None, "lora"]
    inputs = inputs_of(name, model, len(rows))
    inputs["attention_mask"][0, -2:] = 0
    inputs["attention_mask"][2, -1:] = 0
    alone = []
    for index, entry in enumerate(rows):
        with activate(model, entry):
            alone.append(said(name, model, **row(inputs, index)))
    with activate(model, rows):
        together = said(name, model, **inputs)
    for index, expected in enumerate(alone):
        real = int(inputs["attention_mask"][index].sum()) if name in DECODERS else None
        close(together[index][:real], expected[0][:real])


@cases(others=("t5", "bart"))
def test_generation_with_padding_beams_and_rows(kind, name):
    """Cached equals uncached, a row with padding equals it alone, and beams keep their prompt."""
    model = ARCHITECTURES[name].build()
    attach(model, of(kind, 5), name="long", seed=1)
    even = (kind, name) in EVEN
    attach(model, of(kind, 5 if even else 2), name="short", seed=2)
    rows: list[Any] = ["long", "short" if even else None, "short"]
    inputs = {k: v for k, v in inputs_of(name, model).items() if not k.startswith("decoder")}
    left = name in DECODERS
    cut = slice(0, 3) if left else slice(4, 7)
    inputs["attention_mask"][1, cut] = 0
    how: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 5}
    for more in ({}, {"num_beams": 2}):
        with activate(model, rows):
            together = model.generate(**inputs, **how, **more)
            slow = model.generate(**inputs, **how, **more, use_cache=False)
        assert torch.equal(together, slow)
        for index, entry in enumerate(rows):
            own = {key: value[index : index + 1] for key, value in inputs.items()}
            real = own["attention_mask"][0].bool()
            own = {key: value[:, real] for key, value in own.items()}
            with activate(model, entry):
                alone = model.generate(**own, **how, **more)
            start, begin = (7, own["input_ids"].shape[1]) if left else (0, 0)
            new = alone[0, begin:]
            assert torch.equal(together[index, start:][: len(new)], new)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_every_backend_of_attention_says_the_same(kind, implementation, name):
    model = ARCHITECTURES[name].build()
    attach(model, of(kind, 4), name="a")
    inputs = inputs_of(name, model)
    inputs["attention_mask"][1, 5:] = 0
    with activate(model, "a"):
        expected = said(name, model, **inputs)
        model.set_attn_implementation(implementation)
        actual = said(name, model, **inputs)
        alone = said(name, model, **{k: v[1:2, :5] for k, v in inputs.items()})
    close(actual, expected)
    close(actual[1:2] if name == "bert" else actual[1:2, :5], alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "qwen3", "opt"])
def test_packed_documents_have_it_each(kind, name):
    """The probe compares packed with separate while the virtual tokens act."""
    model = ARCHITECTURES[name].build()
    plain = packing_fault(model)
    attach(model, of(kind, 5), name="a")
    with activate(model, "a"):
        assert packing_fault(model) == plain is None


@pytest.mark.parametrize("count", [3, 9])
def test_packed_behind_a_prefix_longer_than_the_window(count):
    """A sliding window of 4: what is out of it is forgotten, packed or not."""
    config = ARCHITECTURES["mistral"].build().config
    config.sliding_window = 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.MistralForCausalLM(config).eval()
    attach(model, of("prefix", count), name="a")
    inputs = inputs_of("llama", model, 2, 9)
    how = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 5}
    with activate(model, "a"):
        assert packing_fault(model) is None
        slow = model.generate(**inputs, **how, use_cache=False)
        assert torch.equal(model.generate(**inputs, **how), slow)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_that_classifies_reads_each_text_at_its_own_end(kind):
    config = hf.LlamaConfig(
        vocab_size=97,
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=53,
        num_labels=3,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.LlamaForSequenceClassification(config).eval()
    attach(model, of(kind, 4), name="a")
    attach(model, of(kind, 2), name="b")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, 4:], mask[0, 4:] = 0, 0
    rows = ["a", "b", None]
    with torch.no_grad(), activate(model, rows):
        together = model(input_ids=ids, attention_mask=mask).logits
    for index, entry in enumerate(rows):
        real = int(mask[index].sum())
        with torch.no_grad(), activate(model, entry):
            alone = model(input_ids=ids[index : index + 1, :real]).logits
        close(together[index : index + 1], alone)


def test_a_stack_without_a_head_is_served_too(tmp_path):
    model = ARCHITECTURES["llama"].build().model
    adapter = attach(model, of("prompt", 4), name="a")
    ids = torch.arange(3, 13).view(2, 5)
    with torch.no_grad(), activate(model, "a"):
        expected = model(ids, output_hidden_states=True)
    assert expected.last_hidden_state.shape == (2, 5, 36)
    assert all(h.shape == (2, 5, 36) for h in expected.hidden_states)
    lorica.save_adapter(adapter, tmp_path / "a")
    again = ARCHITECTURES["llama"].build().model
    lorica.load_adapter(again, tmp_path / "a", name="b")
    with torch.no_grad(), activate(again, "b"):
        assert torch.equal(again(ids).last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes_of_the_base(kind, dtype):
    model = ARCHITECTURES["llama"].build().to(dtype)
    adapter = attach(model, of(kind, 4), name="a")
    inputs = inputs_of("llama", model)
    bits = [p.clone() for p in model.parameters()]
    with activate(model, "a"):
        out = model(**inputs).logits
        out.float().square().sum().backward()
    assert out.dtype == dtype
    for parameter in adapter.parameters():
        assert parameter.dtype == torch.float32 and parameter.grad is not None
        assert parameter.grad.isfinite().all() and parameter.grad.any()
    for parameter, before in zip(model.parameters(), bits, strict=True):
        assert parameter.grad is None and torch.equal(parameter, before)


def test_gradients_of_packed_are_those_of_padded():
    found = []
    for packing in (False, True):
        model = ARCHITECTURES["llama"].build()
        adapters = [attach(model, of(kind, 3), name=kind) for kind in KINDS]
        generator = torch.Generator().manual_seed(0)
        ids = [torch.randint(3, 90, (n,), generator=generator) for n in (5, 9, 3)]
        for adapter in adapters:
            with activate(model, adapter):
                total = _loss(model, ids, packing)
                total.backward()
        found.append([p.grad for a in adapters for p in a.parameters()])
    for one, other in zip(*found, strict=True):
        close(one, other)


def _loss(model: Any, ids: list[Tensor], packing: bool) -> Tensor:
    from lorica.tasks.documents import NAME
    from lorica.tasks.layout import lay_out
    from lorica.tasks.probe import attention

    if not packing:
        return sum((model(i[None]).logits.square().sum() for i in ids), torch.zeros(()))
    documents, _, positions = lay_out([[len(i) for i in ids]])
    flat = torch.zeros(len(positions), dtype=torch.long)
    real = sum(map(len, ids))
    flat[:real] = torch.cat(ids)
    with attention(model, NAME):
        out = model(flat[None], position_ids=positions[None], documents=documents, use_cache=False)
    return out.logits[0, :real].square().sum()


def test_a_copy_has_prompts_of_its_own():
    model = ARCHITECTURES["llama"].build()
    adapter = attach(model, of("prompt", 3), name="a")
    inputs = inputs_of("llama", model)
    with activate(model, "a"):
        expected = said("llama", model, **inputs)
        twin = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(adapter.parameters())).zero_()
    with activate(twin, "a"):
        assert torch.equal(said("llama", twin, **inputs), expected)


def test_the_start_is_what_was_asked_for():
    class Words:
        def encode(self, text: str) -> list[int]:
            return [ord(letter) - ord("a") for letter in text]

    model = ARCHITECTURES["llama"].build()
    table = model.get_input_embeddings().weight
    settings = {"prompt_tuning_init": "text", "prompt_tuning_init_text": "cab"}
    method = PromptTuning(num_virtual_tokens=5, **settings).told(Words().encode)
    begun = attach(model, method, name="text")
    (prompt,) = begun.parameters()
    assert torch.equal(prompt, table[[2, 0, 1, 2, 0]])
    (drawn,) = attach(model, PromptTuning(num_virtual_tokens=5), name="drawn").parameters()
    assert all((row == table).all(1).any() for row in drawn)
    noise = PromptTuning(num_virtual_tokens=400, prompt_tuning_init="random")
    (random,) = attach(model, noise, name="random").parameters()
    assert random.std().item() == pytest.approx(table.std().item(), rel=0.05)
    with pytest.raises(ConfigError, match="needs the tokenizer of the base"):
        attach(model, PromptTuning(**settings), name="untold")


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: PromptTuning(num_virtual_tokens=0), "num_virtual_tokens is 0"),
        (lambda: PromptTuning(prompt_tuning_init="text"), "needs a prompt_tuning_init_text"),
        (
            lambda: PromptTuning(prompt_tuning_init_text="x"),
            "prompt_tuning_init_text has no effect",
        ),
        (lambda: PTuning(encoder_num_layers=3), "encoder_num_layers has no effect"),
        (lambda: PrefixTuning(encoder_hidden_size=3), "encoder_hidden_size has no effect"),
        (lambda: PTuning(encoder_reparameterization_type="GRU"), "there are MLP, LSTM"),
    ],
)
def test_settings_without_effect_are_errors(make, word):
    with pytest.raises(ConfigError, match=word):
        make()


@pytest.mark.parametrize(
    ("kind", "name", "word"),
    [
        ("prompt", "mamba", "recurrent"),
        ("prompt", "vit", "takes no embedded tokens"),
        ("prompt", "cnn", "need a model of transformers"),
        ("prefix", "albert", "take none"),
        ("prefix", "distilbert", "take none"),
    ],
)
def test_models_that_cannot_are_named(kind, name, word):
    model = ARCHITECTURES[name].build()
    with pytest.raises(TargetError, match=word):
        attach(model, of(kind, 3))
    assert lorica.adapters(model) == {}


def test_what_cannot_act_is_refused():
    model = ARCHITECTURES["llama"].build()
    for kind in KINDS:
        attach(model, of(kind, 3), name=kind)
    attach(model, of("prompt", 2), name="other")
    inputs = inputs_of("llama", model)
    refused: list[tuple[Any, str]] = [
        ({"prompt": 0.5}, "weight 1 for at most one"),
        ({"prompt": 1.0, "other": 1.0}, "weight 1 for at most one"),
        (["prompt", "prefix", None], "prompts and prefixes cannot act in one batch"),
        (["prompt", None], "2 rows are active, but the batch has 3"),
    ]
    for entry, word in refused:
        with activate(model, entry), pytest.raises(ActivationError, match=word):
            said("llama", model, **inputs)
    with activate(model, "prompt"), pytest.raises(ActivationError, match="a static cache"):
        model.generate(**inputs, cache_implementation="static", max_new_tokens=3, pad_token_id=0)
    with activate(model, None):
        cache = DynamicCache(config=model.config)
        model(**inputs, past_key_values=cache)
    step = {"input_ids": inputs["input_ids"][:, :1], "attention_mask": torch.ones(3, 8)}
    with activate(model, "prompt"), pytest.raises(ActivationError, match="empty cache"):
        model(**step, past_key_values=cache)
    with pytest.raises(MergeError, match="load it beside the base"):
        lorica.merge(model, {"prompt": 1.0})


@pytest.mark.parametrize(
    ("name", "word"), [("bert", "of an encoder"), ("bart", "positions of their own")]
)
def test_prefixes_of_different_lengths_are_refused_where_rows_cannot_differ(name, word):
    model = ARCHITECTURES[name].build()
    attach(model, of("prefix", 3), name="a")
    inputs = inputs_of(name, model)
    with activate(model, ["a", None, "a"]), pytest.raises(ActivationError, match=word):
        said(name, model, **inputs)


def test_more_than_the_positions_is_refused_with_the_number_that_fits():
    model = ARCHITECTURES["gpt2"].build()
    before = num_positions(model)
    attach(model, of("prompt", 4), name="a")
    assert before is not None and num_positions(model) == before - 4
    inputs = inputs_of("gpt2", model, 1, before - 3)
    with activate(model, "a"), pytest.raises(ActivationError, match=f"at most {before - 4}"):
        said("gpt2", model, **inputs)


def test_checkpointing_serves_prompts_and_refuses_prefixes():
    model = ARCHITECTURES["llama"].build()
    inputs = inputs_of("llama", model)
    adapters = {kind: attach(model, of(kind, 3), name=kind) for kind in KINDS}
    with activate(model, "prompt"):
        model(**inputs).logits.square().sum().backward()
    (prompt,) = adapters["prompt"].parameters()
    expected, prompt.grad = prompt.grad, None
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    with activate(model, "prompt"):
        model(**inputs).logits.square().sum().backward()
    assert expected is not None and prompt.grad is not None
    close(prompt.grad, expected)
    with activate(model, "prefix"), pytest.raises(LoricaError, match="gradient_checkpointing: fal"):
        model(**inputs)
