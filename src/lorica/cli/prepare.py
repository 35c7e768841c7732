"""Everything before the first write, which may all fail: data, base, adapter, encoding."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from lorica.attach.handle import Adapter
from lorica.base.load import Base, base_of, load_model
from lorica.base.storage import num_parameters
from lorica.cli.forecast import (
    Forecast,
    forecast,
    refuse_if_far_over,
    shadow_of,
    warning_of,
)
from lorica.cli.images import OF_IMAGES, is_for_images, prepare_images
from lorica.cli.importing import uncollected
from lorica.cli.material import Material, gather
from lorica.cli.spread import load_spread
from lorica.cli.start import (
    Begun,
    begin,
    begin_by_records,
    lay_below,
    lower_of,
    source_of,
    waits_for_records,
)
from lorica.cli.voice import Voice
from lorica.config import Resolved
from lorica.data.dataset import Dataset
from lorica.data.encode import Encoded, Example, separator_of
from lorica.data.encoded_cache import FEWEST_RECORDS, EncodedCache, user_folder
from lorica.data.findings import Finding
from lorica.data.screen import screen_quickly
from lorica.data.screen_tokens import Sight, screen_tokens
from lorica.data.template import ChatTemplate
from lorica.errors import CheckRefused, ConfigError, LoricaError
from lorica.files.transfer import begin_from
from lorica.records.phrases import CHOSEN_BY_SCORED, count, parameters
from lorica.tasks import CausalLM, Seq2Seq, TextClassification
from lorica.tasks.task import Task, num_positions
from lorica.train.choice import Relevance
from lorica.train.plan import courses_of
from lorica.train.trial import Trial

_PATHS = (
    *("model", "data", "eval_data", "test_data", "chat_template"),
    *("init_adapter", "on_adapter"),
)
"""Settings that name a file or a folder."""


@dataclass
class Prepared:
    """A run that can begin.

    Attributes:
        settings: with what data and base have decided.
        examples, held_out: the records of `material`, encoded.
        metrics: names of the scores.
        memory: what the run was estimated to need; empty where that was not possible.
        relevance: why the adapter is as it is, where records decided about it.
        trial: what a search on the evaluation records found, where there was one.
    """

    settings: Resolved
    material: Material
    model: nn.Module
    adapter: Adapter
    task: Task
    examples: Encoded
    held_out: list[Example]
    metrics: list[str]
    memory: dict[str, Any] = field(default_factory=dict)
    relevance: Relevance | None = None
    trial: Trial | None = None

    @property
    def base(self) -> Base:
        """What is known of the base."""
        return known(self.model)


def prepare(settings: Resolved, voice: Voice, *, ignore_memory: bool = False) -> Prepared:
    """Read, load, attach and encode; writes nothing.

    Args:
        ignore_memory: begin although the memory of the machine will not do.

    Raises:
        LoricaError: settings, data or base with which no run can begin.
    """
    for note in settings.notes:
        voice.say(note)
    if is_for_images(settings.run):
        return prepare_images(settings, voice)
    source = check_start(settings)
    with voice.work("reading the data"):
        material = gather(settings.run, seed=settings.data_seed)
    for line in material.statements:
        voice.say(line)
    if chosen_by_scored(settings, material):
        voice.say(f"scores: {CHOSEN_BY_SCORED}")
    kind = material.task(settings.run.task, settings.run.model)
    check_effects(settings, material, kind)
    held_out = {id(part): part for part in (material.valid, material.scored) if part}
    tell(screen_quickly(material.train, [*held_out.values()]), settings, voice)
    early = foresee(settings, material, kind, voice, ignore_memory=ignore_memory)
    settings = early.settings if early else settings
    with voice.work(f"loading {settings.run.model}"):
        model, settings = load_base(settings, material, kind)
    base = known(model)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    number = num_parameters(model)
    voice.say(
        f"base: {type(model).__name__}, {parameters(number)} parameters in {dtype}, for {kind}"
    )
    for note in base.notes:
        voice.say(f"base: {note}")
    waits, below = waits_for_records(settings), _laid_below(settings, model, voice)
    begun = None if waits else begin(settings, model, below)
    if early is None:
        task, examples, held_out, settings = encode(settings, material, model, voice)
    else:
        task, examples, held_out = early.task, early.examples, early.held_out
    if begun is None:
        begun = begin_by_records(settings, model, task, examples, held_out, voice)
        settings = begun.settings
    adapter = begun.adapter
    if source is not None:
        for line in begin_from(adapter, source, partly=True):
            voice.say(f"start: {line}")
    courses_of(model, task, {adapter: examples}, held_out, settings.train)  # refuses early
    for part in adapter.parts:
        voice.say(f"targets: {part.reason}")
    voice.say(f"adapter: {size_line(adapter, number)}")
    voice.say(f"encoded: {encoded_statement(task, examples)}")
    tell(screen_tokens(sight(settings, material, model, examples)), settings, voice)
    metrics = list(settings.run.metrics or material.metrics(kind))
    memory = early.as_dict() if early else {}
    parts = settings, material, model, adapter, task, examples, held_out, metrics
    return Prepared(*parts, memory, begun.relevance, begun.trial)


def _laid_below(settings: Resolved, model: nn.Module, voice: Voice) -> Adapter | None:
    """The adapter that this run trains on top of, put on the model and told of."""
    below = lay_below(settings, model)
    if below is not None:
        kinds = ", then ".join(stage.method.kind for stage in below.stages)
        voice.say(f"below: {kinds} of {settings.run.on_adapter}, which stays as it is")
    return below


def begun_on(
    settings: Resolved,
    model: nn.Module,
    task: Task,
    examples: Encoded,
    held_out: list[Example],
    voice: Voice,
    source: Path | None,
) -> Begun:
    """The adapter of a run, on its base and whatever lies below, from its start."""
    waits, below = waits_for_records(settings), _laid_below(settings, model, voice)
    if waits:
        begun = begin_by_records(settings, model, task, examples, held_out, voice)
    else:
        begun = begin(settings, model, below)
    for line in begin_from(begun.adapter, source) if source is not None else ():
        voice.say(f"start: {line}")
    return begun


def check_start(settings: Resolved) -> Path | None:
    """Refuse what no run can begin with, before anything is read; returns `source_of`.

    Raises:
        ConfigError, AdapterFileError: a metric that there is not, or a start that is none.
    """
    if settings.run.metrics:
        from lorica.evaluate.metrics import find_metrics  # scikit-learn takes its time

        find_metrics(settings.run.metrics)
    waits_for_records(settings)
    return source_of(settings)


def anchored(settings: Resolved) -> Resolved:
    """The settings with the paths of files that are here made absolute: what a run folder records
    must be good from every directory.
    """
    found: dict[str, Any] = _anchored(settings.run.__dict__)
    if settings.run.adapters is not None:
        found["adapters"] = tuple({**one, **_anchored(one)} for one in settings.run.adapters)
    return replace(settings, run=settings.run.model_copy(update=found))


def _anchored(values: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for key in _PATHS:
        value: str = values.get(key) or ""
        stem = re.sub(r"#\d+$", "", value)  # records.jsonl#500: a sample of so many
        if stem not in ("", "embedded") and (path := Path(stem).expanduser()).exists():
            found[key] = str(path.absolute()) + value.removeprefix(stem)
    return found


def chosen_by_scored(settings: Resolved, material: Material) -> bool:
    """Whether the records that are scored also choose which adapter is kept."""
    return material.shared and settings.train.keep_best


def foresee(
    settings: Resolved, material: Material, kind: str, voice: Voice, *, ignore_memory: bool
) -> Forecast | None:
    """What the run will need, told before the base is loaded; None where it cannot be known.

    Raises:
        CheckRefused: far more memory than the machine has.
        LoricaError: records or settings with which no run can begin.
    """
    if settings.run.shard_base:
        voice.say("the memory of a base that processes hold together is not estimated")
        return None
    lower = lower_of(settings)
    try:
        shadow = shadow_of(settings, material, kind)
    except LoricaError:  # loading the base will say it in full
        return None
    encoded = encode(settings, material, shadow.model, voice)
    try:
        with voice.work("estimating the memory"):
            found = forecast(settings, material, shadow, encoded, lower)
    except (LoricaError, RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        text = next(iter(str(error).splitlines()), type(error).__name__)
        if not isinstance(error, LoricaError):  # else attaching will say it in full
            voice.say(f"the memory of this run could not be estimated: {text}")
        return None
    if not ignore_memory:
        refuse_if_far_over(found)
    if warning := warning_of(found):
        voice.say(warning, "warning")
    return found


def sight(settings: Resolved, material: Material, model: nn.Module, examples: Encoded) -> Sight:
    """What `screen_tokens` looks at."""
    base = known(model)
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    return Sight(
        material.train,
        examples,
        base.tokenizer,
        task=base.task,
        max_length=settings.train.max_length,
        vocabulary=getattr(embeddings, "num_embeddings", None),
    )


def tell(findings: list[Finding], settings: Resolved, voice: Voice) -> None:
    """Say the warnings among the findings.

    Raises:
        CheckRefused: training on these records cannot work.
    """
    if refused := [f"{f.text}{_first(f)}" for f in findings if f.severity == "refuse"]:
        raise CheckRefused(
            "training on these records cannot work",
            problems=refused,
            mend=f"lorica check {settings.run.data} --model {settings.run.model} shows where",
        )
    for finding in findings:
        if finding.severity == "warn":
            voice.say(f"data: {finding.text}{_first(finding)}", "warning")


def _first(finding: Finding) -> str:
    return f"; the first: {finding.where[0]}" if finding.where else ""


def known(model: nn.Module) -> Base:
    """What is known of a model that Lorica loaded."""
    base = base_of(model)
    assert base is not None
    return base


def load_base(settings: Resolved, material: Material, kind: str) -> tuple[nn.Module, Resolved]:
    """The base of a run, and the settings with the modules that it has no weights for."""
    run = settings.run
    if run.shard_base:
        return load_spread(settings, kind), settings
    model = load_model(
        run.model,
        task=kind,
        dtype=settings.train.dtype,
        labels=material.labels if kind == "text-classification" else (),
        revision=run.revision or "main",
        trust_remote_code=run.trust_remote_code,
        eos_token=run.eos_token,
        quantize=run.quantize,  # type: ignore[arg-type]
    )
    given = tuple(settings.method.modules_to_save or ())
    new = tuple(name for name in known(model).new_modules if name not in given)
    if new:
        why = (
            "the base has no weights for them" if len(new) > 1 else "the base has no weights for it"
        )
        settings = _with_modules(settings, [*given, *new], why)
    return model, settings


def _with_modules(settings: Resolved, names: list[str], why: str) -> Resolved:
    """The settings with modules that train whole beside the adapter: with its topmost method."""
    if not settings.below:
        return settings.decided("modules_to_save", names, why)
    *parts, last = settings.run.method
    return settings.decided("method", [*parts, {**last, "modules_to_save": names}], why)  # type: ignore[dict-item]


def size_line(adapter: Adapter, of: int) -> str:
    """What trains, and how much that is of a base of so many parameters."""
    methods: list[Any] = [part.method for part in adapter.parts]
    share = adapter.num_parameters / of
    number = sum(len(part.slots) for part in adapter.parts)
    places = f"{number} place{'s' * (number != 1)}"
    text = f"{count(adapter.num_parameters)} parameters train in {places}"
    sizes = [
        f"{key}={getattr(method, key):g}"
        for method in methods
        for key in ("r", "init_r", "lora_alpha", "num_virtual_tokens")
        if hasattr(method, key)
    ]
    rank = f"; {', '.join(sizes)}" if sizes else ""
    kinds = " with ".join(method.kind for method in methods)
    return f"{kinds}, {text} ({share:.2%} of the base){rank}"


def check_effects(settings: Resolved, material: Material, kind: str) -> None:
    """Raises ConfigError for what was set and would be ignored with this task and these records."""
    format, causal = material.train.format, kind == "causal-lm"
    reaches = {
        "chat_template": format == "chat",
        "system": format == "chat",
        "separator": causal and format == "prompt",
        "train_on": causal and format in ("prompt", "chat"),
        "add_bos": causal,
        "packing": causal,
        "share_prompts": causal,
        "max_new_tokens": material.generates,
        **dict.fromkeys(OF_IMAGES, False),
    }
    neutral = {"packing": (False, "auto"), "share_prompts": (False,)}
    problems = []
    for key, effective in reaches.items():
        origin = settings.origins[key]
        if effective or origin == "default" or origin.startswith(("rule", "demo")):
            continue
        value = settings.values[key]
        if value is not None and value not in neutral.get(key, ()):
            problems.append(f"{origin}: {key} has no effect on {format} records with {kind}")
    if problems:
        raise ConfigError(
            "settings would be ignored", problems=problems, mend="take them out, or other data"
        )


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
