"""What settings and records rule out before a run: effects that are none, faults that spoil it."""

from __future__ import annotations

from torch import nn

from lorica.base.known import known
from lorica.cli.images import OF_IMAGES
from lorica.cli.material import Material
from lorica.cli.voice import Voice
from lorica.config import Resolved
from lorica.data.encode import Encoded
from lorica.data.findings import Finding
from lorica.data.screen_tokens import Sight
from lorica.errors import CheckRefused, ConfigError


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
