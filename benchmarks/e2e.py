"""E2E (restaurant facts -> sentence) on real pretrained weights: Lorica beside PEFT + Trainer.

    python benchmarks/e2e.py --seeds 0 1 2            # both sides, scores on the official test set
    python benchmarks/e2e.py --max-steps 20 --name e2e-trial

The base is a Llama of 260 K parameters that was pretrained on children's stories; it has never seen
a restaurant. Every train pair is a record; the test set is scored per input (630) against all of
its references (4,693), as the challenge does.

The base was pretrained on stories with <s> between them and never saw </s>: that row of its tied
embedding equals those of all unused tokens, so that no adapter can learn to say it. Texts end with
<s> here, on both sides.
"""

from pathlib import Path

from jobs import Job, read_table, write_lines
from judge import arguments, run

METRICS = ["bleu", "chrf", "rouge_l", "loss"]


def records(path: Path) -> list[dict]:
    # The blank belongs to the completion: it parts the two, and the tokenizer has it in its words.
    return [
        {"prompt": row["mr"], "completion": " " + " ".join(row["ref"].split())}
        for row in read_table(path, delimiter=",")
    ]


def by_input(rows: list[dict]) -> list[dict]:
    """One record per input, with all of its references; the likelihood is that of the first."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row["prompt"], []).append(row["completion"].strip())
    return [
        {"prompt": prompt, "completion": " " + references[0], "references": references}
        for prompt, references in groups.items()
    ]


def main() -> None:
    options = arguments(__doc__).parse_args()
    folder = options.output_dir / "e2e"
    train = records(options.data / "e2e_nlg/trainset.csv")
    test = by_input(records(options.data / "e2e_nlg/testset_w_refs.csv"))
    job = Job(
        task="causal-lm",
        model=str(options.data / "models/stories260k"),
        train=str(write_lines(folder / "train.jsonl", train)),
        test=str(write_lines(folder / "test.jsonl", test)),
        output_dir=str(folder),
        r=16,
        lora_alpha=32,
        learning_rate=1e-2,
        warmup_ratio=0.06,
        batch_size=16,
        max_steps=400,
        max_length=512,
        max_new_tokens=150,
        eos_token="<s>",
    )
    run("e2e", job, options, metrics=METRICS, title="E2E on stories260k (Llama, 260 K parameters)")


if __name__ == "__main__":
    main()
