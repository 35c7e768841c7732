"""Make the files of tests/files/adapterhub: adapters that the package `adapters` wrote.

It needs an older transformers than Lorica, so it has an environment of its own:

    python -m venv /tmp/hub && /tmp/hub/bin/pip install adapters==1.3.0 torch safetensors
    /tmp/hub/bin/python scripts/adapterhub_fixtures.py write
    /tmp/hub/bin/python scripts/adapterhub_fixtures.py check FOLDER

`write` makes the adapters, and what the model answers with each. `check` loads a folder that Lorica
wrote and says how far the answer is from the one that Lorica noted beside it.

The base is a BERT of two layers whose weights follow from a formula, so it need not be kept.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

FOLDER = Path(__file__).parents[1] / "tests" / "files" / "adapterhub"
IDS = torch.tensor([[1, 5, 9, 13, 2], [1, 7, 3, 11, 2]])


def base() -> BertForSequenceClassification:
    """The same weights with every version of transformers."""
    config = BertConfig(
        vocab_size=31,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=17,
        max_position_embeddings=16,
    )
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            numbers = torch.arange(parameter.numel(), dtype=torch.float64) + len(name)
            parameter.copy_((torch.sin(numbers * 1.7) * 0.3).reshape(parameter.shape))
            if name.endswith("LayerNorm.weight"):
                parameter.add_(1)
    return model


def answer(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def stir(model: torch.nn.Module) -> None:
    """Numbers of the adapter that follow from a formula."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".loras." in name or ".adapters." in name:
                numbers = torch.arange(parameter.numel(), dtype=torch.float64) + len(name)
                parameter.copy_((torch.cos(numbers * 2.3) * 0.2).reshape(parameter.shape))


def write() -> None:
    import adapters
    from adapters import DoubleSeqBnConfig, LoRAConfig, SeqBnConfig

    settings = {
        "lora": LoRAConfig(r=2, alpha=3, intermediate_lora=True, output_lora=True),
        "lora-left-out": LoRAConfig(r=2, alpha=3, attn_matrices=["q"], leave_out=[0]),
        "houlsby": DoubleSeqBnConfig(reduction_factor=4),
        "pfeiffer-before-norm": SeqBnConfig(reduction_factor=6, original_ln_before=False),
        "pfeiffer": SeqBnConfig(reduction_factor=6),
    }
    for name, config in settings.items():
        model = base()
        adapters.init(model)
        model.add_adapter("x", config=config)
        stir(model)
        model.set_active_adapters("x")
        target = FOLDER / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        model.save_adapter(str(target), "x", use_safetensors=True, with_head=False)
        save_file({"logits": answer(model)}, target / "answer.safetensors")


def check(folder: Path) -> None:
    import adapters

    model = base()
    adapters.init(model)
    model.load_adapter(str(folder), load_as="x", set_active=True, use_safetensors=True)
    model.eval()
    expected = load_file(folder / "answer.safetensors")["logits"]
    print(float((answer(model) - expected).abs().max()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]:
        write()
    else:
        check(Path(sys.argv[2]))
