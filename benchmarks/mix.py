"""Mixing, switching and merging adapters, beside PEFT and diffusers.

    python benchmarks/mix.py errors       # how far every way to mix is from the exact weighted sum
    python benchmarks/mix.py switch       # 1 to 1,000 resident adapters: load, switch, weights
    python benchmarks/mix.py pipelines    # the same for image adapters, beside diffusers
    python benchmarks/mix.py merge        # a base of 1 GB: processor time and peak memory
    python benchmarks/mix.py spectra      # docs/images/spectra.svg: the change of a full fine-tune
    python benchmarks/mix_page.py         # docs/mix.md

Figures go into benchmarks/results/mix.json. Times are of the processor, so that what else a machine
does counts less; every time is the least of several rounds, in which both sides take turns.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

RESULTS = Path(__file__).parent / "results" / "mix.json"
WEIGHTS = {"a": 0.7, "b": 0.3}
RANK, DENSITY = 8, 0.5
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def llama(hidden: int = 128, layers: int = 2, **more: Any) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, head_dim=hidden // 4, **more,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def write_adapters(folder: Path, *, alike: bool) -> None:
    """Two adapters as training leaves them: A near its start, B small; alike: of one start."""
    from lorica import LoRA, attach, detach, save_adapter

    model = llama()
    for number, name in enumerate(WEIGHTS):
        method = LoRA(r=RANK, lora_alpha=16, target_modules=TARGETS)
        adapter = attach(model, method, name=name, seed=0 if alike else number)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for slot in adapter.slots.values():
                for key, size in (("A", 0.005), ("B", 0.02)):
                    tensor = slot.tensors[key]
                    tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=size)
        save_adapter(adapter, folder / name)
        detach(model, name)


# --- errors ---------------------------------------------------------------------------------------

HERE: dict[str, dict[str, Any]] = {
    "cat": {},
    "task_arithmetic": {},
    "svd": {"r": RANK},
    "slerp": {},
    "linear": {},
    "ties": {"density": DENSITY, "r": RANK},
    "dare_linear": {"density": DENSITY, "r": RANK},
    "dare_ties": {"density": DENSITY, "r": RANK},
    "magnitude_prune": {"density": DENSITY, "r": RANK},
}
THERE: dict[str, dict[str, Any]] = {
    "cat": {},
    "svd": {"svd_rank": RANK},
    "linear": {},
    **{n: {"density": DENSITY} for n in ("ties", "dare_linear", "dare_ties", "magnitude_prune")},
    **{
        f"{name}_svd": {"density": DENSITY, "svd_rank": RANK}
        for name in ("ties", "dare_linear", "dare_ties", "magnitude_prune")
    },
}


def errors() -> dict[str, Any]:
    found: dict[str, Any] = {"rank": RANK, "density": DENSITY, "weights": WEIGHTS}
    for case, alike in (("apart", False), ("alike", True)):
        with tempfile.TemporaryDirectory() as name:
            write_adapters(Path(name), alike=alike)
            exact = _exact(Path(name))
            found[case] = {
                "lorica": {way: _here(Path(name), way, exact) for way in HERE},
                "peft": {way: _there(Path(name), way, exact) for way in THERE},
            }
            found[case]["lorica"]["activate"] = _at_run_time(Path(name), exact)
    return found


def _deltas(model: Any, name: str) -> dict[str, torch.Tensor]:
    from lorica import adapters

    return {
        path: slot.method.delta(
            {key: t.detach().double() for key, t in slot.tensors.items()},
            model.get_submodule(path).__dict__["_lorica"].layer,
        )
        for path, slot in adapters(model)[name].slots.items()
    }


def _loaded(folder: Path) -> Any:
    from lorica import load_adapter

    model = llama()
    for name in WEIGHTS:
        load_adapter(model, folder / name, name=name)
    return model


def _exact(folder: Path) -> dict[str, torch.Tensor]:
    model = _loaded(folder)
    parts = {name: _deltas(model, name) for name in WEIGHTS}
    return {p: sum(w * parts[n][p] for n, w in WEIGHTS.items()) for p in parts["a"]}  # type: ignore[misc]


def _off(made: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Relative distance from the exact sum over all layers."""
    lost = sum(float((made[path] - exact[path]).square().sum()) for path in exact)
    return (lost / sum(float(one.square().sum()) for one in exact.values())) ** 0.5


