"""Virtual tokens in PEFT and in Lorica: the cases, both sides of one, and their errors."""

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.attach.handle import Adapter
from lorica.files.adapter import load_adapter, save_adapter
from lorica.methods import PrefixTuning, PromptTuning, PTuning
from parity.measured import Parity, error

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


def logits(name: str, model: nn.Module, core: nn.Module) -> Tensor:
    """Of the tokens alone: PEFT keeps those of the virtual tokens of a decoder, we do not."""
    arch = ARCHITECTURES[name]
    inputs = arch.sample(core, 2, 7)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    found = arch.logits(model(**inputs))
    return found[:, 5:] if arch.task == "causal-lm" and found.shape[1] == 12 else found


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


def compared(case: str) -> tuple[float, float]:
    """Errors of outputs and of gradients, from the same tensors."""
    name, _ = CASES[case]
    theirs, base = theirs_of(case)
    adapter = ours_of(case)
    pairs = copied(adapter, theirs)
    expected = logits(name, theirs, base)
    with activate(adapter.model, "a"):
        actual = logits(name, adapter.model, adapter.model)
    actual.square().sum().backward()
    expected.square().sum().backward()
    worst = 0.0
    for key, tensor in next(iter(adapter.slots.values())).tensors.items():
        their = pairs[key].grad
        assert their is not None and tensor.grad is not None
        worst = max(worst, error(tensor.grad, their[: tensor.shape[0]]))
    return error(actual.detach(), expected.detach()), worst


def theirs_first(case: str, folder: Path) -> Parity:
    """PEFT's, read by us, written again and read by PEFT; with what `compared` finds."""
    name, _ = CASES[case]
    theirs, base = theirs_of(case)
    theirs.save_pretrained(str(folder / "theirs"))
    model = ARCHITECTURES[name].build()
    adapter = load_adapter(model, folder / "theirs", name="a")
    with torch.no_grad(), activate(model, "a"):
        read = error(logits(name, model, model), logits(name, theirs, base))
    save_adapter(adapter, folder / "ours")
    outputs, gradients = compared(case)
    again = ARCHITECTURES[name].build()
    back = peft.PeftModel.from_pretrained(again, str(folder / "ours")).eval()
    with torch.no_grad():
        returned = error(logits(name, back, again), logits(name, theirs, base))
    return Parity(max(read, outputs), gradients, returned, adapter)


def ours_first(case: str, folder: Path) -> float:
    """Ours, read by PEFT."""
    name, _ = CASES[case]
    adapter = ours_of(case)
    with torch.no_grad(), activate(adapter.model, "a"):
        expected = logits(name, adapter.model, adapter.model)
    save_adapter(adapter, folder / "first")
    base = ARCHITECTURES[name].build()
    theirs = peft.PeftModel.from_pretrained(base, str(folder / "first")).eval()
    with torch.no_grad():
        return error(logits(name, theirs, base), expected)
