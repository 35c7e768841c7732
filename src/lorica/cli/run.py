"""Puts the parts of a training run together: data, base, adapter, task, training, judgement, report."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorica.attach.activate import activate
from lorica.attach.attach import Adapter, attach
from lorica.base.load import EMBEDDED, Base, base_of, load_model
from lorica.cli.material import Material, gather
from lorica.config import Resolved
from lorica.data.encode import Encoded, separator_of
from lorica.data.template import ChatTemplate
from lorica.errors import ConfigError, Interrupted
from lorica.evaluate.compare import Comparison, compare
from lorica.evaluate.score import score
from lorica.records.card import write_card
from lorica.records.folder import RunFolder
from lorica.records.live import display_for
from lorica.records.read import read_manifest
from lorica.records.report import write_report
from lorica.records.watch import Watched
from lorica.records.write import Recorder, Recorders, RunRecorder
from lorica.tasks import CausalLM, Seq2Seq, TextClassification
from lorica.tasks.task import Prediction, Task
from lorica.train.loop import train

ADAPTER = "default"


@dataclass
class Outcome:
    """What a run leaves for whoever started it."""

    folder: Path
    scores: dict[str, Comparison]
    samples: list[dict] = field(default_factory=list)


def execute(
    settings: Resolved,
    *,
    resume: Path | None = None,
    discard: bool = False,
    json: bool = False,
    quiet: bool = False,
    material: Material | None = None,
) -> Outcome:
    """Run everything that `lorica train` does.

    Args:
        settings: of the run.
        resume: the run folder to go on with.
        discard: throw away an earlier run in the output folder.
        json, quiet: how the display speaks.
        material: records that are in memory already; None reads those that the settings name.
    """
    began = time.monotonic()
    say = _speaker(json=json, quiet=quiet)
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    with _folder(settings, resume, discard) as folder:
        for note in settings.notes:
            say(note)
        material = material or gather(settings.run, seed=settings.train.seed)
        for line in material.statements():
            say(line)
        model, adapter, settings = _model(settings, material, say)
        task, examples, settings = _task(settings, material, model, say)
        metrics = list(settings.run.metrics or material.metrics(task.kind))
        before = _predict(model, None, task, material, say, "the base")
        display = display_for(json=json, quiet=quiet)

        def recorder(step: int | None) -> Recorder:
            writer = RunRecorder(folder, config=settings.to_yaml(), resumed_step=step)
            return Watched(Recorders([writer, display]))

        made: list[Recorder] = []
        report = train(
            model,
            {adapter: examples.examples},
            settings.train,
            output_dir=folder,
            eval_data=material.held_out,
            task=task,
            recorder=lambda step: made.append(recorder(step)) or made[0],
            manifest=_manifest(settings, material, task, examples, folder.path),
            resume=resume is not None,
        )
        after = _predict(model, adapter, task, material, say, "the tuned model")
        scores = compare(before, after, metrics) if before else {}
        samples = _samples(before, after, task, settings.run.num_samples)
        folder.write_samples(samples)
        resources = {**report.resources, "total_seconds": time.monotonic() - began}
        made[0].finish(
            {
                "status": "finished",
                "scores": {name: asdict(found) for name, found in scores.items()},
                "training": report.summary(),
                "resources": resources,
            }
        )
        _dress(folder, task)
    return Outcome(folder.path, scores, samples)


def _speaker(*, json: bool, quiet: bool) -> Callable[[str], None]:
    """Says what happens before training, where that is wanted; on standard error, so that output stays clean."""
    if json or quiet:
        return lambda text: None
    return lambda text: print(text, file=sys.stderr, flush=True)


def _folder(settings: Resolved, resume: Path | None, discard: bool) -> RunFolder:
    if resume is not None:
        return RunFolder.open(resume)
    path = settings.run.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}"
    return RunFolder.create(path, replace=discard)


def _model(
    settings: Resolved, material: Material, say: Callable[[str], None]
) -> tuple[nn.Module, Adapter, Resolved]:
    run = settings.run
    kind = material.task(run.task, run.model)
    model = load_model(
        run.model,
        task=kind,
        dtype=settings.train.dtype,
        labels=material.labels if kind == "text-classification" else (),
        revision=run.revision or "main",
        trust_remote_code=run.trust_remote_code,
    )
    base = base_of(model)
    assert base is not None
    for note in base.notes:
        say(note)
    if base.new_modules and not settings.method.modules_to_save:
        settings = settings.decided(
            "modules_to_save", base.new_modules, "the base has no weights for them"
        )
    adapter = attach(model, settings.method, name=ADAPTER, seed=settings.train.seed)
    share = adapter.num_parameters / sum(p.numel() for p in model.parameters())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    say(f"{type(model).__name__} in {dtype}, {kind}; {adapter.reason}")
    say(
        f"{settings.method.kind}: {adapter.num_parameters:,} parameters train in {len(adapter.slots)} places"
        f" ({share:.2%} of the base); r={settings.method.r}, scale {settings.method.scale:g}"
    )
    return model, adapter, settings


def _task(
    settings: Resolved, material: Material, model: nn.Module, say: Callable[[str], None]
) -> tuple[Task, Encoded, Resolved]:
    """The task, the training records encoded, and the settings with what the data decides."""
    base = base_of(model)
    assert base is not None
    if (
        base.task == "causal-lm"
        and material.train.format == "prompt"
        and settings.run.separator is None
    ):
        separator = separator_of(material.train.rows)
        reason = (
            "no white space parts prompt and completion"
            if separator
            else "the data parts them itself"
        )
        settings = settings.decided("separator", separator, reason)
    task = make_task(settings, base)
    examples = task.encode(material.train)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = max(len(e) for e in examples)
    if settings.train.max_length is None and limit and longest > limit:
        settings = settings.decided(
            "max_length",
            int(limit),
            f"the model's positions; the longest record has {longest} tokens",
        )
        task = make_task(settings, base)
        examples = task.encode(material.train)
    say(examples.statement())
    return task, examples, settings


def make_task(settings: Resolved, base: Base) -> Task:
    """The task of a base with the settings of a run."""
    run, max_length = settings.run, settings.train.max_length
    if base.task == "text-classification":
        return TextClassification(base.tokenizer, base.labels, max_length)
    if base.task == "seq2seq":
        return Seq2Seq(base.tokenizer, max_length, run.max_new_tokens)
    template = None
    if run.chat_template:
        source = Path(run.chat_template).read_text(encoding="utf-8")
        template = replace(ChatTemplate.of(base.tokenizer), source=source, is_fallback=False)
    return CausalLM.of(
        base.tokenizer,
        max_length=max_length,
        train_on=run.train_on,
        add_bos=run.add_bos,
        separator=run.separator or "",
        template=template,
        packing=settings.train.packing,
        max_new_tokens=run.max_new_tokens,
    )


def _predict(
    model: nn.Module,
    adapter: Adapter | None,
    task: Task,
    material: Material,
    say: Callable[[str], None],
    who: str,
) -> list[Prediction]:
    if not material.test:
        return []
    say(f"scoring {who} on {len(material.test):,} records ...")
    with activate(model, adapter):
        return task.predict(model, material.test, generate=material.generates)


def _samples(
    before: Sequence[Prediction], after: Sequence[Prediction], task: Task, number: int
) -> list[dict]:
    labels = getattr(task, "labels", ())
    shown = []
    for old, new in list(zip(before, after, strict=True))[:number]:
        if old.output is None:
            break
        shown.append(
            {
                "input": _input_text(old.record),
                "before": _output_text(old.output, labels),
                "after": _output_text(new.output, labels),
                "references": [_output_text(r, labels) for r in new.references],
            }
        )
    return shown


def _input_text(record: dict) -> str:
    if "messages" in record:
        return "\n".join(f"{m['role']}: {m['content']}" for m in record["messages"][:-1])
    text = str(record.get("prompt", record.get("source", record.get("text", ""))))
    return f"{text}\n{record['text_pair']}" if record.get("text_pair") else text


def _output_text(output: Any, labels: Sequence[str]) -> str:
    return labels[output] if isinstance(output, int) and output < len(labels) else str(output)


def _manifest(
    settings: Resolved, material: Material, task: Task, examples: Encoded, path: Path
) -> dict:
    lengths = sorted(len(e) for e in examples)
    trained = {
        "path": settings.run.data,
        "num_records": len(material.train),
        "digest": material.train.digest,
        "format": material.train.format,
        "statement": material.train.statement,
        "num_tokens": sum(lengths),
        "num_trained_tokens": examples.num_trained_tokens,
        "length_percentiles": {
            "p50": lengths[len(lengths) // 2],
            "p95": lengths[int(len(lengths) * 0.95)],
            "max": lengths[-1],
        },
        "num_truncated": examples.num_truncated,
        "example": _marked(task, examples[0]),
    }
    others = {
        name: {
            "num_records": len(rows),
            "digest": rows.digest,
            "format": rows.format,
            "statement": rows.statement,
        }
        for name, rows in (("eval", material.valid), ("test", material.scored))
        if rows is not None
    }
    return {
        "data": {"train": trained, **others},
        "run": {
            "path": str(path),
            "command": "train",
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        },
    }


def _marked(task: Task, example: Any) -> list[list]:
    """A record as the model sees it: stretches of text, each trained or not."""
    tokenizer = task.tokenizer  # type: ignore[attr-defined]
    if len(example.labels) != len(
        example.input_ids
    ):  # not token by token: a class or a target text
        return [[tokenizer.decode(example.input_ids), False]]
    stretches: list[tuple[list[int], bool]] = []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if not stretches or stretches[-1][1] is not (label != -100):
            stretches.append(([], label != -100))
        stretches[-1][0].append(token)
    return [[tokenizer.decode(ids), trained] for ids, trained in stretches]


def _dress(folder: RunFolder, task: Task) -> None:
    """Tokenizer, chat template and model card into the adapter's folder; then the page."""
    target = folder.adapter()
    tokenizer = task.tokenizer  # type: ignore[attr-defined]
    tokenizer.save_pretrained(target)
    write_card(target, read_manifest(folder.manifest), adapter=ADAPTER)
    write_report(folder.path)


def scores_table(
    predictions: Sequence[Prediction], metrics: Sequence[str]
) -> list[tuple[str, str, str]]:
    """Rows of metric, value and interval."""
    rows = []
    for name, found in score(predictions, metrics).items():
        interval = (
            ""
            if found.low is None or found.high is None
            else f"{found.low:.4g} to {found.high:.4g}"
        )
        rows.append((name, f"{found.value:.4g}", interval))
    return rows


__all__ = [
    "EMBEDDED",
    "ConfigError",
    "Interrupted",
    "Outcome",
    "execute",
    "make_task",
    "scores_table",
]
