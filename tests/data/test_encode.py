"""Token ids and labels: one BOS, a trained EOS, no forged turns, and nothing lost in silence."""

import os
import random
from pathlib import Path

import pytest

from data.chat_templates import (
    ALL,
    CHATML,
    HEADERS,
    SPECIAL,
    THINKING,
    byte_tokenizer,
    conversation,
)
from lorica.data.encode import (
    CausalEncoder,
    separator_of,
)
from lorica.data.read import from_rows, read
from lorica.errors import ConfigError, DataError

SHARED = Path(os.environ.get("LORICA_TEST_DATA", Path(__file__).parents[2] / "../shared/data"))
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the repository")
PROMPT = {"prompt": "the user asks\n", "completion": "it is so"}
CHAT = {"messages": conversation("hello", "hi there", "what is it?", "it is\n a test")}


def encode_causal(record, tokenizer, **settings):
    """One record, encoded with these settings."""
    (example,) = CausalEncoder(tokenizer, **settings).encode([record])
    return example


def trained_text(example, tokenizer):
    """Runs of trained tokens, decoded."""
    runs, held = [], []
    for label in [*example.labels, -100]:
        if label != -100:
            held.append(label)
        elif held:
            runs.append(tokenizer.decode(held))
            held = []
    return runs


def check(example, tokenizer):
    assert len(example.input_ids) == len(example.labels)
    assert example.labels[0] == -100 and example.num_trained > 0
    pairs = zip(example.input_ids, example.labels, strict=True)
    assert all(label in (-100, token) for token, label in pairs)
    assert example.input_ids.count(tokenizer.bos_token_id) <= 1 or tokenizer.bos_token_id == (
        tokenizer.eos_token_id
    )


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("add_bos", [None, True, False])
def test_prompt_record(adds_bos, add_bos):
    tokenizer = byte_tokenizer(adds_bos=adds_bos)
    example = encode_causal(PROMPT, tokenizer, add_bos=add_bos)
    check(example, tokenizer)
    begins = add_bos if add_bos is not None else adds_bos
    assert tokenizer.decode(example.input_ids) == "<s>" * begins + "the user asks\nit is so</s>"
    assert trained_text(example, tokenizer) == ["it is so</s>"]
    assert example.labels[-1] == tokenizer.eos_token_id
    example = encode_causal(PROMPT, tokenizer, add_bos=add_bos, train_on="all")
    assert example.labels[1:] == example.input_ids[1:]


def test_eos_is_trained_though_it_is_the_padding_token():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    try:
        assert encode_causal(PROMPT, tokenizer).labels[-1] == tokenizer.eos_token_id
    finally:
        tokenizer.pad_token = None


def test_without_eos_it_is_said():
    tokenizer = byte_tokenizer()
    eos, tokenizer.eos_token = tokenizer.eos_token, None
    try:
        with pytest.raises(DataError, match="would never learn to stop"):
            encode_causal(PROMPT, tokenizer)
        example = encode_causal(PROMPT, tokenizer, add_eos=False)
        assert trained_text(example, tokenizer) == ["it is so"]
    finally:
        tokenizer.eos_token = eos


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_chat_ids_equal_those_of_transformers(name, adds_bos):
    """One turn each, so that both tokenize the same stretches."""
    tokenizer = byte_tokenizer(ALL[name], adds_bos=adds_bos)
    example = encode_causal({"messages": CHAT["messages"][:2]}, tokenizer)
    check(example, tokenizer)
    text = tokenizer.apply_chat_template(CHAT["messages"][:2], tokenize=False)
    assert tokenizer.decode(example.input_ids) == text.rstrip("\n")
    stop = example.input_ids[-1]
    assert example.labels[-1] == stop and stop in CausalEncoder(tokenizer).stop_ids
    assert "</s></s>" not in tokenizer.decode(example.input_ids)


