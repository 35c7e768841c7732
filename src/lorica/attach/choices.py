"""The words that stand for a choice of layers: auto, all-linear, attention, mlp, and by part.

`auto` goes by the family where `families` knows it, else by structure, and gives its reason. It
adapts attention and feed-forward layers alike, where PEFT's table mostly says query and value only.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from lorica.attach.families import FAMILIES
from lorica.attach.survey import Place, Role, Survey, ends, suffix_of
from lorica.methods.gated import QUERY_VALUE
from lorica.methods.ia3 import ATTENTION_OUTPUT, FEEDFORWARD, KEY_VALUE, NOT_FEEDFORWARD

CHOICES = (
    "auto",
    "all-linear",
    "attention",
    "mlp",
    "key-value-feedforward",
    "query-value",
    "block-outputs",
    "feedforward-outputs",
)
"""The words that stand for a choice of layers."""

_WHY_ALL = (
    "LoRA on every linear layer of the blocks matches full fine-tuning where attention alone does "
    "not (QLoRA, arXiv 2305.14314, section 4)"
)
_WHY_NOT: dict[Role, str] = {
    "attention": "attention",
    "mlp": "feed-forward layer",
    "mixer": "state-space or recurrent layer",
    "experts": "routed expert: many weights that see few tokens each; all-linear takes it",
    "embedding": "embedding: name it to adapt it",
    "convolution": "convolution: name it to adapt it",
    "outside": "outside the repeated blocks",
    "head": "head or pooler: train it whole (modules_to_save) or name it",
    "router": "router or indexer: it chooses, rather than computes; name it to adapt it",
}


@dataclass(eq=False)
class Picked:
    """What is chosen so far, and what is wrong so far."""

    places: dict[str, Place] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    reason: str = ""

    def drop(self, path: str, why: str) -> None:
        if self.places.pop(path, None) is not None:
            self.left_out[path] = why


def choose(found: Survey, word: str, picked: Picked) -> None:
    """Fill `picked` with what one of CHOICES stands for, and say why."""
    if word == "auto":
        _choose_auto(found, picked)
    elif word == "all-linear":
        roles = {"attention", "mlp", "mixer", "experts", "outside"}
        _take(found, picked, roles, ("linear", "packed", "experts"))
        picked.reason = _count("all-linear: every linear layer but heads and routers", picked)
    elif word in _PARTS:
        _choose_parts(found, word, picked)
    else:
        roles = {"attention"} if word == "attention" else {"mlp", "experts"}
        _take(found, picked, roles, ("linear", "packed", "experts"))
        picked.reason = _count(f"{word}: the {word} layers of every block", picked)
        if not picked.places:
            there = Counter(p.role for p in found.places.values() if p.kind == "linear")
            roles_there = ", ".join(f"{role} ({n})" for role, n in there.items()) or "none"
            picked.problems.append(
                f"{word!r}: this model has no such layers; its linear layers are: {roles_there}"
            )


_PARTS: dict[str, dict[Role, tuple[str, ...]]] = {
    "key-value-feedforward": {"attention": KEY_VALUE, "mlp": FEEDFORWARD},
    "query-value": {"attention": QUERY_VALUE},
    "block-outputs": {"attention": ATTENTION_OUTPUT, "mlp": FEEDFORWARD},
    "feedforward-outputs": {"mlp": FEEDFORWARD},
}
"""Choice -> role of a layer -> the ends of the names that it takes."""


def _choose_parts(found: Survey, word: str, picked: Picked) -> None:
    """Layers by what they are called: keys and values, and the outputs of the parts of a block."""
    wanted = _PARTS[word]
    _take(found, picked, set(wanted), ("linear",))
    for path, place in list(picked.places.items()):
        if not _ends_any(path, wanted[place.role]) or (
            place.role == "mlp" and _ends_any(path, NOT_FEEDFORWARD)
        ):
            picked.drop(path, f"not among {word}")
    picked.reason = _count(f"{word}: {', '.join(Counter(map(suffix_of, picked.places)))}", picked)
    if not picked.places:
        picked.problems.append(f"{word!r}: no layer of this model is called so; name the layers")


def _ends_any(path: str, names: tuple[str, ...]) -> bool:
    return any(ends(path, name) for name in names)


def _take(found: Survey, picked: Picked, roles: set[str], kinds: tuple[str, ...]) -> None:
    denoiser = getattr(found.modules[""], "denoiser_name", None)  # of a text-to-image pipeline
    for path, place in found.places.items():
        if denoiser is not None and not path.startswith(f"{denoiser}."):
            picked.left_out[path] = f"another part of the pipeline than {denoiser}: name it"
        elif place.role in roles and place.kind in kinds and not place.refusal:
            picked.places[path] = place
        else:
            picked.left_out[path] = place.refusal or _WHY_NOT[place.role]
    picked.left_out |= {p: _WHY_NOT["router"] for p, b in found.bare.items() if b.role == "router"}


def _choose_auto(found: Survey, picked: Picked) -> None:
    """The table for known families; for others the linear layers of the blocks, or everything."""
    _take(found, picked, {"attention", "mlp", "mixer"}, ("linear", "packed"))
    where = ""
    if any("language_model" in path.split(".") for path in picked.places):
        where = " of the language model"
        for path in [p for p in picked.places if "language_model" not in p.split(".")]:
            picked.drop(path, "another tower than the language model: name it to adapt it")
    if not any(p.role in ("attention", "mixer") for p in picked.places.values()):
        _choose_by_structure(found, picked)
        return
    family = FAMILIES.get(found.model_type or "", ())
    names = [next((n for n in family if ends(path, n)), None) for path in picked.places]
    if any(names):
        for path, name in zip(list(picked.places), names, strict=True):
            if name is None:
                picked.drop(path, f"not among the default layers of {found.model_type}")
        layers = [name for name in family if name in names]
        text = f"auto: the defaults of {found.model_type}{where}"
    else:
        layers = list(Counter(suffix_of(path) for path in picked.places))
        kind = (
            f"{found.model_type!r} is not a known family" if found.model_type else "no known family"
        )
        text = f"auto: {kind}, so the linear layers of attention, feed-forward and mixers{where}"
    picked.reason = _count(f"{text}: {', '.join(layers)}", picked)
    if any(p.role == "experts" for p in found.places.values()):
        picked.reason += ". Routed experts are left out: all-linear takes them too"
    else:
        picked.reason += f". {_WHY_ALL}"


def _choose_by_structure(found: Survey, picked: Picked) -> None:
    """A model without attention: all linear layers and plain convolutions but heads."""
    for path, place in found.places.items():
        fits = place.kind in ("linear", "convolution")
        if fits and place.role in ("mlp", "outside", "convolution") and not place.refusal:
            if getattr(place.module, "groups", 1) == 1:
                picked.places[path] = place
                picked.left_out.pop(path, None)
            else:
                picked.left_out[path] = "grouped convolution: name it to adapt it"
    picked.reason = _count(
        f"auto: {found.model_type or 'this model'} has no attention blocks, so every linear layer "
        "and plain convolution but heads",
        picked,
    )


def _count(text: str, picked: Picked) -> str:
    return f"{text} ({len(picked.places)} places)"
