"""Where the time goes before the first optimizer step of `lorica train`.

    python benchmarks/startup.py                       # phases, fresh and with cached records
    python benchmarks/startup.py --before ../old/src   # beside the code of another checkout
    python benchmarks/startup.py --records 100000      # only the preparation of so many records

A Llama of 30 M parameters with random weights and 8,000 records of E2E. Every round is a process of
its own; printed are medians of the seconds on the clock and of processor time, which a busy machine
changes less, and the least of the latter. With `--before` the starts of both codes take turns.
Importing torch and transformers (with the model's own code) stands apart, as no training with these
libraries begins without it. Nothing is held out: base scores, where a run has them, come before the
first step too, and take what the model takes.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PHASES = {
    "reading and checking the records": (("prepare", "gather"), ("prepare", "screen_quickly")),
    "encoding the records": (("forecast", "encode"), ("prepare", "encode")),
    "memory: the base without weights": (("forecast", "shadow_of"), ("forecast", "try_out")),
    "memory: a step without numbers": (("forecast", "estimate"),),
    "loading the base": (("prepare", "load_base"),),
    "attaching the adapter": (("prepare", "begin"),),
    "probing the base, plan of the run": (("prepare", "courses_of"), ("prepare", "screen_tokens")),
}
"""What is told -> functions of `lorica.cli` that do it."""


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(then: tuple[float, float]) -> list[float]:
    return [a - b for a, b in zip(now(), then, strict=True)]


def inside(arguments: list[str]) -> None:
    """Run a command line up to its first step, and print the phases as JSON."""
    begun = now()
    for name in ("torch", "transformers", "transformers.models.llama.modeling_llama"):
        import_module(name)
    transformers: Any = import_module("transformers")
    _ = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    found = {"torch and transformers": since(begun)}
    begun = now()
    import_module("lorica.cli.run")
    import_module("lorica.cli.showing")
    found["importing lorica"] = since(begun)
    for phase, functions in PHASES.items():
        found[phase] = [0.0, 0.0]
        for module, function in functions:
            _timed(import_module(f"lorica.cli.{module}"), function, found[phase])
    loop = sys.modules["lorica.train.loop"]

    class Stopping(loop.Engine):
        def step(self, *_: Any) -> Any:
            found["all after the imports"] = since(begun)
            print(json.dumps(found), file=sys.stderr, flush=True)
            os._exit(0)

    loop.Engine = Stopping
    begun = now()
    import_module("lorica.cli").main(arguments)


def _timed(module: Any, name: str, total: list[float]) -> None:
    function = getattr(module, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        then = now()
        try:
            return function(*args, **kwargs)
        finally:
            for index, value in enumerate(since(then)):
                total[index] += value

    setattr(module, name, timed)


def start(model: Path, data: Path, cache: str, source: Path) -> dict[str, list[float]]:
    """The phases of one start of the code in `source`."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", "--model", model, "--data", data, "--output-dir", f"{folder}/run"]
        words += ["--max-steps", 1, "--eval-size", 0, "--dtype", "float32", "--quiet"]
        done = subprocess.run(
            [sys.executable, __file__, "--inside", *map(str, words)],
            capture_output=True,
            text=True,
            env=environment(cache, source),
        )
    lines = [line for line in done.stderr.splitlines() if line.startswith("{")]
    assert lines, done.stderr
    return json.loads(lines[-1])


