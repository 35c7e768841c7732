"""What a run will need, before it begins: memory by part, tokens, steps, time, disk.

lorica plan run.yaml --batch-size 32 takes what lorica train takes. No weights are read for the
memory; the time is measured on a few real batches where the base is on this machine and fits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorica.cli.forecast import Alternative, Forecast
    from lorica.config import Resolved
    from lorica.train.pace import Pace
    from lorica.train.shadow import Lower

CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
VALUE_WIDTH = 48
"""Letters of a setting's value in a line of the plan."""


def command(
    context: typer.Context,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe/--no-probe", help="load the base and time a few steps, where it is here"
        ),
    ] = True,
    json: Annotated[
        bool, typer.Option("--json", help="one JSON object on standard output")
    ] = False,
) -> None:
    from lorica.cli.pages import page

    if {"-h", "--help"} & {*context.args}:
        print(page(context, settings=True), end="")
        return
    import json as jsonlib
    import sys

    from lorica.cli.forecast import alternatives, warning_of
    from lorica.cli.options import read_flags
    from lorica.cli.source import shaped_by_source
    from lorica.cli.spread import refuse_spread
    from lorica.cli.voice import Voice
    from lorica.config import known_settings, load_yaml, resolve
    from lorica.config.text import flag_layer
    from lorica.methods import WORDS

    known = known_settings(WORDS)
    own = [option for p in context.command.params for option in p.opts]
    line = read_flags(context.args, known, [*own, "--help"])
    layers = [load_yaml(file) for file in line.files]
    layers = shaped_by_source([*layers, flag_layer(line.flags, known)])
    settings = resolve(*layers, methods=WORDS)
    refuse_spread(settings, "lorica plan estimates a process that has all of the base")
    voice = Voice(quiet=json, stream=sys.stderr)
    if settings.run.search is not None:
        from lorica.cli.search_plan import lines_of, plan_search

        plan = plan_search(settings, voice, lambda found: _pace(found, probe=probe))
        print(jsonlib.dumps(plan, ensure_ascii=False) if json else "\n".join(lines_of(plan)))
        return
    told = []
    for title, one, lower in _runs(settings):
        found = _forecast(one, voice, lower)
        with voice.work("looking for cheaper settings"):
            cheaper = alternatives(found)
        with voice.work("timing a few steps"):
            pace = _pace(found, probe=probe)
        told.append(_as_dict(found, cheaper, pace))
        if not json:
            print("\n".join([*([title, ""] if title else []), *_lines(found, cheaper, pace)]))
        if warning := warning_of(found):
            print(f"lorica: warning: {warning}", file=sys.stderr)
    if json:
        fits = all(one["fits"] for one in told)
        many = "adapters" if settings.adapters else "stages"
        made = {"fits": fits, many: told} if told[1:] else told[0]
        print(jsonlib.dumps(made, ensure_ascii=False))


def _runs(settings: Resolved) -> Iterator[tuple[str, Resolved, tuple[Lower, ...]]]:
    """(title, settings, what will lie below) of the run, or of each of its stages or adapters."""
    from lorica.cli.start import lower_of

    if settings.adapters:
        from lorica.cli.several import check_several

        check_several(settings)
        for name, own in settings.adapters.items():
            yield f"adapter {name}, as if it trained by itself", own, ()
        return
    if not settings.stages:
        yield "", settings, lower_of(settings)
        return
    from lorica.cli.stages import check_stages_of, methods_of
    from lorica.train.shadow import Lower

    check_stages_of(settings)
    before: list[Lower] = []
    for number, own in enumerate(settings.stages, 1):
        first = lower_of(own)
        together = [one for one in first if one.trains]
        before += [one for one in first if not one.trains and number == 1]
        kinds = " with ".join(method.kind for method in methods_of(own))
        yield f"stage {number}: {kinds}", own, (*before, *together)
        before += [Lower(method) for method in methods_of(own)]