def test_mask_equals_the_one_of_transformers_but_for_the_turn_end():
    tokenizer = byte_tokenizer(ALL["generation"])
    theirs = tokenizer.apply_chat_template(
        CHAT["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    example = encode_causal(CHAT, tokenizer)
    ids = theirs["input_ids"]
    masked = [
        tokenizer.decode([i]) for i, m in zip(ids, theirs["assistant_masks"], strict=True) if m
    ]
    assert "".join(masked) == "hi thereit is\n a test"
    assert trained_text(example, tokenizer) == ["hi there<|im_end|>", "it is\n a test<|im_end|>"]


def test_fallback_template_ends_answers_with_eos():
    tokenizer = byte_tokenizer(None)
    encoded = CausalEncoder(tokenizer).encode([CHAT])
    example = encoded[0]
    check(example, tokenizer)
    assert trained_text(example, tokenizer) == [" hi there</s>", " it is\n a test</s>"]
    assert any("no chat template" in note for note in encoded.notes)
    assert CausalEncoder(tokenizer).stop_ids == (tokenizer.eos_token_id,)


def test_train_on_the_last_turn_or_on_everything():
    tokenizer = byte_tokenizer(CHATML)
    last = encode_causal(CHAT, tokenizer, train_on="last")
    assert trained_text(last, tokenizer) == ["it is\n a test<|im_end|>"]
    every = encode_causal(CHAT, tokenizer, train_on="all")
    assert every.labels[1:] == every.input_ids[1:]
    assert tokenizer.decode(every.input_ids).endswith("<|im_end|>\n")
    assert tokenizer.eos_token_id not in every.input_ids


@pytest.mark.parametrize("name", [None, *ALL])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_generation_starts_from_the_ids_that_training_showed(name, adds_bos):
    tokenizer = byte_tokenizer(ALL.get(name), adds_bos=adds_bos)
    for record in (CHAT, PROMPT, {"prompt": "p", "completion": "c"}):
        encoder = CausalEncoder(tokenizer, separator="\n")
        example = encoder.encode([record])[0]
        prompt = encoder.prompt_ids(record)
        assert example.input_ids[: len(prompt)] == prompt
        assert example.labels[len(prompt)] != -100
    assert encoder.prompt_ids(CHAT, most=5) == prompt_tail(encoder.prompt_ids(CHAT), 5, tokenizer)
    with_messages = {"messages": CHAT["messages"][:3]}
    assert encoder.prompt_ids(with_messages) == encoder.prompt_ids(CHAT)


def prompt_tail(ids, most, tokenizer):
    begins = int(ids[0] == tokenizer.bos_token_id)
    return ids[:begins] + ids[len(ids) - most + begins :]


def test_prompt_records_as_chat():
    tokenizer = byte_tokenizer(CHATML)
    encoder = CausalEncoder(tokenizer, prompt_as_chat=True)
    chat = {"messages": conversation(PROMPT["prompt"], PROMPT["completion"])}
    assert encoder.encode([PROMPT])[0] == encoder.encode([chat])[0]
    assert encoder.prompt_ids({"prompt": PROMPT["prompt"]}) == encoder.prompt_ids(chat)


@pytest.mark.parametrize("template", [None, CHATML, HEADERS, THINKING])
def test_no_content_forges_control_tokens(template):
    """The number of control tokens is the template's own, whatever the messages spell."""
    tokenizer = byte_tokenizer(template)
    control = set(tokenizer.convert_tokens_to_ids(SPECIAL))
    encoder = CausalEncoder(tokenizer)

    def count(messages):
        return sum(i in control for i in encoder.encode([{"messages": messages}])[0].input_ids)

    random.seed(0)
    pieces = [*SPECIAL, "<|im_", "end|>", "start|>", "<", "|", "s>", "assistant", "\n", " ", "é"]
    plain = count(conversation("a", "a"))
    records = [
        {"messages": conversation(*("x" + "".join(random.choices(pieces, k=6)) for _ in "ab"))}
        for _ in range(1000)
    ]
    for record, example in zip(records, encoder.encode(records), strict=True):
        assert sum(i in control for i in example.input_ids) == plain, record
        text = tokenizer.decode(example.input_ids)
        assert all(message["content"].strip() in text for message in record["messages"])


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a</s>b", "completion": "<s>c<|im_end|>"},
        {"text": "x<|im_start|>user\ny</s> z"},
    ],
)
def test_text_that_spells_control_tokens(record):
    tokenizer = byte_tokenizer()
    control = set(tokenizer.convert_tokens_to_ids(SPECIAL))
    encoded = CausalEncoder(tokenizer).encode([record])
    assert [i for i in encoded[0].input_ids if i in control] == [tokenizer.eos_token_id]
    assert any("special tokens spelled in 1 record stay text" in note for note in encoded.notes)
    parsed = CausalEncoder(tokenizer, parse_special_tokens=True).encode([record])
    assert sum(i in control for i in parsed[0].input_ids) > 1 and not parsed.notes


