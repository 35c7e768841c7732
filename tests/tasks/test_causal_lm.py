"""Causal language models: one loss however documents are batched, and answers that are the same."""

import pytest
import torch
import transformers as hf

from architectures import ARCHITECTURES, CAUSAL
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.base.known import base_of
from lorica.base.load import load_model
from lorica.data.encode import Example
from lorica.errors import ConfigError
from lorica.methods.lora import LoRA
from lorica.tasks.causal_lm import CausalLM, references, stop_tokens
from lorica.tasks.task import num_positions
from train.words import WordTokenizer, examples, fast_tokenizer

PACKED = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "phi", "phi3", "gpt_neox"]


def tokenizer(**more):
    return fast_tokenizer("<s> $A", bos_token="<s>", eos_token="</s>", **more)


def loss_of(task, model, block):
    with torch.no_grad():
        return task.losses(model, task.collate([block], model))[0].item()


@pytest.mark.parametrize("name", CAUSAL)
def test_the_loss_is_that_of_transformers(name):
    """The sum over a batch is the sum of model(labels=...).loss * tokens of its documents alone."""
    model, task = ARCHITECTURES[name].build(), CausalLM.of(WordTokenizer())
    block = examples(2, 4)
    wanted = 0.0
    for example in block:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        mean = model(input_ids=ids, labels=labels, use_cache=False).loss
        wanted += mean.item() * example.num_trained
    assert loss_of(task, model, block) == pytest.approx(wanted, rel=2e-5)
    if not task.packs(model):
        assert "padded, not packed" in task.notes[0]


@pytest.mark.parametrize("name", CAUSAL)
def test_packed_padded_and_alone_agree(name):
    model = ARCHITECTURES[name].build()
    records = [{"text": "w7 w8 w9 " * n} for n in (1, 4, 2)]
    found = []
    for packing, batch_size in (("auto", 3), (False, 3), (False, 1)):
        task = CausalLM.of(tokenizer(), packing=packing)
        made = task.predict(model, records, batch_size=batch_size, generate=False)
        found.append([(p.nll, p.num_tokens) for p in made])
        assert all(p.output is None and p.references == () for p in made)
    assert [n for _, n in found[0]] == [4, 13, 7]
    for other in found[1:]:
        for (loss, number), (wanted, same) in zip(other, found[0], strict=True):
            assert loss == pytest.approx(wanted, rel=1e-4)
            assert number == same


def test_which_models_pack():
    """The list is not used anywhere; it tells when a change of transformers costs speed."""
    packs = []
    for name in CAUSAL:
        with torch.no_grad():
            if CausalLM.of(WordTokenizer()).packs(ARCHITECTURES[name].build()):
                packs.append(name)
    assert set(packs) >= {*PACKED, "gpt2", "opt", "mixtral", "qwen3_moe"}
    assert not {"bloom", "falcon", "mamba"} & set(packs)


def chunked(**more):
    """A Llama 4, whose layers attend in chunks of 16 tokens; all but every fourth."""
    config = hf.Llama4TextConfig(
        vocab_size=97,
        hidden_size=36,
        intermediate_size=53,
        intermediate_size_mlp=53,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=12,
        num_local_experts=2,
        attention_chunk_size=16,
        pad_token_id=0,
        **more,
    )
    torch.manual_seed(0)
    return hf.Llama4ForCausalLM(config).eval()


def test_attention_in_chunks_is_packed_only_within_a_chunk():
    model = chunked()
    block = [Example(list(range(1, n)), [-100, *range(2, n)]) for n in (61, 34, 51)]
    own, alone = CausalLM.of(WordTokenizer()), CausalLM.of(WordTokenizer(), packing=False)
    wanted = sum(loss_of(alone, model, [e]) for e in block)
    assert loss_of(own, model, block) == pytest.approx(wanted, rel=1e-5)
    assert "in chunks of 16 tokens" in own.notes[0] and "max_length: 16" in own.notes[0]
    short = [Example(e.input_ids[:n], e.labels[:n]) for e, n in zip(block, (16, 9, 5), strict=True)]
    within = CausalLM.of(WordTokenizer(), max_length=16)
    assert within.packs(model)
    wanted = sum(loss_of(alone, model, [e]) for e in short)
    assert loss_of(within, model, short) == pytest.approx(wanted, rel=1e-5)