def _here(folder: Path, way: str, exact: dict[str, torch.Tensor]) -> float:
    from lorica import mix

    model = _loaded(folder)
    mix(model, WEIGHTS, name="m", method=way, **HERE[way])
    return _off(_deltas(model, "m"), exact)


def _there(folder: Path, way: str, exact: dict[str, torch.Tensor]) -> float:
    import peft

    torch.manual_seed(0)
    model = peft.PeftModel.from_pretrained(llama(), folder / "a", adapter_name="a")
    model.load_adapter(folder / "b", adapter_name="b")
    model.add_weighted_adapter([*WEIGHTS], [*WEIGHTS.values()], "m", way, **THERE[way])
    layers = {path: model.get_submodule(f"base_model.model.{path}") for path in exact}
    return _off({p: one.get_delta_weight("m").double() for p, one in layers.items()}, exact)


def _at_run_time(folder: Path, exact: dict[str, torch.Tensor]) -> float:
    """Of the outputs of the layers, for inputs drawn at random."""
    from lorica import activate

    model, made, wanted = _loaded(folder), {}, {}
    for path, delta in exact.items():
        layer = model.get_submodule(path)
        x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            with activate(model, None):
                bare = layer(x).double()
            with activate(model, WEIGHTS):
                made[path] = layer(x).double()
        wanted[path] = bare + x.double() @ delta.T
    return _off(made, wanted)


# --- switching ------------------------------------------------------------------------------------


def switch(counts: list[int], seconds: float) -> dict[str, Any]:
    """For each number of adapters: processor seconds to load the last ones, milliseconds to switch
    and to change weights. PEFT gets no more than `seconds` for loading all.
    """
    found: dict[str, Any] = {"lorica": {}, "peft": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "one"
        _one(folder)
        for side in (_lorica_side, _peft_side):
            side(folder, counts, seconds, found)
    return found


def _one(folder: Path) -> None:
    from lorica import LoRA, attach, save_adapter

    adapter = attach(llama(), LoRA(r=4, target_modules=["q_proj", "v_proj"]), name="one")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    save_adapter(adapter, folder)


def _least(call: Callable[[int], Any], rounds: int = 15) -> float:
    """Milliseconds of the processor."""
    best = float("inf")
    for number in range(rounds):
        begun = time.process_time()
        call(number)
        best = min(best, time.process_time() - begun)
    return 1000 * best


def _lorica_side(folder: Path, counts: list[int], seconds: float, found: dict[str, Any]) -> None:
    from lorica import activate, load_adapter

    model, loaded, ids = llama(), 0, torch.randint(512, (1, 16))
    begun = time.process_time()
    for count in counts:
        for number in range(loaded, count):
            load_adapter(model, folder, name=f"n{number}")
        loaded, total = count, time.process_time() - begun

        def mixture(number: int, count: int = count) -> dict[str, float]:
            return {f"n{count - 1}": 0.1 * number, "n0": 0.5}

        with torch.no_grad():
            row = {
                "load_all_s": total,
                "switch_ms": _least(lambda n, c=count: activate(model, f"n{(n * 7) % c}")),
                "change_weights_ms": _least(lambda n: activate(model, mixture(n))),
                "forward_ms": _least(lambda n: model(ids)),
            }
        found["lorica"][count] = row
        print("lorica", count, row, flush=True)


def _peft_side(folder: Path, counts: list[int], seconds: float, found: dict[str, Any]) -> None:
    import peft

    ids = torch.randint(512, (1, 16))
    begun = time.process_time()
    model = peft.PeftModel.from_pretrained(llama(), folder, adapter_name="n0")
    loaded = 1
    for count in counts:
        while loaded < count and time.process_time() - begun < seconds:
            model.load_adapter(folder, adapter_name=f"n{loaded}")
            loaded += 1
        total = time.process_time() - begun
        if loaded < count:
            found["peft"][count] = {"stopped_at": loaded, "after_s": total}
            print("peft", count, found["peft"][count], flush=True)
            break
        layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]

        def mixture(number: int, layers: Any = layers, count: int = count) -> None:
            model.base_model.set_adapter([*dict.fromkeys([f"n{count - 1}", "n0"])])
            for layer in layers:
                layer.set_scale(f"n{count - 1}", 0.1 * number)
                layer.set_scale("n0", 0.5)

        with torch.no_grad():
            row = {
                "load_all_s": total,
                "switch_ms": _least(lambda n, c=count: model.set_adapter(f"n{(n * 7) % c}")),
                "change_weights_ms": _least(mixture),
                "forward_ms": _least(lambda n: model(ids)),
            }
        found["peft"][count] = row
        print("peft", count, row, flush=True)