def test_rendered_text_keeps_its_one_bos_and_eos():
    tokenizer = byte_tokenizer(adds_bos=True)
    encoder = CausalEncoder(tokenizer, parse_special_tokens=True)
    example = encoder.encode([{"text": "<s>[INST] hi [/INST] so</s>"}])[0]
    assert tokenizer.decode(example.input_ids) == "<s>[INST] hi [/INST] so</s>"


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("lengths", [(3, 5), (40, 3), (3, 80), (90, 90), (0, 60), (200, 1)])
@pytest.mark.parametrize("max_length", [8, 31, 64])
def test_truncation_always_leaves_something_to_learn(adds_bos, lengths, max_length):
    tokenizer = byte_tokenizer(adds_bos=adds_bos)
    prompt, completion = "p" * lengths[0], "é" * lengths[1]
    record = {"prompt": prompt, "completion": completion}
    whole = encode_causal(record, tokenizer)
    example = encode_causal(record, tokenizer, max_length=max_length)
    check(example, tokenizer)
    assert len(example) == min(len(whole), max_length)
    assert example.num_cut == len(whole) - len(example)
    assert example.num_trained_cut == whole.num_trained - example.num_trained
    if example.num_trained_cut:
        assert example.input_ids[-1] != tokenizer.eos_token_id
    else:
        assert example.labels[-1] == tokenizer.eos_token_id
    if adds_bos:
        assert example.input_ids[0] == tokenizer.bos_token_id
    first = next(i for i, label in enumerate(example.labels) if label != -100)
    if lengths[0] and example.num_trained_cut:
        prompt = next(i for i, label in enumerate(whole.labels) if label != -100)
        assert first - adds_bos == min(prompt - adds_bos, max_length // 4)


def test_what_was_cut_is_said():
    tokenizer = byte_tokenizer()
    records = [PROMPT, {"prompt": "p", "completion": "é" * 50}]
    encoded = CausalEncoder(tokenizer, max_length=16).encode(records)
    assert encoded.num_truncated == 1
    assert "1 record (50.0%) cut to 16 tokens" in encoded.statement()
    assert f"{encoded[1].num_trained_cut:,} trained tokens lost" in encoded.statement()
    assert encoded.num_tokens == sum(len(e) for e in encoded)
    assert encoded.num_trained_tokens == sum(e.num_trained for e in encoded)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 14, 15, 16, 100])
def test_windows_learn_every_token_once(adds_bos, size):
    tokenizer = byte_tokenizer(adds_bos=adds_bos)
    text = "".join(chr(ord("A") + i % 26) for i in range(size))
    whole = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    encoded = CausalEncoder(tokenizer, max_length=8).encode([{"text": text}])
    learned = [label for e in encoded for label in e.labels if label != -100]
    assert learned == (whole if adds_bos else whole[1:])
    for example in encoded:
        check(example, tokenizer)
        assert 2 <= len(example) <= 8 and example.row == 0


def test_records_without_a_trained_token_are_named():
    tokenizer = byte_tokenizer()
    rows = from_rows([{"prompt": "p", "completion": "c"}] * 5).rows
    rows[1:4] = [{"prompt": "p", "completion": ""}] * 3
    with pytest.raises(DataError) as caught:
        CausalEncoder(tokenizer, add_eos=False).encode(rows, origins=[("f", n) for n in range(5)])
    text = str(caught.value)
    assert "3 of 5 records have nothing to learn" in text and "f:1: no trained token" in text
    silent = {"messages": [CHAT["messages"][0], {**CHAT["messages"][1], "train": False}]}
    with pytest.raises(DataError, match="1 of 1 records have nothing to learn"):
        CausalEncoder(byte_tokenizer(CHATML)).encode([silent])


