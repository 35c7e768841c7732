"""Look for faults in records before they cost a run: what is broken, cut, doubled, leaked, secret.

lorica check data.jsonl --model MODEL reads everything as training would, without the weights. Every
setting of lorica train may be given, or a settings file: what is checked is what that run would
see. Exit code 3: training on this cannot work.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lorica.config import Resolved
    from lorica.data.dataset import Dataset
    from lorica.data.findings import Finding

CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
ARGUMENTS = "[DATA] [SETTINGS.yaml] [--setting VALUE]..."
BAR = 40


def command(
    context: typer.Context,
    near: Annotated[
        bool | None,
        typer.Option(
            "--near/--no-near",
            help="look for near duplicates; on where datasketch is installed",
            show_default=False,
        ),
    ] = None,
    language: Annotated[
        bool | None,
        typer.Option(
            "--language/--no-language",
            help="tell languages; on where py3langid is installed",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="write a page to this file", show_default=False, metavar="PATH"),
    ] = None,
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

    from lorica.cli.options import read_flags
    from lorica.cli.voice import Voice
    from lorica.config import known_settings
    from lorica.errors import CheckRefused, ConfigError
    from lorica.methods import WORDS

    known = known_settings(WORDS)
    own = [option for p in context.command.params for option in p.opts]
    line = read_flags(context.args, known, [*own, "--help"], words=1)
    settings, with_model = _settings(line, known)
    voice = Voice(quiet=json, stream=sys.stderr)
    how: dict[str, Any] = {"with_model": with_model, "near": near, "language": language}
    told = {name: _check(one, voice, **how) for name, one in _each(settings).items()}
    if json:
        made = {name: found.as_dict() for name, found in told.items()}
        whole = {"adapters": made} if settings.adapters else made[""]
        print(jsonlib.dumps(whole, ensure_ascii=False))
    for name, found in told.items() if not json else ():
        print("\n".join([*([f"adapter {name}", ""] if name else []), *found.lines()]))
    if html is not None:
        from lorica.records.check_page import write_check_page

        if len(told) > 1:
            raise ConfigError(
                "--html writes the page of one set of records, and the adapters have several",
                mend="lorica check DATA --html PAGE for each",
            )
        (found,) = told.values()
        voice.say(f"page: {write_check_page(found.as_dict(), html)}")
    refused = [
        f"adapter {name!r}: {f.text}" if name else f.text
        for name, found in told.items()
        for f in found.findings
        if f.severity == "refuse"
    ]
    if refused:
        raise CheckRefused(
            f"{settings.run.data}: training on these records cannot work", problems=refused
        )


def _settings(line: Any, known: Any) -> tuple[Resolved, bool]:
    """What to check, and whether a model was named."""
    from lorica.config import Layer, load_yaml, resolve
    from lorica.config.text import flag_layer
    from lorica.errors import ConfigError
    from lorica.methods import WORDS

    layers = [load_yaml(file) for file in line.files]
    if line.words:
        layers.append(Layer("the command line", {"data": line.words[0]}))
    layers.append(flag_layer(line.flags, known))
    given = {name for layer in layers for name in layer.values}
    if not given & {"data", "adapters"}:
        raise ConfigError("there is nothing to check", mend="lorica check DATA --model MODEL")
    if not (with_model := "model" in given):  # a run needs one; it is not looked at
        layers.insert(0, Layer("no model", {"model": "embedded"}))
    settings = resolve(*layers, methods=WORDS)
    first = settings.stages[0] if settings.stages else settings  # all stages read the same records
    return first, with_model


def _each(settings: Resolved) -> dict[str, Resolved]:
    """What is checked: the records of the run, or those of each adapter, the same ones once, under
    the names of all that have them.
    """
    if not settings.adapters:
        return {"": settings}
    names: dict[tuple, list[str]] = {}
    for name, own in settings.adapters.items():
        run = own.run
        key = (run.data, run.eval_data, run.test_data, run.format, str(run.columns))
        names.setdefault(key, []).append(name)
    return {", ".join(found): settings.adapters[found[0]] for found in names.values()}


class _Found:
    """What the check found, as plain values and as lines."""

    def __init__(self, statement: list[str], train: Dataset, task: str, findings: list) -> None:
        from lorica.data.findings import sorted_by_severity

        self.statement, self.train, self.task = statement, train, task
        self.findings: list[Finding] = sorted_by_severity(findings)
        self.tokens: dict[str, Any] = {}
        self.labels: dict[str, int] = {}
        self.example: list[list] = []

    def as_dict(self) -> dict[str, Any]:
        """The keys of --json; docs/check.md describes them."""
        return {
            "data": self.train.origins[0][0] if len(self.train) else "",
            "statement": self.statement,
            "format": self.train.format,
            "task": self.task,
            "num_records": len(self.train),
            "digest": self.train.digest,
            "tokens": self.tokens,
            "labels": self.labels,
            "example": self.example,
            "findings": [finding.as_dict() for finding in self.findings],
        }

    def lines(self) -> list[str]:
        lines = [*self.statement, ""]
        if self.tokens:
            lines += [*_token_lines(self.tokens), ""]
        if self.labels:
            lines += [*_label_lines(self.labels), ""]
        if self.example:
            text = "".join(f"[{t}]" if trained else t for t, trained in self.example)
            shown = " ".join(text.replace("\n", "⏎").split())
            lines += ["the first record, with what is trained in brackets:", f"  {shown[:600]}", ""]
        for finding in self.findings:
            lines.append(f"{_SIGNS[finding.severity]} {finding.text}  [{finding.code}]")
            lines += [f"      {place}" for place in finding.where]
            lines += [f"      mend: {finding.mend}"] if finding.mend else []
        counts = [sum(f.severity == s for f in self.findings) for s in ("refuse", "warn")]
        lines += ["", _verdict(*counts)]
        return lines


_SIGNS = {"refuse": "✗ refuse", "warn": "! warn  ", "info": "· info  "}


def _verdict(refused: int, warned: int) -> str:
    if refused:
        return "training on these records cannot work as it is"
    if warned:
        return f"training can begin; {warned} warning{'s' if warned != 1 else ''} to look at first"
    return "nothing stands against training"


def _token_lines(tokens: dict[str, Any]) -> list[str]:
    from lorica.records.phrases import count

    at, trained = tokens["lengths"]["percentiles"], tokens["trained_share"]
    share = "" if trained is None else f", {trained:.1%} of them trained"
    lines = [
        f"{count(tokens['num_tokens'])} tokens{share}; {count(tokens['num_cut'])} of "
        f"{count(tokens['num_examples'])} examples cut",
        "length in tokens: " + ", ".join(f"{name} {count(value)}" for name, value in at.items()),
    ]
    histogram = tokens["lengths"]["histogram"]
    most = max(histogram["counts"], default=0)
    for low, number in zip(histogram["edges"], histogram["counts"], strict=False):
        bar = "█" * max(int(number > 0), round(BAR * number / max(1, most)))
        lines.append(f"  {low:>7,}  {bar} {number:,}" if number else f"  {low:>7,}")
    return lines


def _label_lines(labels: dict[str, int]) -> list[str]:
    total = sum(labels.values())
    shown = [f"{name!r} {n:,} ({n / total:.1%})" for name, n in list(labels.items())[:12]]
    more = f" and {len(labels) - 12} more" if len(labels) > 12 else ""
    return [f"labels: {', '.join(shown)}{more}"]


def _check(
    settings: Resolved, voice: Any, *, with_model: bool, near: bool | None, language: bool | None
) -> _Found:
    from lorica.data.labels import balance
    from lorica.data.screen import screen_quickly
    from lorica.data.screen_thoroughly import screen_thoroughly

    with voice.work("reading the data"):
        parts, findings = _read(settings)
    train = parts["train"]
    held_out = [part for name, part in parts.items() if name != "train"]
    extra = {"near": _wanted(near, "datasketch"), "language": _wanted(language, "py3langid")}
    with voice.work("looking at the records"):
        findings += screen_quickly(train, held_out)
        findings += screen_thoroughly(train, held_out, **extra)
    findings += _not_looked_for(extra)
    statement = [f"{name}: {part.statement}" for name, part in parts.items()]
    found = _Found(statement, train, "", findings)
    if train.format == "classification":
        found.labels = balance(train.rows)
    if with_model and all(f.code != "one-label" for f in findings):
        with voice.work("encoding the records"):
            _look_at_tokens(settings, parts, found)
    return found


def _wanted(asked: bool | None, package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None if asked is None else asked


def _not_looked_for(extra: dict[str, bool]) -> list[Finding]:
    from lorica.data.findings import Finding

    words = {"near": "near duplicates", "language": "languages"}
    missing = [words[name] for name, looked in extra.items() if not looked]
    text = f"not looked for: {', '.join(missing)}"
    return (
        [Finding("not-looked", "info", text, mend="pip install 'lorica[clean]'")] if missing else []
    )


def _read(settings: Resolved) -> tuple[dict[str, Dataset], list[Finding]]:
    """All that can be read; what cannot is a finding."""
    from lorica.cli.material import read_parts
    from lorica.data.findings import Finding
    from lorica.errors import DataError

    try:
        parts, findings = read_parts(settings.run), []
    except DataError as error:
        try:
            parts = read_parts(settings.run, max_bad_rows=10**9)
        except DataError:
            raise error from None
        mend = "mend the rows, or lorica clean leaves them out"
        findings = [Finding("broken-rows", "refuse", error.what, 0, error.problems, mend)]
    if "train" not in parts:  # a folder with a test set alone is looked at all the same
        parts = {"train": next(iter(parts.values()))}
    return parts, findings


def _look_at_tokens(settings: Resolved, parts: dict[str, Dataset], found: _Found) -> None:
    """Encode as training would, and add what that shows."""
    from lorica.base.empty import empty_model
    from lorica.base.known import Base
    from lorica.base.tokenizer import load_tokenizer
    from lorica.cli.encoding import make_task, with_separator
    from lorica.cli.manifest import marked
    from lorica.cli.material import Material
    from lorica.cli.screening import check_effects
    from lorica.data.findings import sorted_by_severity
    from lorica.data.screen_tokens import Sight, lengths_of, screen_tokens
    from lorica.tasks.task import num_positions

    run, train = settings.run, parts["train"]
    material = Material(train, parts.get("valid"), parts.get("test"))
    kind = material.task(run.task, run.model)
    check_effects(settings, material, kind)
    how: dict[str, Any] = {"task": kind, "trust_remote_code": run.trust_remote_code}
    model = empty_model(run.model, **how)
    base = Base(str(run.model), kind, digest="")
    base.tokenizer = load_tokenizer(
        run.model, revision=run.revision or "main", eos_token=run.eos_token, **how
    )
    base.labels = material.labels if kind == "text-classification" else ()
    task = make_task(with_separator(settings, train, kind), base)
    examples, faults = _encoded(task, train)
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    sight = Sight(
        train,
        examples,
        base.tokenizer,
        faults,
        task=kind,
        max_length=settings.train.max_length,
        num_positions=num_positions(model),
        vocabulary=getattr(embeddings, "num_embeddings", None),
        notes=examples.notes,
    )
    share = examples.num_trained_tokens / max(1, examples.num_tokens)
    found.task = kind
    found.findings = sorted_by_severity([*found.findings, *screen_tokens(sight)])
    found.tokens = {
        "num_examples": len(examples),
        "num_tokens": examples.num_tokens,
        "trained_share": share if kind == "causal-lm" else None,
        "num_cut": examples.num_truncated,
        "lengths": lengths_of(examples.examples),
    }
    found.example = marked(task, examples[0]) if len(examples) else []


def _encoded(task: Any, train: Dataset) -> tuple[Any, list]:
    """Examples and the records that have none; other tasks than causal-lm take all or nothing."""
    if task.kind == "causal-lm":
        return task.encoder.attempt(train)
    return task.encode(train), []