def test_an_attention_of_a_kind_nobody_knows_is_not_packed():
    model = ARCHITECTURES["llama"].build()
    model.config.layer_types = ["full_attention", "minimax_m3_sparse"]
    own = CausalLM.of(WordTokenizer())
    assert not own.packs(model)
    assert "attend in a way of their own (minimax_m3_sparse)" in own.notes[0]


def test_packing_that_is_demanded_is_refused_every_time():
    task = CausalLM.of(WordTokenizer(), packing=True)
    model = ARCHITECTURES["bloom"].build()
    for _ in range(2):
        with pytest.raises(ConfigError, match="this model cannot: it does not take another"):
            task.packs(model)
    assert task.packs(ARCHITECTURES["llama"].build())


@pytest.mark.parametrize("name", ["gemma2", "bert"])
def test_models_whose_logits_are_more_than_a_head_go_whole(name):
    model, task = ARCHITECTURES[name].build(), CausalLM.of(WordTokenizer())
    assert task._head(model) is None
    assert not task.shares(model)


def test_running_puts_the_attention_back():
    model, task = ARCHITECTURES["llama"].build(), CausalLM.of(WordTokenizer())
    with pytest.raises(KeyError), task.running(model):
        assert model.config._attn_implementation == "lorica_documents"
        loss_of(task, model, examples(1, 2))
        assert model.config._attn_implementation == "lorica_documents"
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_sliding_windows_hold_inside_documents():
    model = ARCHITECTURES["mistral"].build()
    model.config.sliding_window = 4
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 4
    packed, alone = CausalLM.of(WordTokenizer()), CausalLM.of(WordTokenizer(), packing=False)
    block = [Example(list(range(1, 30)), [-100, *range(2, 30)]), *examples(4, 2)]
    assert packed.packs(model)
    wanted = sum(loss_of(alone, model, [e]) for e in block)
    assert loss_of(packed, model, block) == pytest.approx(wanted, rel=1e-5)
    model.config.sliding_window = None
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    assert loss_of(packed, model, block) != pytest.approx(wanted, rel=1e-3)


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "qwen3"])
def test_answers_of_a_batch_are_those_one_by_one(name):
    model, task = ARCHITECTURES[name].build(), CausalLM.of(tokenizer(), max_new_tokens=9)
    records = [{"prompt": "w9 " * n + f"w{20 + n}", "completion": " w5"} for n in (1, 9, 3, 14)]
    told = []
    together = task.predict(model, records, batch_size=4, progress=told.append)
    alone = [task.predict(model, [record])[0] for record in records]
    assert [p.output for p in together] == [p.output for p in alone]
    assert told == [4]
    assert all(p.references == ("w5",) for p in together)
    assert len({p.output for p in together}) > 1


def test_an_answer_ends_where_an_end_token_comes():
    """A model that says w41, w42 ... until its other end token."""
    task = CausalLM.of(tokenizer(), max_new_tokens=30)
    model = ARCHITECTURES["llama"].build()
    model.generation_config.eos_token_id = [2, 45]
    assert stop_tokens(model, task.tokenizer) == [2, 45]
    count_up(model)
    records = [{"prompt": prompt, "completion": " w5"} for prompt in ("w40", "w43")]
    made = task.predict(model, records)
    assert [p.output for p in made] == ["w41 w42 w43 w44", "w44"]


def count_up(model):
    """Let the model say i + 1 after i."""
    inner = model.forward

    def forward(input_ids=None, **other):
        made = inner(input_ids=input_ids, **other)
        made.logits = torch.nn.functional.one_hot(input_ids + 1, 98).float()[..., :97]
        return made

    model.forward = forward


def test_a_prompt_without_tokens_is_begun():
    task = CausalLM.of(fast_tokenizer(eos_token="</s>"), max_new_tokens=4)
    model = ARCHITECTURES["llama"].build()
    (made,) = task.predict(model, [{"prompt": "", "completion": "w5 w6"}])
    assert isinstance(made.output, str)
    assert made.num_tokens == 2  # the first token is predicted from nothing, so it is not trained