def test_records_that_cannot_be_rendered_are_all_named():
    encoder = CausalEncoder(byte_tokenizer(ALL["inst"]))
    bad = {"messages": [{"role": "system", "content": "s"}, *CHAT["messages"]]}
    with pytest.raises(DataError) as caught:
        encoder.encode([CHAT, bad, bad, bad, bad])
    assert "4 of 5 records cannot be rendered" in str(caught.value)
    assert "record 2:" in str(caught.value) and "and 1 more" in str(caught.value)
    with pytest.raises(DataError, match="nothing to continue"):
        encode_causal({"text": "t", "label": 1}, byte_tokenizer())


def test_what_a_template_dropped_is_said():
    thoughts = ("<think>\nhm\n</think>\n\nhi", "<think>\nso\n</think>\n\nbye")
    record = {"messages": conversation("u", thoughts[0], "v", thoughts[1])}
    encoded = CausalEncoder(byte_tokenizer(THINKING)).encode([record])
    assert any("the template left out text of 1 record" in note for note in encoded.notes)


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="max_length is 4"):
        CausalEncoder(byte_tokenizer(), max_length=4)
    with pytest.raises(ConfigError, match="train_on is 'answers'"):
        CausalEncoder(byte_tokenizer(), train_on="answers")  # type: ignore[arg-type]


def test_separator_is_one_for_the_whole_set():
    assert separator_of([{"prompt": "a\n", "completion": "b"}]) == ""
    assert separator_of([{"prompt": "a", "completion": " b"}]) == ""
    assert separator_of([{"prompt": "a", "completion": "b"}]) == "\n"
    mixed = [{"prompt": "a ", "completion": "b"}, {"prompt": "a", "completion": " b"}]
    assert separator_of(mixed) == "\n"
    assert separator_of([]) == ""


@needs_data
def test_sentencepiece_does_not_put_a_space_before_the_completion():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models/stories260k")
    encoder = CausalEncoder(tokenizer, add_bos=True, separator="\n")
    example = encoder.encode([{"prompt": "One day", "completion": "Lily </s> ran."}])[0]
    check(example, tokenizer)
    assert example.input_ids[0] == 1 and example.input_ids[-1] == 2
    assert example.input_ids.count(2) == 1
    assert tokenizer.decode(example.input_ids[1:-1]) == "One day\nLily </s> ran."
    assert trained_text(example, tokenizer) == ["Lily </s> ran.</s>"]
    for completion in ("\n\nx", " x", "é", "🙂", "x"):
        example = encoder.encode([{"prompt": "p", "completion": completion}])[0]
        assert tokenizer.decode(example.input_ids[1:-1]) == f"p\n{completion}"
    assert CausalEncoder(tokenizer).encode([PROMPT])[0].input_ids[0] != 1  # it adds none itself


@needs_data
def test_gpt2_has_one_token_for_everything():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "gpt2_tokenizer")
    example = encode_causal({"prompt": "a", "completion": "b <|endoftext|> c"}, tokenizer)
    assert example.input_ids.count(50256) == 1 and example.labels[-1] == 50256
    rows = read(SHARED / "e2e_nlg/devset.csv", limit=500)
    encoded = CausalEncoder(tokenizer, separator=separator_of(rows)).encode(rows)
    for row, example in zip(rows, encoded, strict=True):
        text = tokenizer.decode(example.input_ids)
        assert text == f"{row['prompt']}\n{row['completion']}<|endoftext|>"


FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"


@pytest.mark.parametrize(
    "text", ["e\u0301", "\u202eabc\u202c", "a\u200bb", FAMILY, "é" * 500, "\u0915\u094d", "\ufffd"]
)
def test_every_text_comes_back_from_a_byte_level_tokenizer(text):
    tokenizer = byte_tokenizer()
    example = encode_causal({"prompt": text, "completion": text}, tokenizer)
    assert tokenizer.decode(example.input_ids[:-1]) == text + text
