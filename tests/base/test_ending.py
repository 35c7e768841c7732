"""The token that ends a text."""

import pytest
import torch

from architectures import ARCHITECTURES
from lorica.base.ending import end_token_note, set_end_token
from lorica.errors import BaseModelError
from train.words import WordTokenizer


class _Tokenizer(WordTokenizer):
    def get_vocab(self):
        return {"<end>": 0, "<stop>": 5}


def test_an_end_token_with_a_row_of_its_own_is_fine():
    assert end_token_note(ARCHITECTURES["llama"].build(), _Tokenizer()) is None


def test_twins_of_the_end_token_are_told_with_their_number():
    model = ARCHITECTURES["llama"].build()
    rows = model.get_output_embeddings().weight
    with torch.no_grad():
        rows[[0, 7, 9]] = rows[3] + 1e-3 * torch.randn(3, rows.shape[1])
    note = end_token_note(model, _Tokenizer())
    assert note.startswith("3 other tokens") and "'<end>'" in note and "eos_token" in note


def test_choosing_another_end_token():
    model, tokenizer = ARCHITECTURES["llama"].build(), _Tokenizer()
    set_end_token(model, tokenizer, "<stop>")
    assert tokenizer.eos_token == "<stop>"
    assert model.generation_config.eos_token_id == 5


def test_an_unknown_end_token_is_refused_with_the_nearest():
    with pytest.raises(BaseModelError) as caught:
        set_end_token(ARCHITECTURES["llama"].build(), _Tokenizer(), "<stp>")
    assert "did you mean '<stop>'?" in str(caught.value)


def test_the_stories_base_says_that_its_end_token_cannot_be_learned(shared_data):
    from lorica.base.known import base_of
    from lorica.base.load import load_model

    model = load_model(shared_data / "models/stories260k")
    assert any("cannot learn to end" in note for note in base_of(model).notes)
    model = load_model(shared_data / "models/stories260k", eos_token="<s>")
    assert not any("cannot learn to end" in note for note in base_of(model).notes)
    assert base_of(model).tokenizer.eos_token_id == 1
