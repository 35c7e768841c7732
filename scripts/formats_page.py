"""Write docs/formats.md: every format, and how far the real tool's answers are from ours.

    python scripts/formats_page.py [docs/formats.md]

Small models with random weights and a random adapter are written, read by the tool, and asked. A
tool that is not installed is named in the table as not asked. llama-cpp-python, mlx-lm and LyCORIS
are no development dependencies; the first is built from source for minutes:

    pip install llama-cpp-python 'mlx[cpu]' mlx-lm lycoris-lora einops toml
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from architectures import ARCHITECTURES  # noqa: E402
from lorica.attach.activate import activate  # noqa: E402
from lorica.attach.attach import attach  # noqa: E402
from lorica.base.image_pipeline import ImagePipeline  # noqa: E402
from lorica.base.load import load_model  # noqa: E402
from lorica.files import gguf_model, onnx_model  # noqa: E402
from lorica.files.adapter import load_adapter, save_adapter  # noqa: E402
from lorica.files.exports import ADAPTERS, MODELS  # noqa: E402
from lorica.files.formats import FORMATS  # noqa: E402
from lorica.methods.lora import LoRA  # noqa: E402
from lorica.mix import merge  # noqa: E402

PROMPT = "Once upon a time, there were 12 birds and 3 cats."
TOKENS = 24


@dataclass(frozen=True)
class Checked:
    """What one tool said of one format."""

    format: str
    package: str
    what: str
    ask: Callable[[Path], str]


def stirred(model: nn.Module, method: Any) -> Any:
    adapter = attach(model, method)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return adapter


def told(found: Tensor, expected: Tensor) -> str:
    return f"logits differ by {float((found - expected).abs().max()):.1e} at most"


def logits(model: Any) -> Tensor:
    arch = ARCHITECTURES["llama"]
    with torch.no_grad():
        return arch.logits(model(**arch.sample(model, 2, 7)))


def uneven() -> LoRA:
    """Two ranks and two scales."""
    return LoRA(
        r=4,
        lora_alpha=6,
        target_modules="all-linear",
        rank_pattern={"model.layers.0.*": 2},
        alpha_pattern={"model.layers.1.*": 3},
    )


def ours() -> tuple[nn.Module, Any, Tensor]:
    """A model, an adapter on it, and what they answer."""
    model = ARCHITECTURES["llama"].build()
    adapter = stirred(model, uneven())
    with activate(model, adapter):
        return model, adapter, logits(model)


def peft(folder: Path, *, form: str = "peft") -> str:
    from peft import PeftModel

    _, adapter, expected = ours()
    if form == "peft":
        save_adapter(adapter, folder / "x")
    else:
        FORMATS[form].write(adapter, folder / "x", "float32", False)
    return told(
        logits(PeftModel.from_pretrained(ARCHITECTURES["llama"].build(), folder / "x")), expected
    )


def own(form: str) -> Callable[[Path], str]:
    def ask(folder: Path) -> str:
        _, adapter, expected = ours()
        path = folder / f"x{FORMATS[form].suffix}"
        FORMATS[form].write(adapter, path, "float32", False)
        again = ARCHITECTURES["llama"].build()
        with activate(again, load_adapter(again, path)):
            return told(logits(again), expected)

    return ask


def greedy(model: Any, ids: list[int]) -> list[int]:
    ids = list(ids)
    with torch.no_grad():
        for _ in range(TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def in_llama_cpp(
    base: Path, ids: list[int], expected: list[int], model: Any, lora: Path | None
) -> str:
    """Whether llama.cpp's tokens and greedy text are ours, and how far logits are on that text."""
    import numpy as np
    from llama_cpp import Llama

    path = str(lora) if lora else None
    other = Llama(str(base), lora_path=path, n_ctx=256, logits_all=True, verbose=False)
    same_tokens = other.tokenize(PROMPT.encode(), add_bos=True) == ids
    other.eval(expected)
    found = torch.from_numpy(np.array(other.scores[: len(expected)]))
    with torch.no_grad():
        wanted = model(torch.tensor([expected])).logits[0]
    text = found[len(ids) - 1 : -1].argmax(-1).tolist() == expected[len(ids) :]
    spread = float((found - wanted).abs().max() / wanted.std())
    words = "same greedy text" if text else "OTHER greedy text"
    words += "" if same_tokens else ", OTHER tokens"
    return f"{words}; logits within {spread:.1e} of their spread"