def _forecast(settings: Resolved, voice: Any, lower: tuple[Lower, ...]) -> Forecast:
    import torch

    from lorica.cli.encoding import encode
    from lorica.cli.forecast import forecast, shadow_of
    from lorica.cli.material import gather
    from lorica.cli.screening import check_effects, sight, tell
    from lorica.cli.start import check_start
    from lorica.data.screen import screen_quickly
    from lorica.data.screen_tokens import screen_tokens

    check_start(settings)
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    for note in settings.notes:
        voice.say(note)
    with voice.work("reading the data"):
        material = gather(settings.run, seed=settings.data_seed)
    kind = material.task(settings.run.task, settings.run.model)
    check_effects(settings, material, kind)
    held_out = {id(part): part for part in (material.valid, material.scored) if part}
    tell(screen_quickly(material.train, [*held_out.values()]), settings, voice)
    with voice.work("making the base without its weights"):
        shadow = shadow_of(settings, material, kind)
    encoded = encode(settings, material, shadow.model, voice)
    with voice.work("running the base without its weights"):
        found = forecast(settings, material, shadow, encoded, lower)
    tell(screen_tokens(sight(found.settings, material, shadow.model, encoded[1])), settings, voice)
    return found


def _pace(found: Forecast, *, probe: bool) -> Pace:
    """Measured where the base can be loaded, else by the law of 4 N."""
    from lorica.attach.survey import LINEAR
    from lorica.base.load import load_model
    from lorica.base.locate import weight_files
    from lorica.base.storage import weight_shape
    from lorica.cli.start import stacked
    from lorica.train.budget import chosen_batches
    from lorica.train.pace import by_law, probed

    request, settings = found.shadow.request, found.settings.train
    here = weight_files(request.name, revision=request.revision) or request.name == "embedded"
    if not (probe and here and found.fits):
        linear = [m for m in found.shadow.model.modules() if isinstance(m, LINEAR)]
        number = sum(math.prod(weight_shape(m)) for m in linear)
        return by_law(number, next(found.shadow.model.parameters()).dtype, request.device)
    model = load_model(
        request.name,
        task=request.task,
        dtype=request.dtype,
        labels=request.labels,
        revision=request.revision,
        trust_remote_code=request.trust_remote_code,
        eos_token=request.eos_token,
        quantize=request.quantize,
    )
    adapter = stacked(model, found.method, found.lower, seed=settings.seed)
    task = found.shadow.task(found.task)
    usual, _ = chosen_batches(found.work.examples, task, found.shadow, settings)
    return probed(model, adapter, found.task, [usual], settings)


