"""Writes a merged model: from disk to disk where that is possible, and only what was verified."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from lorica.base.empty import empty_model
from lorica.base.known import known
from lorica.base.load import load_model
from lorica.base.locate import weight_files
from lorica.base.quantize import quantization_of
from lorica.cli.asking import precision_of, prompts_of
from lorica.cli.opening import Subject, adapter_folder, open_subject
from lorica.cli.voice import Voice
from lorica.errors import BaseModelError, CheckRefused
from lorica.evaluate.requantized import how_far
from lorica.evaluate.verify import Expected, Verification, expect, judge
from lorica.files.adapter import load_adapter
from lorica.files.folder import new_folder
from lorica.files.quantized import save_base
from lorica.files.whole import FACTS, save_merged
from lorica.mix.merging import merge
from lorica.mix.on_disk import DiskPlan, merge_on_disk, plan_on_disk
from lorica.mix.report import MergeReport
from lorica.records.atomic import write_file

REPORT = "merge_report.json"
UNPACKED = (
    "the adapter was made for the quantized weights, so it is merged into their numbers, not into "
    "those that the base had before; the model is written in plain numbers"
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Order:
    """What `lorica merge` was told."""

    adapter: str
    output: Path
    base: str | None
    dtype: str
    weight: float
    force: bool
    overwrite: bool
    verify: bool
    requantize: bool = False


@dataclass(frozen=True)
class Written:
    """What was written."""

    report: MergeReport
    kind: str
    facts: dict[str, Any]
    verified: Verification | None


def write_merged(order: Order, voice: Voice) -> Written:
    """Merge, write, and verify before the folder appears under its name. What is quantized again
    cannot answer the same; how far it is off is told before anything is written.

    Raises:
        CheckRefused: the new model does not answer as base and adapter do.
    """
    with voice.work(f"loading {order.adapter}"):
        opened = open_subject(order.adapter, base=order.base, dtype=order.dtype)
    assert opened.adapter is not None
    mixture = {opened.adapter.name: order.weight}
    expected, moved = None, None
    if order.requantize:
        moved = how_far(opened.model, mixture)
        for line in str(moved).splitlines():
            voice.say(line)
    elif order.verify:
        with voice.work("asking base and adapter"), _widened(opened.model):
            expected = expect(opened.model, mixture, prompts_of(opened, None))
    logging.disable_progress_bar()  # of the writing, which would come among the lines below
    plan = _plan(order, opened)
    kind, asked = opened.task.kind, _asked(opened)
    with (
        voice.work("merging"),
        new_folder(
            order.output, marker="config.json", overwrite=order.overwrite, error=BaseModelError
        ) as temporary,
    ):
        if isinstance(plan, str):
            voice.say(f"the base is merged in memory: {plan}")
            if quantization_of(opened.model) is not None and not order.requantize:
                voice.say(UNPACKED)
            report = merge(
                opened.model, mixture, force=order.force, keep=False, requantize=order.requantize
            )
            temporary.rmdir()
            if order.requantize:
                save_base(opened.model, temporary, facts=asked)
            else:
                save_merged(opened.model, temporary, known(opened.model).tokenizer, facts=asked)
        else:
            report = _from_disk(plan, opened, temporary, order, asked)
        del opened  # one model in memory at a time
        found = _verified(order, expected, temporary, kind, voice)
        facts = {**report.facts(), "path": str(order.output)}
        if found is not None:
            facts["verified"] = {"ok": found.ok, **vars(found)}
        if moved is not None:
            facts["requantized"] = vars(moved)
        write_file(temporary / REPORT, json.dumps(facts, indent=2) + "\n")
    return Written(report, kind, facts, found)


@contextmanager
def _widened(model: nn.Module) -> Iterator[None]:
    """The same weights in float32 for a while, so that the comparison sees them and not the
    rounding of what is computed with them.
    """
    narrow = [(p, p.dtype) for p in model.parameters() if p.dtype in (torch.bfloat16, torch.half)]
    try:
        for parameter, _ in narrow:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in narrow:
            parameter.data = parameter.data.to(dtype)


def _asked(opened: Subject) -> dict[str, Any]:
    return {"format": opened.format, "system": opened.system, "task": opened.task.facts()}


def _plan(order: Order, opened: Subject) -> DiskPlan | str:
    """How to merge on the disk; or why the loaded base must be merged instead."""
    if (storage := quantization_of(opened.model)) is not None:
        return f"its layers are quantized ({storage})"
    base = known(opened.model)
    labels = tuple(base.labels) if base.task == "text-classification" else ()
    empty = empty_model(base.name, task=base.task, labels=labels)
    assert opened.adapter is not None
    folder = adapter_folder(Path(order.adapter))
    assert folder is not None
    adapter = load_adapter(empty, folder)
    files = weight_files(base.name)
    loaded: Any = opened.model.dtype
    dtype = None if order.dtype == "as-stored" else _DTYPES.get(order.dtype, loaded)
    return plan_on_disk(empty, {adapter.name: order.weight}, files, dtype=dtype)


def _from_disk(
    plan: DiskPlan, opened: Subject, folder: Path, order: Order, asked: dict[str, Any]
) -> MergeReport:
    """Weights from the files of the base; config, tokenizer and template as they were loaded."""
    model: Any = opened.model
    report = merge_on_disk(plan, folder, force=order.force)
    if plan.apart:
        for part in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            part.tie_word_embeddings = False
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(folder)
    known(model).tokenizer.save_pretrained(folder)
    write_file(folder / FACTS, json.dumps(asked, indent=2, sort_keys=True) + "\n")
    return report


def _verified(
    order: Order, expected: Expected | None, folder: Path, kind: str, voice: Voice
) -> Verification | None:
    """Whether the new model is the same; with force it is only told that it is not."""
    if expected is None:
        return None
    with voice.work("asking the merged model"):
        model = load_model(folder, task=kind, dtype="float32")
        found = judge(expected, model, precision=precision_of(folder))
    try:
        found.check(str(order.output))
    except CheckRefused:
        if not order.force:
            raise
        voice.say(f"not the same, but forced: {found.problems[0]}", "warning")
    return found
