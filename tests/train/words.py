"""A tokenizer of numbered words, for tests that need one but not its text."""


class WordTokenizer:
    bos_token_id, eos_token_id, pad_token_id, unk_token_id = None, 0, None, None
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
