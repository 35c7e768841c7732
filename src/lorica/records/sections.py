"""The sections of the report, as plain values for its template. Nothing here is escaped yet."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lorica.records import mixtures, pictures, relevance, seeds, stages
from lorica.records.card import is_for_peft, lorica_snippet, merges, peft_snippet, shell_line
from lorica.records.difference import Piece, marked, nearest_reference
from lorica.records.folder import ADAPTER, ADAPTERS
from lorica.records.phrases import (
    CHOSEN_BY_SCORED,
    chosen_by_scored,
    count,
    decimals,
    duration,
    fixed,
    loss_text,
    metric_name,
    number,
    parameters,
    rate,
    score_cells,
    size,
    verdict,
)
from lorica.records.plots import (
    Curves,
    curves_of,
    length_figure,
    loss_figure,
    rate_figure,
    score_figure,
)
from lorica.records.read import Run
from lorica.records.smooth import smoothed

HERE = Path(__file__).parent
SAMPLES_SHOWN, SAMPLES_FOLDED, SAMPLE_LENGTH, EXAMPLE_TOKENS = 10, 40, 1500, 1200
STATUS_WORDS = {
    "finished": "finished",
    "interrupted": "interrupted, can be resumed",
    "failed": "failed",
    "running": "still running",
    "stopped": "stopped without an end, can be resumed",
}


def content(run: Run) -> dict:
    """Everything that the template prints, by name."""
    curves = curves_of(run.rows)
    scores = list(_score_parts(run.manifest))
    texts = [sample for sample in run.samples if not pictures.has_pictures(sample)]
    shown = texts[: SAMPLES_SHOWN + SAMPLES_FOLDED]
    return {
        "css": (HERE / "report.css").read_text("utf-8"),
        "title": _title(run),
        "status": run.status if run.status in STATUS_WORDS else "unknown",
        "status_words": STATUS_WORDS.get(run.status, run.status),
        "facts": _facts(run),
        "verdicts": [_verdict_part(adapter, part) for adapter, part in scores],
        "no_verdict": _why_no_verdict(run),
        "alarms": [*_alarms(run), *run.notes],
        "scores": [_score_table(index, *part) for index, part in enumerate(scores)],
        "chosen_by_scored": CHOSEN_BY_SCORED if chosen_by_scored(run.manifest) else "",
        "seeds": seeds.rows(_mapping(run.manifest.get("seeds"))),
        "stages": stages.rows(run.manifest.get("stages")),
        "mixtures": mixtures.section(run.manifest),
        "loss_figure": loss_figure(curves, _loss_unit(run)),
        "rate_figure": rate_figure(curves),
        "legend": [one.adapter for one in curves] if len(curves) > 1 else [],
        "course": [*_courses(curves), *_resumptions(run)],
        "evaluations": _evaluations(run.rows),
        "relevance": relevance.section(run.relevance),
        "samples": [_sample(sample) for sample in shown[:SAMPLES_SHOWN]],
        "more_samples": [_sample(sample) for sample in shown[SAMPLES_SHOWN:]],
        "samples_left": len(texts) - len(shown),
        "pictures": pictures.rows(run.path, run.samples[: SAMPLES_SHOWN + SAMPLES_FOLDED]),
        "data": [_split(name, split) for name, split in _mappings(run.manifest.get("data"))],
        "settings": run.settings,
        "method": [(key, str(v)) for key, v in _mapping(run.manifest.get("method")).items()],
        "resources": _resources(run.manifest),
        "usage": list(_usage(run)),
        "environment": _environment(run.manifest),
        "events": [_event(event) for event in run.events],
    }


def _loss_unit(run: Run) -> str:
    """A class is one decision per record; everything else is learned token by token."""
    units = {"text-classification": "nats per record", "text-to-image": "mean squared error"}
    return units.get(str(run.manifest.get("task")), "nats per token")


def _title(run: Run) -> str:
    adapters = list(_mapping(run.manifest.get("adapters")))
    base = _short(_mapping(run.manifest.get("base")).get("name"))
    what = f"{len(adapters)} adapters" if adapters else run.path.resolve().name
    if len(adapters) == 1:
        what = str(adapters[0])
    return f"{what} on {base}" if base else what


def _facts(run: Run) -> list[str]:
    manifest = run.manifest
    method, plan = _mapping(manifest.get("method")), _mapping(manifest.get("plan"))
    steps = [step for row in run.rows if (step := number(row.get("step"))) is not None]
    facts = [str(manifest["task"])] if manifest.get("task") else []
    if method:
        rank = f" r={method['r']}" if "r" in method else ""
        facts.append(f"{method.get('kind', 'lora')}{rank}")
    if steps:
        planned = number(plan.get("max_steps"))
        facts.append(f"step {count(max(steps))}" + (f" of {count(planned)}" if planned else ""))
    seconds = _mapping(manifest.get("resources")).get("seconds")
    facts += [duration(seconds)] if number(seconds) is not None else []
    if manifest.get("started"):
        facts.append(str(manifest["started"]).replace("T", " ").replace("Z", " UTC"))
    facts += [str(manifest["stopped_because"])] if manifest.get("stopped_because") else []
    failed = _mapping(_mapping(manifest.get("training")).get("failed"))
    names = [str(name) for name, why in failed.items() if why]
    return [*facts, f"failed: {', '.join(names)}"] if names else facts


def _score_parts(manifest: Mapping) -> Iterator[tuple[str, Mapping[str, Mapping]]]:
    """(adapter or "", scores): those of the run, then those that adapters carry themselves."""
    scores = dict(_mappings(manifest.get("scores")))
    if scores:
        yield "", scores
    for name, adapter in _mappings(manifest.get("adapters")):
        own = dict(_mappings(adapter.get("scores")))
        if own:
            yield name, own


def _verdict_part(adapter: str, scores: Mapping[str, Mapping]) -> dict:
    """The first score speaks; where others speak against it, that is said below."""
    metric, score = next(iter(scores.items()))
    judged = verdict(metric, score)
    cells = score_cells(score)
    others = {name: verdict(name, values) for name, values in scores.items() if name != metric}
    notes = [
        f"But {other.headline} in {metric_name(name)}."
        for name, other in others.items()
        if other.kind != judged.kind and other.kind != "unclear"
    ]
    agreeing = [metric_name(name) for name, other in others.items() if other.kind == judged.kind]
    if agreeing and judged.kind != "unclear":
        notes.insert(0, f"{judged.kind.capitalize()} too: {', '.join(agreeing)}.")
    return {
        "adapter": adapter,
        "kind": judged.kind,
        "headline": judged.headline,
        "detail": judged.detail,
        "base": cells["base"],
        "tuned": cells["tuned"],
        "notes": notes,
    }


def _score_table(index: int, adapter: str, scores: Mapping[str, Mapping]) -> dict:
    rows = [
        {
            **score_cells(score),
            "name": metric_name(name),
            "kind": verdict(name, score).kind,
            "lower": score.get("higher_is_better") is False,
            "records": count(score.get("num_records")),
        }
        for name, score in scores.items()
    ]
    return {"adapter": adapter, "rows": rows, "figure": score_figure(scores, f"scores{index}")}


def _why_no_verdict(run: Run) -> str:
    if run.status in ("interrupted", "stopped", "failed"):
        return "The run ended before base and tuned were scored on the same records."
    if run.status == "running":
        return "The run has not come to the scoring of base and tuned yet."
    return "Base and tuned were not scored. lorica eval does it on held-out records."


def _alarms(run: Run) -> list[str]:
    found = [str(e.get("text", "")) for e in run.events if e.get("kind") == "warning"]
    return list(dict.fromkeys(found))


def _event(event: Mapping) -> dict:
    kind, text = str(event.get("kind", "")), str(event.get("text", ""))
    return {"step": count(event.get("step")), "kind": kind, "text": text}


def _courses(curves: Sequence[Curves]) -> list[str]:
    return [line for one in curves for line in _course(one, named=len(curves) > 1)]


def _course(curves: Curves, *, named: bool) -> list[str]:
    """What the curves say, in words."""
    prefix = f"{curves.adapter}: " if named else ""
    lines = []
    losses = curves.get("loss")[1]
    if len(losses) >= 2:
        means = smoothed(losses)
        line = f"{prefix}The loss went from {loss_text(losses[0])} to {loss_text(means[-1])}"
        back = means[-1 - max(1, len(means) // 10)]
        if len(means) >= 30 and means[-1] < back * 0.985:
            line += "; it was still falling at the end: more steps may help"
        lines.append(line + ".")
    eval_steps, evals = curves.get("eval_loss")
    if evals:
        best = min(range(len(evals)), key=evals.__getitem__)
        lowest = f"step {count(eval_steps[best])} ({loss_text(evals[best])})"
        line = f"{prefix}The eval loss was lowest at {lowest}"
        if best < len(evals) - 1:
            line += (
                f" and {loss_text(evals[-1])} at the last evaluation (step {count(eval_steps[-1])})"
            )
        lines.append(line + ".")
    return [" ".join(lines)] if lines else []


def _resumptions(run: Run) -> list[str]:
    resumed = run.manifest.get("resumed")
    if not isinstance(resumed, list):
        return []
    return [
        f"Resumed from step {count(r.get('step'))} ({r.get('at', '')})."
        for r in resumed
        if isinstance(r, dict)
    ]


def _evaluations(rows: Sequence[Mapping]) -> dict | None:
    found = [row for row in rows if any(key.startswith("eval_") for key in row)]
    names = list(dict.fromkeys(key for row in found for key in row if key.startswith("eval_")))
    names = [name for name in names if any(number(row.get(name)) is not None for row in found)]
    if not names:
        return None
    named = len({row.get("adapter") for row in found}) > 1
    header = (["adapter"] if named else []) + [
        "step",
        "epoch",
        *(metric_name(name) for name in names),
    ]
    cells = []
    for row in found:
        epoch = number(row.get("epoch"))
        start = [str(row.get("adapter", ""))] if named else []
        start += [count(row.get("step")), fixed(epoch, 2)]
        cells.append([*start, *(_plain_number(row.get(name)) for name in names)])
    return {"header": header, "rows": cells, "named": named}


def _sample(sample: Mapping) -> dict:
    after, before = str(sample.get("after") or ""), str(sample.get("before") or "")
    references = [str(one) for one in sample.get("references") or []]
    nearest = nearest_reference(after, references)
    reference = [
        Piece(p.text, "same" if p.kind == "same" else "rest")
        for p in marked(_cut(nearest or ""), after)
    ]
    return {
        "adapter": str(sample.get("adapter") or ""),
        "input": _cut(str(sample.get("input") or "")),
        "before": _compared(before, nearest_reference(before, references)),
        "after": _compared(after, nearest),
        "reference": (reference, max(0, len(nearest or "") - SAMPLE_LENGTH)),
        "num_references": len(references),
    }


def _compared(output: str, reference: str | None) -> tuple[list[Piece], int]:
    return marked(_cut(output), reference), max(0, len(output) - SAMPLE_LENGTH)


def _cut(text: str) -> str:
    return text[:SAMPLE_LENGTH]


def _split(name: str, split: Mapping) -> dict:
    lengths = _mapping(split.get("length_percentiles"))
    tokens, trained = number(split.get("num_tokens")), number(split.get("num_trained_tokens"))
    records, truncated = number(split.get("num_records")), number(split.get("num_truncated"))
    share = f" ({_percent(trained / tokens)})" if tokens and trained is not None else ""
    cut = f" ({_percent(truncated / records)})" if records and truncated else ""
    prefix = "lengths-" + re.sub(r"\W", "_", name)
    return {
        "name": name,
        "path": _short(split.get("path")),
        "format": str(split.get("format", "")),
        "records": count(records),
        "tokens": count(tokens),
        "trained": count(trained) + share,
        "p50": count(lengths.get("p50")),
        "p95": count(lengths.get("p95")),
        "max": count(lengths.get("max")),
        "truncated": count(truncated) + cut,
        "statement": str(split.get("statement") or ""),
        "figure": length_figure(_mapping(split.get("length_histogram")), prefix),
        "example": marked_parts(split.get("example")),
    }


def marked_parts(tokens: object) -> list[dict]:
    """Neighbouring tokens of one kind joined, line ends shown."""
    parts: list[dict] = []
    for token in tokens if isinstance(tokens, list | tuple) else []:
        if not (isinstance(token, list | tuple) and len(token) == 2):
            continue
        text, trained = str(token[0]).replace("\n", "⏎\n"), bool(token[1])
        if parts and parts[-1]["trained"] == trained:
            parts[-1]["text"] += text
        else:
            parts.append({"text": text, "trained": trained})
    return parts[:EXAMPLE_TOKENS]


def _resources(manifest: Mapping) -> list[dict]:
    resources = _mapping(manifest.get("resources"))
    base = number(_mapping(manifest.get("base")).get("num_parameters"))
    own = [number(one.get("num_parameters")) for _, one in _mappings(manifest.get("adapters"))]
    trained = sum(value for value in own if value is not None) if own else 0
    share = f"{100 * trained / base:.2f} % of {parameters(base)}" if trained and base else ""
    threads = number(resources.get("num_threads"))
    planned = number(resources.get("planned_memory_bytes"))
    tiles = [
        ("time", duration(resources.get("seconds")), ""),
        ("tokens per second", count(resources.get("tokens_per_second")), ""),
        (
            "peak memory",
            size(resources.get("peak_memory_bytes")),
            f"{size(planned)} planned" if planned else "",
        ),
        (
            "device",
            str(resources.get("device") or "–"),
            f"{count(threads)} threads" * bool(threads),
        ),
        ("trained parameters", parameters(trained or None), share),
        ("adapter on disk", size(resources.get("adapter_bytes")), ""),
    ]
    return [
        {"name": name, "value": value, "note": note} for name, value, note in tiles if value != "–"
    ]


def _usage(run: Run) -> Iterator[dict]:
    names = list(_mapping(run.manifest.get("adapters")))
    for name in names or ["adapter"]:
        folder = _adapter_folder(run, name, alone=len(names) <= 1)
        if folder is None:
            continue
        lines = [
            shell_line("lorica", "chat", str(run.path)),
            shell_line("lorica", "eval", str(folder), "--data") + " FILE",
        ]
        if merges(run.manifest, name):
            lines.append(shell_line("lorica", "merge", str(folder), "--output-dir") + " DIR")
        yield {
            "adapter": name if len(names) > 1 else "",
            "shell": "\n".join(lines if len(names) <= 1 else lines[1:]),
            "lorica": lorica_snippet(run.manifest, str(folder), name),
            "peft": peft_snippet(run.manifest, str(folder)) if is_for_peft(folder) else "",
        }


def _adapter_folder(run: Run, name: str, *, alone: bool) -> Path | None:
    stated = _mapping(_mapping(run.manifest.get("adapters")).get(name)).get("path")
    usual = run.path / ADAPTER if alone else run.path / ADAPTERS / name
    candidates = [usual] + ([run.path / str(stated), Path(str(stated))] if stated else [])
    return next((folder for folder in candidates if os.path.isdir(folder)), None)


def _environment(manifest: Mapping) -> list[tuple[str, str]]:
    base = _mapping(manifest.get("base"))
    kind = " · ".join(str(base[key]) for key in ("architecture", "dtype") if base.get(key))
    rows = [
        ("base", str(base.get("name") or "")),
        ("base digest", str(base.get("digest") or "")),
        ("architecture", kind),
    ]
    for name, split in _mappings(manifest.get("data")):
        rows.append((f"{name} data", str(split.get("path") or "")))
        rows.append((f"{name} data digest", str(split.get("digest") or "")))
    rows += [("seed", str(manifest["seed"]))] if manifest.get("seed") is not None else []
    rows.append(("lorica", str(manifest.get("lorica") or "")))
    versions = _mapping(manifest.get("versions"))
    rows += [(str(name), str(version)) for name, version in versions.items() if name != "lorica"]
    rows += [(key, str(manifest.get(key) or "")) for key in ("started", "ended")]
    return [(key, value) for key, value in rows if value]


def _percent(share: float) -> str:
    return "< 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"


def _plain_number(value: object) -> str:
    amount = number(value)
    if amount is None:
        return "–"
    return rate(amount) if 0 < abs(amount) < 1e-3 else fixed(amount, max(2, decimals(abs(amount))))


def _mapping(value: object) -> Mapping:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: object) -> list[tuple[str, Mapping]]:
    return [
        (str(key), inner) for key, inner in _mapping(value).items() if isinstance(inner, Mapping)
    ]


def _short(path: object) -> str:
    """The last two parts of a path or an id: enough to know it by, no home folder."""
    return "/".join(part for part in str(path or "").replace("\\", "/").split("/")[-2:] if part)
