"""Settings that cannot hold together, or of which one would be silently without effect.

What lies within one group of settings its own class looks after (settings.py); here is what lies
between the groups, and between the settings and what the paths mean on this machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lorica.config.settings import RunConfig, TrainSettings

_OF_TEXTS = ("chat_template", "system", "separator", "train_on", "add_bos", "packing")
"""Settings of causal-lm, which do nothing in the other tasks; but classifiers pack texts."""
_NEUTRAL = {"packing": (False, "auto")}


def contradictions(run: RunConfig, train: TrainSettings) -> list[str]:
    """Each in a sentence that begins with the name of a setting."""
    return [
        *_evaluation(run, train),
        *_task(run, train),
        *_course(train),
        *_base(run),
        *_paths(run),
        *_seeds(run, train),
        *_stages(run),
        *_adapters(run),
    ]


def _adapters(run: RunConfig) -> Iterator[str]:
    for key in ("seeds", "stages", "on_adapter") if run.adapters is not None else ():
        if getattr(run, key) is not None:
            yield f"{key} is for a run of one adapter, and adapters lists several; take one out"
    if run.adapters is not None and run.data == "-":
        yield "data is standard input, which can be read once; every adapter reads its records"


def _stages(run: RunConfig) -> Iterator[str]:
    for key in ("seeds", "init_adapter") if run.stages is not None else ():
        if getattr(run, key) is not None:
            yield f"{key} is for a run of one stage; take it out, or train stages by on_adapter"
    if run.stages is not None and run.data == "-":
        yield "data is standard input, which can be read once; every stage reads the records"


def _seeds(run: RunConfig, train: TrainSettings) -> Iterator[str]:
    if run.seeds is None:
        return
    if len(set(run.seeds)) < len(run.seeds) or len(run.seeds) < 2:
        yield f"seeds={list(run.seeds)} must be at least two different numbers"
    if any(seed < 0 or seed >= 2**32 for seed in run.seeds):
        yield f"seeds={list(run.seeds)} must lie between 0 and 4,294,967,295"
    if train.seed:
        yield f"seed={train.seed} has no effect beside seeds; keep one of them"


def _evaluation(run: RunConfig, train: TrainSettings) -> Iterator[str]:
    if run.eval_size == 0:
        for key in ("eval_steps", "early_stopping_patience", "eval_batch_size"):
            if getattr(train, key) is not None:
                yield f"{key} has no effect with eval_size=0, which turns evaluation off"
    patience, every, steps = train.early_stopping_patience, train.eval_steps, train.max_steps
    if patience and every and steps and patience * every >= steps:
        yield (
            f"early_stopping_patience={patience} evaluations, one in eval_steps={every}, are not "
            f"fewer than max_steps={steps}; it could never stop the run"
        )


def _task(run: RunConfig, train: TrainSettings) -> Iterator[str]:
    for key in _OF_TEXTS if run.task in ("text-classification", "seq2seq") else ():
        group = run if key in RunConfig.model_fields else train
        value, default = getattr(group, key), type(group).model_fields[key].default
        if value not in (None, default, *_NEUTRAL.get(key, ())):
            if key == "packing" and run.task == "text-classification":
                continue  # texts are packed there too
            yield f"{key} has no effect in {run.task}; take it out"


def _course(train: TrainSettings) -> Iterator[str]:
    if train.lr_scheduler_type == "wsd" and train.max_steps and train.warmup_steps:
        decay = round(train.decay_ratio * train.max_steps)
        if train.warmup_steps + decay > train.max_steps:
            yield (
                f"decay_ratio={train.decay_ratio} of max_steps={train.max_steps} and "
                f"warmup_steps={train.warmup_steps} are together more than the whole run"
            )


def _base(run: RunConfig) -> Iterator[str]:
    if run.model == "embedded":
        where = "the embedded base, which travels with lorica"
    elif os.path.isdir(run.model):  # False, not an error, where one may not look
        where = f"{run.model}, which is a folder"
    else:
        return
    if run.revision is not None:
        yield f"revision={run.revision} has no effect on {where}; it belongs to a base on the hub"
    if run.trust_remote_code and run.model == "embedded":
        yield f"trust_remote_code has no effect on {where}"


def _paths(run: RunConfig) -> Iterator[str]:
    for key in ("eval_data", "test_data"):
        if (given := getattr(run, key)) is None or run.data == "embedded":
            continue
        if run.data == given == "-":
            yield f"{key} and data are both standard input, which can be read once"
        elif run.data == given:
            yield f"{key} is the same as data; scores on what was trained say nothing"
    for key in ("model", "data", "eval_data", "test_data", "on_adapter"):
        given = getattr(run, key)
        if run.output_dir and given and Path(run.output_dir) == Path(given):
            yield f"output_dir is the same as {key}; a run writes into a folder of its own"
