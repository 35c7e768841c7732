"""docs/qlora.md from benchmarks/results/qlora.json.

python benchmarks/qlora_page.py
"""

import json
import statistics
from pathlib import Path

from jobs import RESULTS

PAGE = Path(__file__).parents[1] / "docs/qlora.md"

HEAD = """# Quantized bases (QLoRA)

A base in 4 or 8 bits takes a quarter or half of the memory of bfloat16; the adapter trains beside
it as always. This page is written by `python benchmarks/qlora_page.py`; do not edit it by hand.

```bash
lorica train --model PATH --data FILE --quantize nf4        # or fp4, int8, --load-in-4bit
lorica plan  --model PATH --data FILE --quantize nf4        # what it takes of memory
lorica merge RUN --output-dir FOLDER                        # into plain numbers
lorica merge RUN --output-dir FOLDER --requantize --force   # stays quantized; tells the damage
```
```python
from lorica.files.quantized import save_base

model = lorica.load_model("PATH", quantize="nf4")
save_base(model, "PATH-nf4")  # lorica.load_model("PATH-nf4") takes seconds
```

## How it is stored

- `nf4`, `fp4`: blocks of 64 numbers with a scale each, the scales in 8 bits (double quantization):
  bit for bit what bitsandbytes 0.50 makes on a CPU, packed bytes, scales and state dict. Folders
  are read by transformers with bitsandbytes, and those that it writes are read here without it.
  Its CUDA kernel rounds a few in a thousand scales to the neighbouring place. In layers of two
  million numbers and more its mean of the scales depends on the number of threads; here it does
  not, so the last bit of that one number may differ.
- `int8`: a scale for each output, as bitsandbytes' `int8_vectorwise_quant` makes it.
- Quantized are plain linear layers with a weight of their own. Embeddings, norms and the output
  head stay in the dtype of the run (`load_model(quantize_head=True)` takes the head too). Layers
  of another class, such as GPT-2's Conv1D, are left alone; a base without any layer to quantize is
  refused.
- While a base is loaded, each tensor is quantized as soon as it is read, so that one at most lies
  in memory in full. It is quantized from the numbers of the files, whatever dtype is computed
  with, so a base is the same bytes on every machine, and an adapter that was made on it in bfloat16
  is at home on it in float32. Weights that are NaN or infinite are refused by name.
- A base that transformers loads through bitsandbytes or torchao can be adapted; merging into it is
  refused. GPTQ, AWQ and HQQ are refused with what is missing.

## How it computes

Forward and input gradient unpack one layer into a buffer that all layers share. Nothing unpacked is
kept for the backward pass of LoRA and whatever else adds to a layer's output; methods that multiply
with the weight itself (HiRA, and DoRA with `dora_detach_norm: false`) keep it for the time of a
step. Unpacking goes by a table from a byte to its two numbers.

On CUDA, in half precision, a Triton kernel unpacks nf4 and fp4 inside the product where that costs
less than writing the weight and reading it again: up to about 280 rows, such as tokens that are
generated, by an estimate (`costs` in `ops/triton/four_bit.py`) that **was not measured on a GPU**.
As the number of rows decides, an adapter beside others may have other last bits there than alone;
on a CPU they are the same.

An adapter made on a quantized base records that, and `lorica eval`, `chat` and `merge` load its
base so. `init_lora_weights: loftq` reads the weights as they were before from the base's files and
begins with what quantization took away, as far as its rank holds it; the base is not touched.
`pissa` and `olora` begin as the quantized base does. Choices by gradients (`lora_ga`, `sparse` by
relevance) need plain weights and are refused.

## Merging

The adapter was made for the rounded weights, and is merged into those: into plain numbers, which
`lorica verify` finds to be the same. With `--requantize` the sum is rounded again, by up to a step
of the quantizer, however small the update: on the real small Llama, after 40 steps on E2E records,
the weights were off by 105 % of the update, the logits by 76 % of what the adapter does to them.
That is told, layer by layer, before anything is written; it is refused without `--force`, and
`lorica verify` then says that it is not the same model. Keep the adapter apart where memory is
short.
"""


def page() -> str:
    """The text of docs/qlora.md, from the figures that there are."""
    found = json.loads((RESULTS / "qlora.json").read_text(encoding="utf-8"))
    lines = [HEAD, "## Figures", ""]
    lines += [
        "Measured on two CPU cores that others used at the same time, "
        f"{found['threads']} thread each: processor time, least of a few interleaved steps. Take "
        "the ratios, not the seconds. The accuracy on SST-2 is not measured yet.",
        "",
        "| stored as | bits per number of a quantized layer |",
        "|---|---|",
        *(f"| {word} | {bits:.3f} |" for word, bits in found["bits"].items()),
    ]
    if "steps" in found:
        lines += [
            "",
            "One step of LoRA, rank 8 on all linear layers, on the very same nf4 bytes, float32 "
            "arithmetic; 8 records of 96 tokens (*full*) or 12 to 96 (*mixed*), or a single one of "
            "96 (*one*); half of each is trained. PEFT pads, Lorica packs: *full* and *one* are "
            "what kernels and engine bring on equal work, *mixed* is that and the packing. Peak: "
            "of the whole process.",
            "",
            "| shape | Lorica, s | PEFT + bnb, s | times as fast | Lorica, GiB | PEFT + bnb, GiB |",
            "|---|---|---|---|---|---|",
        ]
        for name, sides in found["steps"].items():
            own, peer = sides["lorica"], sides["peft+bitsandbytes"]
            lines.append(
                f"| {name} | {own['seconds']:.2f} | {peer['seconds']:.2f} | "
                f"{peer['seconds'] / own['seconds']:.2f} | {own['peak'] / 2**30:.2f} | "
                f"{peer['peak'] / 2**30:.2f} |"
            )
    if "7b" in found:
        own = found["7b"]
        lines += [
            "",
            f"A Llama of {own['parameters']:,} random weights, made and quantized layer by layer, "
            f"and one step of {own['tokens']} tokens: peak of the process "
            f"{own['peak'] / 2**30:.2f} GiB, {own['seconds']:.0f} s for the step.",
        ]
    if "quality" in found:
        lines += ["", "| perplexity of the real small Llama (260 k) on 60 stories | |", "|---|---|"]
        lines += [f"| {word} | {value:.4f} |" for word, value in found["quality"].items()]
    if "sst2" in found:
        lines += ["", "| base | accuracy of MiniLM on SST-2, median and all seeds |", "|---|---|"]
        for word, values in found["sst2"].items():
            every = ", ".join(f"{value:.3f}" for value in values)
            lines.append(f"| {word} | {statistics.median(values):.3f} ({every}) |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written {PAGE}")