def gguf(dtype: str | None) -> Callable[[Path], str]:
    """An adapter beside its base, or merged where a dtype is given."""

    def ask(folder: Path) -> str:
        model = load_model("embedded", dtype="float32")
        tokenizer = model.__dict__["_lorica_base"].tokenizer
        ids = tokenizer(PROMPT)["input_ids"]
        adapter = stirred(model, LoRA(r=4, lora_alpha=6, target_modules="all-linear"))
        if dtype is not None:
            merge(model, adapter)
            gguf_model.write(model, tokenizer, folder / "x.gguf", dtype)
            return in_llama_cpp(folder / "x.gguf", ids, greedy(model, ids), model, None)
        FORMATS["gguf"].write(adapter, folder / "lora.gguf", "float32", False)
        bare = load_model("embedded", dtype="float32")
        gguf_model.write(bare, tokenizer, folder / "base.gguf", "float32")
        with activate(model, adapter):
            expected = greedy(model, ids)
            return in_llama_cpp(folder / "base.gguf", ids, expected, model, folder / "lora.gguf")

    return ask


def gguf_phi3(folder: Path) -> str:
    """A random Phi 3 with rotary factors for long texts, and an adapter, beside the base."""
    from transformers import Phi3Config, Phi3ForCausalLM

    tokenizer = load_model("embedded").__dict__["_lorica_base"].tokenizer
    factors = [[1 + step * i for i in range(8)] for step in (0.1, 0.5)]
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": factors[0]}
    rope |= {"long_factor": factors[1], "original_max_position_embeddings": 256}
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        original_max_position_embeddings=256, rope_parameters=rope, sliding_window=256,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Phi3ForCausalLM(config).eval()
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.ndim == 2):
            weight.mul_(3)  # as it is made, it says one token for ever
    ids = tokenizer(PROMPT)["input_ids"]
    gguf_model.write(model, tokenizer, folder / "base.gguf", "float32")
    adapter = stirred(model, LoRA(r=4, lora_alpha=6, target_modules="all-linear"))
    FORMATS["gguf"].write(adapter, folder / "lora.gguf", "float32", False)
    with activate(model, adapter):
        expected = greedy(model, ids)
        return in_llama_cpp(folder / "base.gguf", ids, expected, model, folder / "lora.gguf")


def diffusers(form: str, name: str, *, back: bool = False) -> Callable[[Path], str]:
    """diffusers reads what we wrote; or the other way, which the tests have."""

    def ask(folder: Path) -> str:
        from pipelines import PIPELINES, answers

        pipeline = PIPELINES[name]()
        names = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "out_proj", "fc1")
        adapter = stirred(
            ImagePipeline(pipeline),
            LoRA(r=2, lora_alpha=3, target_modules=names, rank_pattern={"to_k": 4}),
        )
        with activate(adapter.model, adapter):
            expected = answers(pipeline)
        FORMATS[form].write(adapter, folder / "x.safetensors", "float32", False)
        other = PIPELINES[name]()
        other.load_lora_weights(str(folder), weight_name="x.safetensors")
        pairs = zip(answers(other), expected, strict=True)
        return f"outputs differ by {max(float((a - b).abs().max()) for a, b in pairs):.1e} at most"

    return ask


def lycoris(kind: str) -> Callable[[Path], str]:
    def ask(folder: Path) -> str:
        from lycoris import create_lycoris_from_weights
        from safetensors.torch import load_file

        from lorica.methods.dora import DoRA
        from lorica.methods.loha import LoHa
        from lorica.methods.lokr import LoKr
        from pipelines import PIPELINES, answers

        method = {"LoHa": LoHa, "LoKr": LoKr, "DoRA": DoRA}[kind]
        pipeline = PIPELINES["sd"]()
        adapter = stirred(
            pipeline.unet, method(r=2, lora_alpha=3, target_modules=("to_q", "to_v", "ff.net.2"))
        )
        with activate(pipeline.unet, adapter):
            expected = answers(pipeline)[-1]
        FORMATS["kohya"].write(adapter, folder / "x.safetensors", "float32", False)
        held = load_file(folder / "x.safetensors")
        held = {k.replace("lora_unet_", "lycoris_", 1): v for k, v in held.items()}
        other = PIPELINES["sd"]()
        network, _ = create_lycoris_from_weights(1.0, None, other.unet, held)
        network.apply_to()
        return f"outputs differ by {float((answers(other)[-1] - expected).abs().max()):.1e} at most"

    return ask


def mlx(folder: Path) -> str:
    import mlx.core as mx
    import numpy as np
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.utils import load_adapters

    model, adapter, expected = ours()
    FORMATS["mlx"].write(adapter, folder / "x", "float32", False)
    config = model.config.to_dict()
    config |= {"rope_theta": config["rope_parameters"]["rope_theta"], "rope_scaling": None}
    mx.set_default_device(mx.cpu)
    other = Model(ModelArgs.from_dict(config))
    weights = [(k, mx.array(v.numpy())) for k, v in model.state_dict().items()]
    other.load_weights(
        [
            (k, v)
            for k, v in weights
            if not (k == "lm_head.weight" and config["tie_word_embeddings"])
        ]
    )
    load_adapters(other, str(folder / "x"))
    other.eval()
    arch = ARCHITECTURES["llama"]
    ids = arch.sample(model, 2, 7)["input_ids"]
    found = torch.from_numpy(np.array(other(mx.array(ids.numpy())), dtype=np.float32))
    return told(found, expected)


