"""Virtual tokens between Lorica and the real PEFT: the same outputs, gradients and files."""

import json
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import Adapter, attach
from lorica.errors import AdapterFileError
from lorica.files.adapter import load_adapter, save_adapter
from lorica.files.peft_config import PROMPT_KINDS
from lorica.files.peft_prompts import KINDS
from lorica.methods import PrefixTuning, PromptTuning, PTuning

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file.*adapter_config:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning:peft"),
]
TASKS = {"causal-lm": "CAUSAL_LM", "text-classification": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}
PROMPT = PromptTuning(num_virtual_tokens=5), peft.PromptTuningConfig, {}
MLP = PTuning(num_virtual_tokens=5), peft.PromptEncoderConfig, {"encoder_hidden_size": 36}
LSTM = (
    PTuning(
        num_virtual_tokens=5,
        encoder_reparameterization_type="LSTM",
        encoder_hidden_size=7,
        encoder_num_layers=3,
    ),
    peft.PromptEncoderConfig,
    {
        "encoder_hidden_size": 7,
        "encoder_num_layers": 3,
        "encoder_reparameterization_type": "LSTM",
    },
)
PREFIX = PrefixTuning(num_virtual_tokens=5), peft.PrefixTuningConfig, {}
PROJECTED = (
    PrefixTuning(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=11),
    peft.PrefixTuningConfig,
    {"prefix_projection": True, "encoder_hidden_size": 11},
)
CASES: dict[str, tuple[str, tuple[Any, Any, dict]]] = {
    **{f"prompt-{n}": (n, PROMPT) for n in ("llama", "gpt2", "opt", "bloom", "gemma2", "bert")},
    **{f"prompt-{n}": (n, PROMPT) for n in ("roberta", "modernbert", "t5", "bart")},
    "mlp-llama": ("llama", MLP),
    "lstm-gpt2": ("gpt2", LSTM),
    "mlp-t5": ("t5", MLP),
    **{f"prefix-{n}": (n, PREFIX) for n in ("llama", "gpt2", "opt", "bloom", "qwen3", "gemma2")},
    **{f"prefix-{n}": (n, PREFIX) for n in ("bert", "roberta", "electra", "mixtral")},
    "projected-llama": ("llama", PROJECTED),
    "projected-bert": ("bert", PROJECTED),
}
every = pytest.mark.parametrize("case", CASES)


def logits(name: str, model: nn.Module, core: nn.Module) -> Tensor:
    """Of the tokens alone: PEFT keeps those of the virtual tokens of a decoder, we do not."""
    arch = ARCHITECTURES[name]
    inputs = arch.sample(core, 2, 7)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    found = arch.logits(model(**inputs))
    return found[:, 5:] if arch.task == "causal-lm" and found.shape[1] == 12 else found


def same(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape
    error = (one - other).abs().max().item()
    assert error <= 1e-5 * max(1.0, one.abs().max().item()), error


def theirs_of(case: str) -> tuple[peft.PeftModel, nn.Module]:
    name, (_, config, settings) = CASES[case]
    base = ARCHITECTURES[name].build()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        kind = TASKS[ARCHITECTURES[name].task]
        made = peft.get_peft_model(base, config(task_type=kind, num_virtual_tokens=5, **settings))
    return made.eval(), base


def ours_of(case: str) -> Adapter:
    name, (method, _, _) = CASES[case]
    model = ARCHITECTURES[name].build()
    whole = ("classifier",) if ARCHITECTURES[name].task == "text-classification" else ()
    return attach(model, type(method)(**{**vars(method), "modules_to_save": whole}), name="a")


_NUMBERS = {"mlp_head": (0, 2, 4), "transform": (0, 2)}


def copied(adapter: Adapter, theirs: peft.PeftModel) -> dict[str, nn.Parameter]:
    """Give our tensors the values of theirs; returns theirs by our names."""
    slot = next(iter(adapter.slots.values()))
    own = dict(theirs.prompt_encoder["default"].named_parameters())  # type: ignore[operator]
    head = "transform" if any(key.startswith("transform") for key in own) else "mlp_head"
    found = {}
    for name, tensor in slot.tensors.items():
        key = name.replace("lstm.", "lstm_head.")
        if name in ("prompt", "prefix", "embedding"):
            key = "embedding.weight"
        if name.startswith("mlp."):
            _, number, what = name.split(".")
            key = f"{head}.{_NUMBERS[head][int(number)]}.{what}"
        found[name] = own.pop(key)
        with torch.no_grad():
            tensor.copy_(found[name][: tensor.shape[0]])
    assert not own
    return found


@every
def test_outputs_and_gradients_are_theirs(case):
    name, _ = CASES[case]
    theirs, base = theirs_of(case)
    adapter = ours_of(case)
    pairs = copied(adapter, theirs)
    expected = logits(name, theirs, base)
    with activate(adapter.model, "a"):
        actual = logits(name, adapter.model, adapter.model)
    same(actual, expected)
    actual.square().sum().backward()
    expected.square().sum().backward()
    slot = next(iter(adapter.slots.values()))
    for key, tensor in slot.tensors.items():
        their = pairs[key].grad
        assert their is not None and tensor.grad is not None
        same(tensor.grad, their[: tensor.shape[0]])


@every
def test_theirs_read_by_us_and_written_again(case, tmp_path):
    name, _ = CASES[case]
    theirs, base = theirs_of(case)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with torch.no_grad():
        expected = logits(name, theirs, base)
    model = ARCHITECTURES[name].build()
    adapter = load_adapter(model, tmp_path / "theirs", name="a")
    with torch.no_grad(), activate(model, "a"):
        same(logits(name, model, model), expected)
    save_adapter(adapter, tmp_path / "ours")
    again = ARCHITECTURES[name].build()
    back = peft.PeftModel.from_pretrained(again, str(tmp_path / "ours")).eval()
    with torch.no_grad():
        same(logits(name, back, again), expected)
    save_adapter(load_adapter(ARCHITECTURES[name].build(), tmp_path / "ours"), tmp_path / "second")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@every
def test_ours_read_by_them(case, tmp_path):
    name, _ = CASES[case]
    adapter = ours_of(case)
    model = adapter.model
    with torch.no_grad(), activate(model, "a"):
        expected = logits(name, model, model)
    save_adapter(adapter, tmp_path / "ours")
    base = ARCHITECTURES[name].build()
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    with torch.no_grad():
        same(logits(name, theirs, base), expected)


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
        same(model(**inputs).logits, expected)
    save_adapter(adapter, tmp_path / "ours")
    again = encoder_decoder(kind, layers)
    load_adapter(again, tmp_path / "ours", name="a")
    with torch.no_grad(), activate(again, "a"):
        same(again(**inputs).logits, expected)
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["format"] == "lorica"


def test_the_kinds_that_are_read_are_told():
    assert tuple(KINDS) == PROMPT_KINDS
