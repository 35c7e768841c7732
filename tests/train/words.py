"""Tokenizers of numbered words, for tests that need one but not its text; and encoded records."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lorica.data.encode import Example


class WordTokenizer:
    bos_token_id, eos_token_id, pad_token_id, unk_token_id = None, 0, None, None
    eos_token = "<end>"
    all_special_tokens = ("<end>",)
    special_tokens_map = {"eos_token": "<end>"}  # noqa: RUF012
    chat_template = None

    def __call__(self, text, **kwargs):
        one = (
            [int(w) for w in text.split()]
            if isinstance(text, str)
            else [[int(w) for w in t.split()] for t in text]
        )
        return {"input_ids": one}

    def convert_tokens_to_ids(self, tokens):
        return 0 if isinstance(tokens, str) else [0] * len(tokens)

    def decode(self, ids, **kwargs):
        return " ".join(map(str, ids))


def fast_tokenizer(single="", pair="", **special):
    """A tokenizer of transformers: 97 ids; 0 to 4 are <pad> <s> </s> <sep> <unk>, then w5 to w96.

    Args:
        single, pair: how texts are framed, as in "<s> $A </s>".
    """
    names = ["<pad>", "<s>", "</s>", "<sep>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*names, *(f"w{i}" for i in range(5, 97))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if single:
        made.post_processor = processors.TemplateProcessing(
            single=single,
            pair=pair or f"{single} $B:1",
            special_tokens=[(n, vocabulary[n]) for n in names if n in single + pair],
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **special)


def examples(seed, count, longest=23, vocabulary=90):
    """Random prompts with completions, of 3 to `longest` - 1 tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in range(count):
        length = int(torch.randint(3, longest, (1,), generator=generator))
        ids = torch.randint(1, vocabulary, (length,), generator=generator).tolist()
        prompt = int(torch.randint(1, length - 1, (1,), generator=generator))
        made.append(Example(ids, [-100] * prompt + ids[prompt:], row))
    return made