def adapterhub(folder: Path) -> str:
    from safetensors.torch import load_file

    file = ROOT / "scripts" / "adapterhub_fixtures.py"
    spec = importlib.util.spec_from_file_location("adapterhub_fixtures", file)
    assert spec is not None and spec.loader is not None
    hub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub)
    worst = 0.0
    for name in ("lora", "lora-left-out", "houlsby", "pfeiffer-before-norm"):
        model, source = hub.base(), hub.FOLDER / name
        with activate(model, load_adapter(model, source)):
            found = hub.answer(model)
        expected = load_file(source / "answer.safetensors")["logits"]
        worst = max(worst, float((found - expected).abs().max()))
    return (
        f"logits differ by {worst:.1e} at most, in 4 adapters that it wrote; the same bytes again"
    )


def onnx(folder: Path) -> str:
    model, adapter, _ = ours()
    merge(model, adapter)
    return onnx_model.write(model, None, folder / "x", "float32")[0].partition(": ")[2]


CHECKS = (
    Checked("peft", "peft", "reads ours", peft),
    Checked("gguf", "llama-cpp-python", "base and adapter", gguf(None)),
    Checked("gguf", "llama-cpp-python", "base and adapter, Phi 3", gguf_phi3),
    Checked("gguf", "lorica", "read again", own("gguf")),
    Checked("gguf-model", "llama-cpp-python", "merged, F32", gguf("float32")),
    Checked("gguf-model", "llama-cpp-python", "merged, F16", gguf("float16")),
    Checked("gguf-model", "llama-cpp-python", "merged, Q8_0", gguf("q8_0")),
    Checked("kohya", "diffusers", "Stable Diffusion", diffusers("kohya", "sd")),
    Checked("kohya", "diffusers", "SDXL", diffusers("kohya", "sdxl")),
    Checked("kohya", "lycoris-lora", "LoHa", lycoris("LoHa")),
    Checked("kohya", "lycoris-lora", "LoKr", lycoris("LoKr")),
    Checked("kohya", "lycoris-lora", "DoRA", lycoris("DoRA")),
    Checked("diffusers", "diffusers", "Stable Diffusion", diffusers("diffusers", "sd")),
    Checked("diffusers", "diffusers", "SDXL", diffusers("diffusers", "sdxl")),
    Checked("diffusers", "diffusers", "Stable Diffusion 3", diffusers("diffusers", "sd3")),
    Checked("mlx", "mlx-lm", "reads ours", mlx),
    Checked("mlx", "lorica", "read again", own("mlx")),
    Checked("adapterhub", "lorica", "adapters of adapters 1.3.0", adapterhub),
    Checked("vllm", "peft", "reads ours", lambda folder: peft(folder, form="vllm")),
    Checked("onnx", "onnxruntime", "merged", onnx),
)

NOT_HELD = {
    "peft": "methods that PEFT has not (bottlenecks, LoReFT, selections ...), adapters that lie on "
    "others",
    "gguf": "everything but LoRA on linear layers and embeddings; DoRA; modules trained whole; an "
    "embedding that is tied to the output layer; models of other families than Llama, Mistral, "
    "Qwen 2 and 3, Gemma 1 to 3, Phi 2 to 4 and GPT-2",
    "gguf-model": "tokenizers that cut text as none of llama.cpp's; another activation, rotary "
    "type or attention pattern than llama.cpp computes for the family",
    "kohya": "diffusion transformers, whose names differ from tool to tool; modules trained whole; "
    "LoKr with other factorisations than ours; Tucker's form, GLoRA, full differences",
    "diffusers": "biases on B, modules trained whole, LoHa and LoKr (diffusers has neither)",
    "mlx": "models without `model.layers.N`; modules trained whole",
    "adapterhub": "everything but LoRA and bottlenecks on encoders with BERT's names; bottlenecks "
    "behind the norm (`seq_bn` as it is by default), invertible ones, Compacter; its pickles",
    "vllm": "DoRA, ranks above 512, the output layer, modules trained whole",
    "onnx": "what `torch.onnx` cannot export, and whatever onnxruntime answers otherwise",
}
"""Format -> what is refused, with the reason."""

