"""The model card of an adapter: README.md with the front matter that the hub reads, from the
contents of run.json.
"""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import yaml

from lorica.records.atomic import write_file
from lorica.records.phrases import (
    CHOSEN_BY_SCORED,
    chosen_by_scored,
    count,
    duration,
    metric_name,
    number,
    parameters,
    score_cells,
    verdict,
)

PIPELINE_TAGS = {"causal-lm": "text-generation", "text-classification": "text-classification"}
AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
EMBEDDED = "embedded"
"""The base that travels with lorica, and is nowhere else."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|~&])")


def write_card(folder: str | Path, manifest: Mapping, *, adapter: str) -> Path:
    """Write README.md into the adapter folder; see `model_card`."""
    text = model_card(manifest, adapter=adapter, for_peft=is_for_peft(folder))
    return write_file(Path(folder) / "README.md", text.encode("utf-8", "replace"))


def is_for_peft(folder: str | Path) -> bool:
    """Whether the adapter in a folder is in PEFT's layout, and not in one of our own."""
    try:
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "peft_type" in config


def model_card(manifest: Mapping, *, adapter: str, for_peft: bool = True) -> str:
    """The card of one adapter.

    Args:
        manifest: the contents of run.json; also "license" and "settings" (training settings by
            name) where given.
        adapter: its name; its own scores win over those of the run.
        for_peft: whether PEFT loads its files.
    """
    matter = _front_matter(manifest, adapter, for_peft)
    front = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)
    scores = scores_of(manifest, adapter)
    public = {**manifest, "base": {**manifest.get("base", {}), "name": _public_name(manifest)}}
    parts = [
        f"---\n{front}---",
        f"# {escaped(adapter)}",
        _introduction(manifest, adapter),
        *(_score_part(manifest, scores) if scores else []),
        "## How to use it",
        _for_peft(public, adapter, for_peft),
        f"With Lorica:\n\n```python\n{lorica_snippet(public, 'path/to/this/folder', adapter)}\n```",
        "## How it was trained",
        _table(("setting", "value"), _settings(manifest, adapter), code=1),
        *_data_part(manifest),
        "## With what",
        _table(
            ("package", "version"), [(k, str(v)) for k, v in manifest.get("versions", {}).items()]
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def scores_of(manifest: Mapping, adapter: str) -> Mapping[str, Mapping]:
    """The scores of one adapter: its own where it has them, else those of the run."""
    own = manifest.get("adapters", {}).get(adapter, {})
    return own.get("scores") or manifest.get("scores") or {}


def peft_snippet(manifest: Mapping, folder: str) -> str:
    """Python that loads the adapter with PEFT and transformers."""
    if base_name(manifest) == EMBEDDED:
        return (
            "import lorica\n"
            "from peft import PeftModel\n"
            "from transformers import AutoTokenizer\n\n"
            f"base = {_load_model(manifest)}\n"
            f"model = PeftModel.from_pretrained(base, {_python(folder)})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({_python(folder)})"
        )
    auto = AUTO_CLASSES.get(str(manifest.get("task")), "AutoModel")
    labels = manifest.get("num_labels")
    argument = (
        f", num_labels={labels}" if auto.endswith("SequenceClassification") and labels else ""
    )
    return (
        "from peft import PeftModel\n"
        f"from transformers import {auto}, AutoTokenizer\n\n"
        f"base = {auto}.from_pretrained({_python(base_name(manifest))}{argument})\n"
        f"model = PeftModel.from_pretrained(base, {_python(folder)})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({_python(folder)})"
    )


def lorica_snippet(manifest: Mapping, folder: str, adapter: str) -> str:
    """Python that loads the adapter with Lorica."""
    return (
        "import lorica\n\n"
        f"model = {_load_model(manifest)}\n"
        f"lorica.load_adapter(model, {_python(folder)}, name={_python(adapter)})\n"
        f"with lorica.activate(model, {{{_python(adapter)}: 1.0}}):\n"
        "    ..."
    )


def _load_model(manifest: Mapping) -> str:
    """The call that loads the base with Lorica."""
    task = manifest.get("task")
    argument = f", task={_python(str(task))}" if task else ""
    return f"lorica.load_model({_python(base_name(manifest))}{argument})"


def merges(manifest: Mapping, adapter: str) -> bool:
    """Whether an adapter can become weights of its base, as far as the run knows."""
    own = dict(manifest.get("adapters", {})).get(adapter)
    return not isinstance(own, Mapping) or own.get("merges") is not False


def shell_line(*words: str) -> str:
    return shlex.join(words)


def base_name(manifest: Mapping) -> str:
    return str(manifest.get("base", {}).get("name") or "path/to/the/base")


def escaped(text: object) -> str:
    """`text` as one line of Markdown that reads as it stands."""
    line = " ".join(str(text).split())
    return _MARKDOWN.sub(r"\\\1", line)


def _for_peft(manifest: Mapping, adapter: str, for_peft: bool) -> str:
    """How PEFT loads the adapter, or why it should not."""
    own = manifest.get("adapters", {}).get(adapter, {})
    kinds = list(own.get("on") or ())
    first = len(kinds) - len(own.get("together") or ())
    if kinds:
        other = f"on top of another adapter ({escaped(', '.join(kinds[:first]))})" * (first > 0)
        beside = f"together with another adapter ({escaped(', '.join(kinds[first:]))})"
        how = " and ".join(filter(None, [other, beside * (first < len(kinds))]))
        return (
            f"It was trained {how}, which lies in the folder `on` and acts with it: Lorica loads "
            "both, and PEFT would load this one alone."
        )
    return (
        f"With PEFT:\n\n```python\n{peft_snippet(manifest, 'path/to/this/folder')}\n```" * for_peft
    )


def _front_matter(manifest: Mapping, adapter: str, for_peft: bool) -> dict:
    front: dict = {}
    if _is_hub_id(base_name(manifest)):  # the hub refuses a path here
        front["base_model"] = base_name(manifest)
    below = manifest.get("adapters", {}).get(adapter, {}).get("on")
    front["library_name"] = "peft" if for_peft and not below else "lorica"
    tag = PIPELINE_TAGS.get(str(manifest.get("task")))
    if tag:
        front["pipeline_tag"] = tag
    if manifest.get("license"):
        front["license"] = str(manifest["license"])
    named = [f"base_model:adapter:{base_name(manifest)}"] if "base_model" in front else []
    kinds = dict.fromkeys([*_kinds_beside(manifest, adapter), _kind(manifest)])
    front["tags"] = [*named, *kinds, "lorica", "transformers"]
    results = _results(manifest, adapter)
    if tag and results:
        dataset = _data_name(manifest)
        task = {"type": tag}
        result = {"task": task, "dataset": {"name": dataset, "type": dataset}, "metrics": results}
        front["model-index"] = [{"name": adapter, "results": [result]}]
    return front


def _results(manifest: Mapping, adapter: str) -> list[dict]:
    scores = scores_of(manifest, adapter)
    return [
        {"type": name, "name": metric_name(name), "value": number(score.get("tuned"))}
        for name, score in scores.items()
        if number(score.get("tuned")) is not None
    ]


def _kind(manifest: Mapping) -> str:
    return str(manifest.get("method", {}).get("kind", "lora"))


def _kinds_beside(manifest: Mapping, adapter: str) -> list[str]:
    """The methods that train together with the adapter's own."""
    own = manifest.get("adapters", {}).get(adapter, {})
    return [str(part.get("kind")) for part in own.get("together") or ()]


def _is_hub_id(name: str) -> bool:
    """Two parts, as an id of the hub has, that do not look like a folder beside the run."""
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith(
        ("models/", "checkpoints/", "runs/", "data/")
    )


def _public_name(manifest: Mapping) -> str:
    """The base by its id, or by the last part of its path: where somebody's files lie has no place
    in a card.
    """
    name = base_name(manifest)
    if name == EMBEDDED or _is_hub_id(name):
        return name
    return f"path/to/{PurePosixPath(name.replace(chr(92), '/')).name}"


def _introduction(manifest: Mapping, adapter: str) -> str:
    base = manifest.get("base", {})
    own = manifest.get("adapters", {}).get(adapter, {})
    method = " with ".join([*_kinds_beside(manifest, adapter), _kind(manifest)])
    shown = _public_name(manifest).removeprefix("path/to/")
    words = f"An adapter ({escaped(method)}) for the base model {escaped(shown)}"
    details = []
    if own.get("num_parameters") is not None:
        details.append(f"{parameters(own['num_parameters'])} trained parameters")
    if base.get("num_parameters") is not None:
        details.append(f"{parameters(base['num_parameters'])} in the base")
    if base.get("digest"):
        details.append(f"base digest `{_code(base['digest'])}`")
    return words + (f" ({', '.join(details)})." if details else ".")


def _score_part(manifest: Mapping, scores: Mapping[str, Mapping]) -> list[str]:
    metric, score = next(iter(scores.items()))
    rows = []
    for name, values in scores.items():
        cells = score_cells(values)
        interval = cells["interval"] or "–"
        records = count(values.get("num_records"))
        rows.append(
            (
                metric_name(name),
                cells["base"],
                cells["tuned"],
                cells["difference"],
                interval,
                records,
            )
        )
    header = ("metric", "base", "tuned", "difference", "95 % interval", "records")
    note = "Base and tuned on the same records; the interval is of the paired difference."
    note += f" Scored {CHOSEN_BY_SCORED}." if chosen_by_scored(manifest) else ""
    sentence = escaped(verdict(metric, score).sentence)
    return [
        "## Is it better than the base?",
        sentence[:1].upper() + sentence[1:],
        _table(header, rows),
        note,
    ]


def _settings(manifest: Mapping, adapter: str) -> list[tuple[str, str]]:
    plan = {k: v for k, v in dict(manifest.get("plan", {})).items() if not isinstance(v, Mapping)}
    settings = {**dict(manifest.get("method", {})), **manifest.get("settings", {}), **plan}
    rows = [(key, _value(value)) for key, value in settings.items() if value is not None]
    for part in manifest.get("adapters", {}).get(adapter, {}).get("together") or ():
        named = ((f"{part.get('kind')}: {key}", value) for key, value in part.items())
        rows += [(name, _value(v)) for name, v in named if v is not None and ": kind" not in name]
    if "seed" not in settings and manifest.get("seed") is not None:
        rows.append(("seed", str(manifest["seed"])))
    seconds = manifest.get("resources", {}).get("seconds")
    return rows + ([("time", duration(seconds))] if number(seconds) is not None else [])


def _data_part(manifest: Mapping) -> list[str]:
    rows = []
    for name, split in manifest.get("data", {}).items():
        if isinstance(split, Mapping):
            place = PurePosixPath(str(split.get("path", "")).replace("\\", "/")).name
            digest = str(split.get("digest", ""))
            rows.append(
                (
                    str(name),
                    place,
                    count(split.get("num_records")),
                    str(split.get("format", "")),
                    digest,
                )
            )
    return (
        [_table(("split", "data", "records", "format", "SHA-256 of the records"), rows)]
        if rows
        else []
    )


def _data_name(manifest: Mapping) -> str:
    data = manifest.get("data", {})
    split = data.get("eval") or data.get("test") or data.get("train") or {}
    return PurePosixPath(str(split.get("path", "")).replace("\\", "/")).name or "held-out records"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]], *, code: int = 0) -> str:
    """A table in Markdown; the first `code` columns as code."""
    if not rows:
        return ""
    cells = [
        tuple(
            f"`{_code(cell)}`" if place < code else escaped(cell) for place, cell in enumerate(row)
        )
        for row in rows
    ]
    lines = [header, tuple("---" for _ in header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _python(text: str) -> str:
    """A Python string literal; no line of it can end a fenced block, for it has no newline."""
    return json.dumps(text, ensure_ascii=False)


def _code(text: object) -> str:
    """For a code span in a table: neither a backtick nor a bar can stand in it."""
    return " ".join(str(text).replace("`", "'").replace("|", "¦").split())