# --- merging --------------------------------------------------------------------------------------

SIDES = {
    "lorica, from disk to disk": """
from lorica.base.empty import empty_model
from lorica.base.locate import weight_files
from lorica import load_adapter
from lorica.mix.on_disk import merge_on_disk, plan_on_disk
model = empty_model(base)
load_adapter(model, adapter, name="a")
out.mkdir()
merge_on_disk(plan_on_disk(model, {"a": 1.0}, weight_files(base)), out)
model.config.save_pretrained(out)
""",
    "lorica, in memory": """
import transformers
from lorica import load_adapter, merge
from lorica.files.whole import save_merged
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
merge(model, load_adapter(model, adapter, name="a"), keep=False)
save_merged(model, out)
""",
    "peft": """
import transformers, peft
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
model = peft.PeftModel.from_pretrained(model, adapter)
model.merge_and_unload().save_pretrained(out)
""",
}
FRAME = """
import json, sys, time, warnings
from pathlib import Path
import torch, transformers, peft, lorica, lorica.mix
warnings.simplefilter("ignore")
transformers.utils.logging.disable_progress_bar()
base, adapter, out = map(Path, sys.argv[1:])
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before, begun = peak(), time.process_time()
{body}
print(json.dumps({{"seconds": time.process_time() - begun, "peak": peak() - before}}))
"""


def merge(rounds: int, hidden: int, layers: int) -> dict[str, Any]:
    from lorica import LoRA, attach, save_adapter

    found: dict[str, Any] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = llama(hidden, layers)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        model.save_pretrained(folder / "base", max_shard_size="64MB")
        method = LoRA(r=16, target_modules="all-linear", init_lora_weights="random")
        save_adapter(attach(model, method, name="a"), folder / "adapter")
        del model
        for _ in range(rounds):
            for side, body in SIDES.items():
                program = FRAME.format(body=body)
                paths = [str(folder / part) for part in ("base", "adapter", "out")]
                done = subprocess.run(
                    [sys.executable, "-c", program, *paths], capture_output=True, text=True
                )
                if done.returncode:
                    raise RuntimeError(done.stderr[-2000:])
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
                shutil.rmtree(folder / "out")
                print(side, found[side][-1], flush=True)
    return {"bytes": size, "sides": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("errors", "switch", "pipelines", "merge", "spectra"))
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--seconds", type=float, default=900, help="for PEFT to load its adapters")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=18)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.part == "errors":
        found = errors()
    elif given.part == "switch":
        found = switch(given.counts, given.seconds)
    elif given.part == "pipelines":
        from mix_pipelines import pipelines

        found = pipelines([count for count in given.counts if count <= 100], _least)
    elif given.part == "spectra":
        from mix_spectra import spectra

        found = spectra()
    else:
        found = merge(given.rounds, given.hidden, given.layers)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[given.part] = found
    known["versions"] = {"torch": torch.__version__, "transformers": hf.__version__}
    RESULTS.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