TEXT = """# Formats

`lorica export` writes an adapter, or the model that it makes, for another tool; `lorica convert`
reads an adapter of any format and writes it in any other; `lorica.load_adapter` takes any of them.
What a format cannot hold is refused with the reason, and nothing is left out. Files appear whole or
not at all. No pickle is read: `.bin`, `.pt` and `.ckpt` are refused with the way out.

```bash
lorica export runs/x --format gguf --output x.gguf                     # beside a base in GGUF
lorica export runs/x --format gguf-model --dtype q8_0 --output m.gguf  # merged, with its tokenizer
lorica convert style.safetensors adapters/style --model sd15           # kohya's file to a folder
```

"""

AFTER = """
Logits of llama.cpp differ by more than rounding in float32, because it keeps keys and values in F16
and rounds activations as the weights are; `spread` is the standard deviation of our logits. Tensors
of GGUF files were compared byte by byte with those of llama.cpp's own converters, without one that
differed: adapters for Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3 and Phi 2 and 3, a model in F32,
F16 and Q8_0 for Llama. Adapters of GPT-2 differ on purpose: that converter transposes factors which
are not transposed, and llama.cpp answers as we do with ours.

## How each format keeps what others have

- **One alpha.** GGUF has one `lora_alpha`, and so have kohya's files as their readers take them;
  where layers differ, the rest of their scale goes into B. mlx-lm, AdapterHub and vLLM have one
  rank besides: missing ranks become zeros. Both are exact within rounding, and are told.
- **Tokens in GGUF.** How text is cut is recognised by the regular expression itself, scores of
  SentencePiece pieces are the order of the merges, and whether texts begin with a token or a space
  is found out by encoding one.
- **Rotary halves.** llama.cpp keeps the rows of query and key of Llama and Mistral in pairs; B is
  reordered on the way there, and back.
- **CLIP.** Files have `text_model.` in the names of text encoders, which transformers 5 has no
  more; both are read, and the first is written. diffusers 0.42 loses DoRA's lengths of text
  encoders on reading, and leaves `dora_scale` out of kohya's files, saying so. Of kohya's files it
  reads a text encoder only where `out_proj` is among its layers; `lorica export` says that.
- **No alpha** in kohya's files means the scale 1, as its tools have it. In GGUF it is an error:
  llama.cpp would take the scale 1, and no writer means that.
- **Phi 3.** llama.cpp takes from the *name* of a model, where "phi3" or "phi-3" is in it, that
  blanks behind special tokens belong to them, and then stops at a vocabulary without `</s>`,
  `<unk>`, `<s>` and `<|endoftext|>`. Lorica writes such a name where the tokenizer is like that,
  and no such name otherwise. It takes the rotary factors for long texts as soon as its context is
  longer than `original_max_position_embeddings`, where transformers goes by the text: give it
  `-c` up to that number for short texts.
- **AdapterHub's** own package (adapters 1.3.0 on transformers 4.57) read four folders that Lorica
  wrote, two of LoRA and two of bottlenecks, and one LoRA that began here, and answered as Lorica
  does within 3.6e-07: `scripts/adapterhub_fixtures.py check FOLDER`.
- **vLLM** itself was not run; what it reads of PEFT's config (r, lora_alpha, use_rslora,
  target_modules, no patterns) is what it documents. Nor was Ollama: its folder holds the GGUF file
  that llama.cpp was asked about.

## What a format cannot hold

| format | refused, with the reason |
|---|---|
"""


def main(target: Path) -> None:
    lines = ["| format | what | read | written | dtypes |", "|---|---|---|---|---|"]
    for name, one in {**ADAPTERS, **MODELS}.items():
        readable = name in ("peft", "lorica") or (name in FORMATS and FORMATS[name].read)
        dtypes = ", ".join(one.dtypes)
        lines.append(f"| `{name}` | {one.title} | {'yes' if readable else 'no'} | yes | {dtypes} |")
    lines += ["", "## Asked of the tools", ""]
    lines += ["| format | tool | case | result |", "|---|---|---|---|"]
    for check in CHECKS:
        lines.append(f"| `{check.format}` | {_tool(check)} | {check.what} | {_result(check)} |")
        print(lines[-1], flush=True)
    refused = "".join(f"| `{name}` | {text} |\n" for name, text in NOT_HELD.items())
    made = "\nThis page is written by `python scripts/formats_page.py`.\n"
    target.write_text(TEXT + "\n".join([*lines, AFTER]) + refused + made, encoding="utf-8")


def _tool(check: Checked) -> str:
    if check.package == "lorica":
        return "Lorica"
    try:
        return f"{check.package} {version(check.package)}"
    except ModuleNotFoundError:
        return check.package


def _result(check: Checked) -> str:
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return check.ask(Path(folder))
    except ModuleNotFoundError as error:
        return f"not asked: {error.name} is not installed"


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "docs" / "formats.md")