def test_a_long_prompt_leaves_room_for_the_answer():
    task = CausalLM.of(tokenizer(), max_length=64, max_new_tokens=500)
    for name in ("gpt2", "opt"):  # positions are a table of 64
        model = ARCHITECTURES[name].build()
        assert num_positions(model) == 64
        prompt, num_cut = task._prompt({"prompt": "w5 " * 90, "completion": "w6"}, model)
        assert num_cut == 91 - len(prompt)
        assert len(prompt) == 32
        assert prompt[0] == 1
        (made,) = task.predict(model, [{"prompt": "w5 " * 90, "completion": "w6"}])
        assert len(made.output.split()) <= 32


def test_texts_in_windows_count_every_token_once():
    model = ARCHITECTURES["llama"].build()
    task = CausalLM.of(tokenizer(), max_length=9)
    records = [{"text": "w5 " * 30}, {"text": "w6 w7"}]
    encoded = task.encode(records)
    assert [e.row for e in encoded] == [0] * 4 + [1]
    made = task.predict(model, records, generate=False, batch_size=2)
    assert [p.num_tokens for p in made] == [31, 3]
    singles = [loss_of(task, model, [e]) for e in encoded]
    assert made[0].nll == pytest.approx(sum(singles[:4]), rel=1e-5)


def test_chat_records():
    model = ARCHITECTURES["llama"].build()
    task = CausalLM.of(tokenizer(), max_new_tokens=5)
    turns = [
        {"role": "user", "content": "w5 w6"},
        {"role": "assistant", "content": "w7 w8"},
    ]
    records = [{"messages": turns}, {"messages": turns, "references": ["w9", " w10 "]}]
    made = task.predict(model, records)
    assert made[0].references == ("w7 w8",)
    assert made[1].references == ("w9", "w10")
    assert made[0].output == made[1].output
    assert made[0].nll == pytest.approx(made[1].nll)


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"completion": " a "}, ("a",)),
        ({"target": "b"}, ("b",)),
        ({"completion": "a", "references": ["c", "d "]}, ("c", "d")),
        ({"messages": [{"role": "user", "content": "x"}]}, ()),
        ({"messages": [{"role": "assistant", "content": " x"}]}, ("x",)),
        ({"text": "t"}, ()),
    ],
)
def test_references(record, wanted):
    assert references(record) == wanted


def test_predicting_leaves_the_mode_and_uses_the_adapter():
    model, task = ARCHITECTURES["llama"].build(), CausalLM.of(tokenizer())
    attach(model, LoRA(r=2, target_modules="all-linear", init_lora_weights="random"), name="x")
    records = [{"prompt": "w5", "completion": " w6 w7"}]
    model.train()
    with activate(model, None):
        (base,) = task.predict(model, records, generate=False)
    with activate(model, "x"):
        (tuned,) = task.predict(model, records, generate=False)
    assert model.training
    assert base.nll != tuned.nll


def test_facts_are_what_an_adapter_must_be_asked_with():
    task = CausalLM.of(tokenizer(), max_length=32, separator="\n", train_on="all", add_bos=True)
    assert task.facts() == {
        "kind": "causal-lm",
        "max_length": 32,
        "train_on": "all",
        "add_bos": True,
        "separator": "\n",
        "eos_token": task.tokenizer.eos_token,
    }


def test_a_pretrained_model(shared_data):
    """Real weights: packed, padded and one by one give the same perplexity, far below chance."""
    model = load_model(shared_data / "models/stories260k", dtype="float32")
    tokenizer = base_of(model).tokenizer
    texts = [
        "Once upon a time, there was a little girl named Lily.",
        "Tom had a red ball. He liked to play with it in the park. One day the ball was lost.",
        "The cat sat on the mat.",
    ]
    records = [{"text": text} for text in texts]
    found = []
    for packing, size in ((True, 3), (False, 3), (False, 1)):
        task = CausalLM.of(tokenizer, packing=packing, add_bos=True)
        made = task.predict(model, records, batch_size=size, generate=False)
        found.append(sum(p.nll for p in made) / sum(p.num_tokens for p in made))
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)
    assert found[0] < 3  # chance is log 512 = 6.2
    task = CausalLM.of(tokenizer, add_bos=True, max_new_tokens=12)
    starts = [text[:n] for text, n in zip(texts, (16, 40, 7), strict=True)]
    prompts = [{"prompt": start, "completion": "x"} for start in starts]
    together = [p.output for p in task.predict(model, prompts, batch_size=3)]
    assert together == [task.predict(model, [prompt])[0].output for prompt in prompts]
    assert all(together)
