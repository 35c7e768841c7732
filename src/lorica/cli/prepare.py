"""Everything before the first write, which may all fail: data, base, adapter, encoding."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorica.attach.handle import Adapter
from lorica.base.known import known
from lorica.base.load import load_model
from lorica.base.storage import num_parameters
from lorica.cli.encoding import encode, encoded_statement
from lorica.cli.forecast import foresee
from lorica.cli.images import is_for_images, prepare_images
from lorica.cli.material import Material, chosen_by_scored, gather
from lorica.cli.prepared import Prepared
from lorica.cli.screening import check_effects, sight, tell
from lorica.cli.spread import load_spread
from lorica.cli.start import begin, begin_by_records, check_start, lay_below, waits_for_records
from lorica.cli.voice import Voice
from lorica.config import Resolved
from lorica.data.screen import screen_quickly
from lorica.data.screen_tokens import screen_tokens
from lorica.files.transfer import begin_from
from lorica.records.phrases import CHOSEN_BY_SCORED, count, parameters
from lorica.train.plan import courses_of


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
    waits, below = waits_for_records(settings), lay_below(settings, model, voice)
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
