"""docs/qlora.md from benchmarks/results/qlora.json.

python benchmarks/qlora_page.py
"""

import json
import statistics
from pathlib import Path

from jobs import RESULTS
from scipy.stats import t

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
PEERS = ("peft+bitsandbytes", "peft+bitsandbytes, autocast")
ORDER = (("30M", "350M", "1B"), ("one", "mixed", "full"), ("float32", "bfloat16"))
"""Shapes, batches and arithmetic of the table of steps."""
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
  refused. On CPUs with AVX-512 and bfloat16 products bitsandbytes packs 4-bit layers anew at a pass
  without gradients, and no gradient goes through them from then on: adapted bases are kept from
  that, and layers that were packed so before are refused, as are those that its kernel misreads
  (some rows that are no multiple of a block, such as 160 numbers). Lorica reads the same folders by
  itself.
- GPTQ, AWQ and HQQ are refused with what is missing.

## How it computes

Forward and input gradient unpack one layer into a buffer that all layers share. Nothing unpacked is
kept for the backward pass of LoRA and whatever else adds to a layer's output; methods that multiply
with the weight itself (HiRA, and DoRA with `dora_detach_norm: false`) keep it for the time of a
step. Unpacking goes by a table from a byte to its two numbers; on a CPU with AVX-512 by the kernel
of bitsandbytes 0.50 where that is installed, called directly and to the same bits, in a third to a
fifth of the time.

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


def place(name: str) -> list[int]:
    """Where a row stands in the table of steps, in whatever order they were measured."""
    return [words.index(word) for words, word in zip(ORDER, name.split(", "), strict=True)]


def step(name: str, sides: dict[str, dict]) -> str:
    """A row of the table of steps."""
    own = sides["lorica"]
    peers = {side: row for side, row in sides.items() if side != "lorica"}
    best = min(peers.values(), key=lambda row: row["seconds"])
    seconds = [f"{peers[side]['seconds']:.2f}" if side in peers else "" for side in PEERS]
    return (
        f"| {name} | {own['seconds']:.2f} | {' | '.join(seconds)} | "
        f"{best['seconds'] / own['seconds']:.2f} | {own['peak'] / 2**30:.2f} | "
        f"{best['peak'] / 2**30:.2f} |"
    )


def accuracy(found: dict[str, list[float]]) -> list[str]:
    """Means over the seeds, with intervals of Student's t, beside each seed's run in float32."""
    exact, number = found["float32"], len(found["float32"])
    lines = [
        "",
        "MiniLM on SST-2, LoRA of rank 8 and the head, 100 steps of 32 records, accuracy on the "
        f"872 development records, {number} seeds; mean with the 95 % interval of Student's t, and "
        "the same of the differences to float32 with the same seed.",
        "",
        "| base | accuracy | minus float32 | every seed |",
        "|---|---|---|---|",
    ]
    for word, values in found.items():
        apart = [a - b for a, b in zip(values, exact, strict=True)]
        every = ", ".join(f"{value:.3f}" for value in values)
        beside = "" if word == "float32" else interval(apart)
        lines.append(f"| {word} | {interval(values)} | {beside} | {every} |")
    return lines


def interval(values: list[float]) -> str:
    """Mean and half of the 95 % interval."""
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.4f} ± {half:.4f}"


def page() -> str:
    """The text of docs/qlora.md, from the figures that there are."""
    found = json.loads((RESULTS / "qlora.json").read_text(encoding="utf-8"))
    packages = ", ".join(f"{name} {found['versions'][name]}" for name in PACKAGES)
    lines = [HEAD, "## Figures", ""]
    lines += [
        f"{found['machine']['cpu']} with {found['kernels']}, {found['threads']} thread each, other "
        f"work beside it; {packages}. Processor time, least of a few interleaved steps: take the "
        "ratios, not the seconds. Not measured on a GPU.",
        "",
        "| stored as | bits per number of a quantized layer |",
        "|---|---|",
        *(f"| {word} | {bits:.3f} |" for word, bits in found["bits"].items()),
    ]
    if "steps" in found:
        lines += [
            "",
            "One step of LoRA, rank 8 on all linear layers, on the very same nf4 bytes; 8 records "
            "of 96 tokens (*full*) or 12 to 96 (*mixed*), or a single one of 96 (*one*); half of "
            "each is trained. PEFT pads, Lorica packs: *full* and *one* are what kernels and "
            "engine bring on equal work, *mixed* is that and the packing. In bfloat16 PEFT keeps "
            "factors in float32 and multiplies them so, or under autocast in bfloat16; *times as "
            "fast* is beside the faster of both. Peak: of the whole process, of PEFT's faster way.",
            "",
            "| shape, records, arithmetic | Lorica, s | PEFT + bnb, s | under autocast, s | "
            "times as fast | Lorica, GiB | PEFT + bnb, GiB |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [step(name, found["steps"][name]) for name in sorted(found["steps"], key=place)]
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
        lines += accuracy(found["sst2"])
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written {PAGE}")
