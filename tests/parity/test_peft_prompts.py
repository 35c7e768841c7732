"""Virtual tokens between Lorica and the real PEFT: the same outputs, gradients and files."""

import json
from typing import Any

import peft
import pytest
import torch
import transformers as hf

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.errors import AdapterFileError
from lorica.files.adapter import load_adapter, save_adapter
from lorica.files.peft_config import PROMPT_KINDS
from lorica.files.peft_prompts import KINDS
from parity.measured import TOLERANCE, error
from parity.prompts import (
    CASES,
    PREFIX,
    PROJECTED,
    compared,
    copied,
    ours_first,
    ours_of,
    theirs_first,
    theirs_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file.*adapter_config:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning:peft"),
]
every = pytest.mark.parametrize("case", CASES)


@every
def test_outputs_and_gradients_are_theirs(case):
    outputs, gradients = compared(case)
    assert outputs <= TOLERANCE and gradients <= TOLERANCE, (outputs, gradients)


@every
def test_theirs_read_by_us_and_written_again(case, tmp_path):
    found = theirs_first(case, tmp_path)
    assert found.outputs <= TOLERANCE and found.returned <= TOLERANCE, found
    name, _ = CASES[case]
    save_adapter(load_adapter(ARCHITECTURES[name].build(), tmp_path / "ours"), tmp_path / "second")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@every
def test_ours_read_by_them(case, tmp_path):
    assert ours_first(case, tmp_path) <= TOLERANCE


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_virtual_tokens": 6}, r"\(5, 36\), but this base needs \(6, 36\)"),
        ({"num_virtual_tokens": "5"}, "num_virtual_tokens is '5'"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2"),
        ({"num_ranks": 3}, "unknown key 'num_ranks'"),
        ({"prompt_tuning_init": "WORDS"}, "prompt_tuning_init is 'words'"),
    ],
)
def test_what_does_not_fit_is_refused(change, word, tmp_path):
    adapter = ours_of("prompt-llama")
    save_adapter(adapter, tmp_path / "x")
    path = tmp_path / "x/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(AdapterFileError, match=word):
        load_adapter(ARCHITECTURES["llama"].build(), tmp_path / "x")


def test_generation_is_theirs():
    """Without padding; with it PEFT counts the padding among the positions, and we do not."""
    for case in ("prompt-llama", "prefix-llama", "prompt-gpt2", "prefix-gpt2", "prompt-t5"):
        name, _ = CASES[case]
        theirs, base = theirs_of(case)
        adapter = ours_of(case)
        copied(adapter, theirs)
        inputs = {
            key: value
            for key, value in ARCHITECTURES[name].sample(base, 2, 7).items()
            if not key.startswith("decoder")
        }
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad(), activate(adapter.model, "a"):
            actual = adapter.model.generate(**inputs, **how)
        assert torch.equal(actual, theirs.generate(**inputs, **how)), case


def encoder_decoder(kind: str, layers: int) -> Any:
    """With heads of one size, which is what PEFT's prefixes fit on."""
    common = {"vocab_size": 97, "d_model": 36, "pad_token_id": 0, "decoder_start_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "t5":
            sizes = {"d_kv": 12, "d_ff": 53, "num_layers": layers, "num_heads": 3}
            return hf.T5ForConditionalGeneration(hf.T5Config(**common, **sizes)).eval()
        sizes = {f"{side}_layers": layers for side in ("encoder", "decoder")}
        sizes |= {f"{side}_attention_heads": 3 for side in ("encoder", "decoder")}
        sizes |= {f"{side}_ffn_dim": 53 for side in ("encoder", "decoder")}
        config = hf.BartConfig(**common, **sizes, max_position_embeddings=64)
        return hf.BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("settings", [PREFIX[2], PROJECTED[2]], ids=["plain", "projected"])
@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_prefixes_of_decoders_behind_encoders_are_read(kind, layers, settings, tmp_path):
    """PEFT mixes the layers up there: its files are read as it uses them, and ours are our own."""
    base = encoder_decoder(kind, layers)
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5, **settings)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    inputs = ARCHITECTURES["t5"].sample(base, 2, 7)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    with torch.no_grad():
        expected = theirs(**inputs).logits
    model = encoder_decoder(kind, layers)
    adapter = load_adapter(model, tmp_path / "theirs", name="a")
    with torch.no_grad(), activate(model, "a"):
        assert error(model(**inputs).logits, expected) <= TOLERANCE
    save_adapter(adapter, tmp_path / "ours")
    again = encoder_decoder(kind, layers)
    load_adapter(again, tmp_path / "ours", name="a")
    with torch.no_grad(), activate(again, "a"):
        assert error(again(**inputs).logits, expected) <= TOLERANCE
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["format"] == "lorica"


def test_the_kinds_that_are_read_are_told():
    assert tuple(KINDS) == PROMPT_KINDS