def _steps(found: Forecast) -> dict[str, Any]:
    """Tokens and steps of the run."""
    from lorica.train.plan import total_steps

    train, examples = found.settings.train, found.examples
    steps = total_steps(len(examples), train)
    records = train.batch_size * train.gradient_accumulation_steps
    per_epoch = -(-len(examples) // records)
    tokens = examples.num_tokens * steps / per_epoch
    return {
        "records": len(examples),
        "tokens_per_epoch": examples.num_tokens,
        "trained_tokens_per_epoch": examples.num_trained_tokens,
        "records_per_step": records,
        "steps_per_epoch": per_epoch,
        "steps": steps,
        "tokens": round(tokens),
    }


def _notes(found: Forecast) -> list[str]:
    """What was assumed, and what the numbers leave out."""
    from lorica.cli.forecast import note_on_moments

    notes, seeds = list(found.shadow.notes), found.settings.run.seeds
    notes.append(note_on_moments(found))
    if seeds:
        notes.append(
            f"these are the numbers of one run; there is one for each of {len(seeds)} seeds"
        )
    if candidates := getattr(found.settings.method, "candidates", ()):
        notes.append(
            f"before it, a trial of reinit_top_layers trains {len(candidates)} times as long"
        )
    return notes


def _disk(found: Forecast) -> dict[str, int]:
    """Bytes written: a checkpoint holds the adapter, two moments of it, and the best so far."""
    settings, memory = found.settings.train, found.memory
    adapter = memory.adapter // (2 if settings.keep_best and found.held_out else 1)
    checkpoint = memory.adapter + memory.optimizer
    kept = settings.save_total_limit
    return {
        "adapter": adapter,
        "checkpoint": checkpoint,
        "checkpoints_kept": kept,
        "most": adapter + (kept + 1) * checkpoint,  # a new one is whole before an old one goes
    }


def _as_dict(found: Forecast, cheaper: list[Alternative], pace: Pace) -> dict[str, Any]:
    run = _steps(found)
    return {
        "fits": found.fits,
        "memory": found.as_dict(),
        "run": run,
        "time": {
            "seconds": run["tokens"] / pace.tokens_per_second,
            "tokens_per_second": pace.tokens_per_second,
            "how": pace.how,
        },
        "disk": _disk(found),
        "settings": _settings(found),
        "cheaper": [
            {
                "change": a.change,
                "training": a.memory.phases["training"],
                "saves": found.memory.phases["training"] - a.memory.phases["training"],
                "price": a.price,
            }
            for a in cheaper
        ],
        "notes": _notes(found),
    }


def _settings(found: Forecast) -> list[dict[str, Any]]:
    """Every setting with its value and where that came from; for a default, what it does."""
    from lorica.config import known_settings

    known = known_settings({found.settings.method.kind: type(found.settings.method)})
    values, origins = found.settings.values, found.settings.origins
    return [
        {
            "key": key,
            "value": list(value) if isinstance(value, tuple) else value,
            "origin": origins[key],
            "help": known[key].help,
        }
        for key, value in values.items()
        if key in known
    ]


WORDS = {
    "process": "Python, torch, records",
    "weights": "the frozen base",
    "states": "kept outputs of frozen layers",
    "adapter": "what trains, and the best of it",
    "gradients": "of the adapter, at that moment",
    "optimizer": "two moments for each number that trains",
    "activations": "kept for the backward pass",
    "logits": "one number per word and trained token",
    "workspace": "other tensors of that moment",
    "fragmentation": "freed, but kept by the allocator",
}


def _lines(found: Forecast, cheaper: list[Alternative], pace: Pace) -> list[str]:
    from lorica.records.lines import aligned
    from lorica.records.phrases import count, duration, size

    memory, run, disk = found.memory, _steps(found), _disk(found)
    rows = [["memory in training", "", ""]]
    rows += [[part, size(getattr(memory, part)), WORDS[part]] for part in memory.PARTS]
    rows.append(["together", size(memory.phases["training"]), ""])
    others = [f"{name} {size(value)}" for name, value in memory.phases.items() if value]
    seconds = run["tokens"] / pace.tokens_per_second
    lines = [
        *aligned(rows, left=("memory in training", rows[0][2])),
        "",
        f"peak        {size(memory.total)} in {memory.phase} ({', '.join(others)})",
        f"machine     {size(found.machine)}, of which {size(found.free)} free: "
        + ("it fits" if found.fits else "IT DOES NOT FIT"),
        f"tokens      {count(run['tokens_per_epoch'])} per epoch, of which "
        f"{count(run['trained_tokens_per_epoch'])} are trained",
        f"steps       {count(run['steps'])} of {count(run['records_per_step'])} records; "
        f"{count(run['steps_per_epoch'])} per epoch",
        f"time        {duration(seconds)} of training, {count(pace.tokens_per_second)} tokens/s "
        f"({pace.how})",
        f"disk        {size(disk['most'])} at most: adapter {size(disk['adapter'])}, "
        f"{disk['checkpoints_kept']} checkpoints of {size(disk['checkpoint'])} and one being "
        "written",
    ]
    if cheaper:
        table = [["cheaper, each by itself", "training", "saves", "price"]]
        for a in cheaper:
            saved = memory.phases["training"] - a.memory.phases["training"]
            if saved > 0:
                need = size(a.memory.phases["training"])
                table.append([a.change, need, size(saved), a.price])
        lines += ["", *aligned(table, left=(table[0][0], "price"))] if len(table) > 1 else []
    return [*lines, "", *_setting_lines(found), *(f"note: {n}" for n in _notes(found))]


def _wrapped(text: str) -> list[str]:
    """In lines, but never within a word: a path can be copied."""
    from textwrap import wrap

    return wrap(text, VALUE_WIDTH, break_long_words=False, break_on_hyphens=False) or [""]


def _setting_lines(found: Forecast) -> list[str]:
    """What was set or decided with its origin, then the defaults with what they do. A long value
    goes over several lines.
    """
    from lorica.config.text import yaml_text
    from lorica.records.lines import aligned

    rows = [["setting", "value", "why"]]
    entries = _settings(found)
    for entry in sorted(entries, key=lambda e: e["origin"] == "default"):
        default = entry["origin"] == "default"
        why = f"default: {entry['help']}" if default else entry["origin"]
        first, *more = _wrapped(yaml_text(entry["value"]))
        rows += [[entry["key"], first, why], *(["", part, ""] for part in more)]
    return aligned(rows, left=("setting", "value", "why"))
