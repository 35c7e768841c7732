"""The records of a run as numbers, by its task, and what they decide of the settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lorica.base.known import Base, known
from lorica.cli.importing import uncollected
from lorica.cli.material import Material
from lorica.cli.prepared import Prepared
from lorica.cli.voice import Voice
from lorica.config import Resolved
from lorica.data.dataset import Dataset
from lorica.data.encode import Encoded, Example, separator_of
from lorica.data.encoded_cache import FEWEST_RECORDS, EncodedCache, user_folder
from lorica.data.template import ChatTemplate
from lorica.errors import ConfigError
from lorica.records.phrases import count
from lorica.tasks import CausalLM, Seq2Seq, TextClassification
from lorica.tasks.task import Task, num_positions


def encode(
    settings: Resolved, material: Material, model: nn.Module, voice: Voice
) -> tuple[Task, Encoded, list[Example], Resolved]:
    """The task, the records as it encodes them, and the settings with what the data decides."""
    base = known(model)
    settings = with_separator(settings, material.train, base.task)
    task = make_task(settings, base)
    parts = [_encoded(task, part, settings, voice) for part in (material.train, material.valid)]
    tested = _encoded(task, material.scored, settings, voice)
    methods = (*settings.below, settings.method)
    virtual = max(getattr(method, "num_virtual_tokens", 0) for method in methods)
    limit = num_positions(model, virtual=virtual)
    if virtual and limit is not None and limit < 2:
        raise ConfigError(
            f"num_virtual_tokens={virtual} leaves no room for the records: the base has "
            f"{limit + virtual:,} positions",
            mend="give fewer virtual tokens",
        )
    longest = max(max(len(e.input_ids), len(e.labels)) for p in [*parts, tested] for e in p)
    if settings.train.max_length is None and limit is not None and longest > limit:
        less = f" less {virtual} virtual tokens" if virtual else ""
        why = f"the positions of the base{less}; the longest record has {longest:,} tokens"
        settings = settings.decided("max_length", limit, why)
        task = make_task(settings, base)
        parts = [_encoded(task, part, settings, voice) for part in (material.train, material.valid)]
    examples = replace(parts[0], origins=material.train.origins)
    return task, examples, parts[1].examples, settings


def _encoded(task: Task, records: Dataset | None, settings: Resolved, voice: Voice) -> Encoded:
    """The records as numbers; large sets from the cache, where it has them."""
    if records is None:
        return Encoded([], [])

    def make() -> Encoded:
        with uncollected(), voice.work("encoding the records", len(records)) as progress:
            return task.encode(records, progress=progress)

    if not settings.run.cache_encoded or len(records) < FEWEST_RECORDS:
        return make()
    cache = EncodedCache(user_folder() / "encoded")
    found, told = cache.encoded(records, task.encoding(), make)
    for line in told:
        voice.say(f"encoding: {line}")
    return found


def with_separator(settings: Resolved, train: Dataset, task: str) -> Resolved:
    """The settings with the separator that the records need, where none was set."""
    asks = task == "causal-lm" and train.format == "prompt"
    if not asks or settings.run.separator is not None:
        return settings
    separator = separator_of(train.rows)
    part = "no white space parts prompt and completion"
    reason = part if separator else "the data parts them itself"
    return settings.decided("separator", separator, reason)


def encoded_statement(task: Task, examples: Encoded) -> str:
    """Tokens, what of them is trained, and what was cut, in one line."""
    if task.kind == "causal-lm":
        return examples.statement()
    tokens = sum(len(example) for example in examples)
    text = f"{count(len(examples))} examples, {count(tokens)} tokens"
    if task.kind == "seq2seq":
        text += f" of source and {count(examples.num_trained_tokens)} of target"
    return "; ".join([text, *examples.notes])


def make_task(settings: Resolved, base: Base) -> Task:
    """The task of a base with the settings of a run."""
    run, max_length = settings.run, settings.train.max_length
    if base.task == "text-classification":
        return TextClassification(base.tokenizer, base.labels, max_length)
    if base.task == "seq2seq":
        return Seq2Seq(base.tokenizer, max_length, run.max_new_tokens)
    return CausalLM.of(
        base.tokenizer,
        max_length=max_length,
        train_on=run.train_on,
        add_bos=run.add_bos,
        separator=run.separator or "",
        template=_template(run.chat_template, base.tokenizer),
        packing=settings.train.packing,
        max_new_tokens=run.max_new_tokens,
    )


def _template(file: str | None, tokenizer: Any) -> ChatTemplate | None:
    if file is None:
        return None
    try:
        source = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"chat_template: {file} cannot be read: {why}") from error
    return replace(ChatTemplate.of(tokenizer), source=source, is_fallback=False)


def own_template(prepared: Prepared) -> str | None:
    """The chat template of the run where it is not the base's own: it must go with the adapter."""
    if prepared.material.train.format != "chat" or not isinstance(prepared.task, CausalLM):
        return None
    given = prepared.task.encoder.template
    template = given or ChatTemplate.of(prepared.task.tokenizer)
    return template.source if given is not None or template.is_fallback else None