def environment(cache: str, source: Path) -> dict[str, str]:
    """Modules lie there as bytecode, as those of an installed package do."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    kept["PYTHONPATH"] = os.pathsep.join([str(source), kept.get("PYTHONPATH", "")])
    return {**kept, "XDG_CACHE_HOME": cache, "PYTHONPYCACHEPREFIX": f"{cache}/bytecode"}


def phases(model: Path, data: Path, rounds: int, sources: dict[str, Path]) -> dict[str, Any]:
    """Medians of starts of each code without and with cached records, in turn."""
    runs: dict[str, dict[str, list[dict]]] = {name: {"fresh": [], "cached": []} for name in sources}
    with tempfile.TemporaryDirectory() as cache:
        for source in sources.values():
            start(model, data, cache, source)  # writes the bytecode
        for _ in range(rounds):
            for name, source in sources.items():
                shutil.rmtree(Path(cache) / "lorica", ignore_errors=True)
                runs[name]["fresh"].append(start(model, data, cache, source))
                runs[name]["cached"].append(start(model, data, cache, source))
    return {
        name: {kind: _medians(f"{name}, {kind} records", starts) for kind, starts in made.items()}
        for name, made in runs.items()
    }


def _medians(title: str, starts: list[dict]) -> dict[str, list[float]]:
    """Median and least seconds on the clock and of the processor for each phase."""
    for one in starts:
        own = [one[phase] for phase in ("importing lorica", "all after the imports")]
        one["lorica until the first step"] = [sum(pair) for pair in zip(*own, strict=True)]
    print(f"\n{title.ljust(46)}{'clock'.rjust(9)}{'processor'.rjust(11)}{'least'.rjust(9)}")
    found = {}
    for phase in starts[0]:
        clock, processor = ([one[phase][i] for one in starts] for i in (0, 1))
        both = statistics.median(clock), statistics.median(processor)
        found[phase] = [*both, min(clock), min(processor)]
        print(f"  {phase.ljust(44)}{both[0]:7.2f} s{both[1]:9.2f} s{min(processor):7.2f} s")
    return found


def _encoded_part(model: str, rows: list[dict]) -> list[tuple[list[int], list[int]]]:
    from lorica.base.tokenizer import load_tokenizer
    from lorica.tasks import CausalLM

    task = CausalLM.of(load_tokenizer(model), max_length=512)
    return [(e.input_ids, e.labels) for e in task.encode(rows)]


def preparation(model: Path, rows: list[dict]) -> dict[str, list[float]]:
    """Encoding by the tokenizer's own threads, by processes, and from the cache."""
    from lorica.base.tokenizer import load_tokenizer
    from lorica.data.encoded_cache import EncodedCache
    from lorica.data.read import from_rows
    from lorica.tasks import CausalLM

    records, task = from_rows(rows), CausalLM.of(load_tokenizer(model), max_length=512)
    found = {}
    cores = os.cpu_count() or 1
    parts = [rows[i::cores] for i in range(cores)]
    then = now()
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        made = list(pool.map(_encoded_part, [str(model)] * cores, parts))
    found[f"{cores} processes, their imports included"] = since(then)
    assert sum(map(len, made)) == len(rows)
    del made
    with tempfile.TemporaryDirectory() as folder:
        cache = EncodedCache(Path(folder))
        for name in ("threads of the tokenizer, kept in the cache", "read from the cache"):
            then = now()
            cache.encoded(records, task.encoding(), lambda: task.encode(records))
            found[name] = since(then)
    print(f"\n{len(rows):,} records{'clock'.rjust(41)}{'processor'.rjust(12)}")
    for name, (clock, processor) in found.items():
        print(f"  {name.ljust(44)}{clock:7.2f} s{processor:9.2f} s")
    return found


def main() -> None:
    from jobs import machine, versions, write_result
    from train_speed import e2e_texts, llama30m

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, help="src/ of another checkout, measured in turn")
    parser.add_argument("--records", type=int, help="prepare so many records instead")
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared/data")
    options = parser.parse_args()
    texts = e2e_texts(options.data)
    facts = {"machine": machine(os.cpu_count() or 1), "versions": versions()}
    with tempfile.TemporaryDirectory() as folder:
        model = llama30m(Path(folder) / "model")
        if options.records:
            rows = [
                {**texts[i % len(texts)], "prompt": f"{i}: {texts[i % len(texts)]['prompt']}"}
                for i in range(options.records)
            ]
            found = {"preparation": preparation(model, rows), "records": len(rows)}
            write_result("preparation", {**facts, **found})
            return
        data = Path(folder) / "records.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
        sources = {"after": HERE.parent / "src"}
        if options.before:
            sources = {"before": options.before.resolve(), **sources}
        found = phases(model, data, options.rounds, sources)
    write_result("startup", {**facts, "phases": found})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2:])
    else:
        main()
