"""PEFT's adapter_config.json, read strictly.

The keys are those of PEFT 0.21. A key that would change the arithmetic is an error unless it stands
at the value that changes nothing. No module that the file names is imported, no path is followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lorica.attach.tokens import Choice
from lorica.errors import AdapterFileError, ConfigError, nearest
from lorica.methods.dora import DoRA
from lorica.methods.lora import LoRA
from lorica.methods.patterns import Pattern, spelling

PEFT_VERSION = "0.21.2"
"""The version whose layout is written."""

OTHER_KINDS = ("VERA", "LOHA", "LOKR", "HIRA", "IA3", "ROAD", "ADALORA")
"""What is read besides LORA: see `peft_kinds`."""
PROMPT_KINDS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
"""And: see `peft_prompts`."""

TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "text-classification": "SEQ_CLS",
    "seq2seq": "SEQ_2_SEQ_LM",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "feature-extraction": "FEATURE_EXTRACTION",
}
HEADS_OF_PEFT = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that PEFT trains whole for a task by itself, whether the model has them or not."""

NEUTRAL: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
"""Keys of PEFT that Lorica's LoRA does not have, and the value at which they change nothing."""

NO_EFFECT = {
    "auto_mapping": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "megatron_core": "megatron.core",
    "peft_version": PEFT_VERSION,
    "qalora_group_size": 16,
    "revision": None,
    "runtime_config": None,
    "eva_config": None,
}
"""Keys that say nothing of a trained adapter's arithmetic (the layer tells fan_in_fan_out)."""

_EDITS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
PLAIN_INITS = {
    True: "kaiming",
    False: "random",
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
}
# Of these only the start differs, and the file holds what came of it.
_OTHER_INITS = ("eva", "mica")

_KINDS: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "target_modules": (list, str, type(None)),
    "exclude_modules": (list, str, type(None)),
    "target_parameters": (list, type(None)),
    "modules_to_save": (list, type(None)),
    "trainable_token_indices": (list, dict, type(None)),
    "layers_to_transform": (list, int, type(None)),
    "layers_pattern": (list, str, type(None)),
    "init_lora_weights": (bool, str),
    "peft_type": (str,),
    "task_type": (str, type(None)),
    "base_model_name_or_path": (str, type(None)),
}
_DEFAULTS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "init_lora_weights": True,
}


@dataclass(frozen=True)
class PeftConfig:
    """What an adapter_config.json says, checked.

    Attributes:
        method: the settings as Lorica writes them.
        target_modules: suffixes, one regular expression, or None where the file leaves it to PEFT.
        exclude_modules, target_parameters, modules_to_save, layers_to_transform, layers_pattern: as
            in PEFT.
        tokens: trainable_token_indices in the order of the file's rows.
        task: Lorica's name of the task, or None.
        base_name: the base that the adapter was made for, or None.
    """

    method: LoRA
    target_modules: tuple[str, ...] | str | None
    exclude_modules: tuple[str, ...] | str = ()
    target_parameters: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    tokens: Choice = ()
    task: str | None = None
    base_name: str | None = None

    def rank_at(self, path: str) -> int:
        """The rank that PEFT would give the layer (or parameter) at `path`."""
        return _value_at(self.method.rank_pattern, path, self.method.r)

    def alpha_at(self, path: str) -> float:
        """The lora_alpha that PEFT would give the layer (or parameter) at `path`."""
        return _value_at(self.method.alpha_pattern, path, self.method.lora_alpha)

    def selects(self, path: str) -> bool | None:
        """Whether PEFT would adapt the module at `path`; None where the file does not say which."""
        if self.target_modules is None:
            return None if not self.target_parameters else False
        if self.target_modules == "all-linear":
            return None
        if _matches(self.exclude_modules, path) or self.saves_whole(path):
            return False
        if not _matches(self.target_modules, path):
            return False
        return isinstance(self.target_modules, str) or self._in_layers(path)

    def method_at(self, path: str) -> LoRA:
        """The settings of the layer (or parameter) at `path`."""
        own = {"r": self.rank_at(path), "lora_alpha": self.alpha_at(path)}
        return replace(self.method, **own, rank_pattern={}, alpha_pattern={})

    def saves_whole(self, path: str) -> bool:
        """Whether the module at `path` is, or lies in, one of modules_to_save."""
        return any(_ends(head, name) for head in _heads(path) for name in self.modules_to_save)

    def may_save_whole(self, path: str) -> bool:
        """Likewise by PEFT's rule for finding them, which takes "pre_classifier" for "classifier"
        too.
        """
        return any(head.endswith(name) for head in _heads(path) for name in self.modules_to_save)

    def selects_parameter(self, path: str) -> bool:
        """Whether PEFT would adapt the bare parameter at `path`."""
        return any(_ends(path, name) for name in self.target_parameters)

    def _in_layers(self, path: str) -> bool:
        if not self.layers_to_transform:
            return True
        parts = path.split(".")
        for i in range(1, len(parts) - 1):  # a number between a list's name and the layer's
            named = not self.layers_pattern or parts[i - 1] in self.layers_pattern
            if parts[i].isdigit() and named and (i > 1 or self.layers_pattern):
                return int(parts[i]) in self.layers_to_transform
        return False


def parse_config(raw: Mapping[str, Any], where: str) -> PeftConfig:
    """Check the contents of an adapter_config.json.

    Raises:
        AdapterFileError: what makes it unusable; everything at once.
    """
    problems = _kind_problems(raw) or _value_problems(raw)
    if not problems:
        try:
            return _config(raw)
        except ConfigError as error:
            problems = [error.what, *error.problems]
    raise AdapterFileError(
        f"{where} cannot be used",
        problems=problems[:20],
        expected="a method of PEFT that Lorica has too (lorica methods), in its plain form",
    )


def _kind_problems(raw: Mapping[str, Any]) -> list[str]:
    """Unknown keys, and values of the wrong type."""
    if raw.get("peft_type") != "LORA":
        kinds = ", ".join(("LORA", *OTHER_KINDS, *PROMPT_KINDS))
        return [f"peft_type is {str(raw.get('peft_type'))[:40]!r}; of PEFT's {kinds} are read"]
    problems = []
    for key, value in raw.items():
        if key in _KINDS:
            wrong_bool = isinstance(value, bool) and bool not in _KINDS[key]
            if wrong_bool or not isinstance(value, _KINDS[key]):
                problems.append(f"{key} is {_short(value)}, of the wrong type")
        elif key in NO_EFFECT:
            continue
        elif key in NEUTRAL:
            if value != NEUTRAL[key] and value not in (None, False) and value != {}:
                problems.append(f"{key} is {_short(value)}: {_why(key)}")
        elif value not in (None, False) and value not in ([], {}):
            near = nearest(key, [*_KINDS, *NEUTRAL])
            hint = f"; did the writer mean {near}?" if near else ""
            problems.append(f"unknown key {key[:60]!r} with the value {_short(value)}{hint}")
    return problems


def _why(key: str) -> str:
    reasons = {
        "bias": "trained biases are not part of plain LoRA; merge the adapter in PEFT instead",
        "lora_bias": "a bias on lora_B is not part of plain LoRA",
        "alora_invocation_tokens": "an activated LoRA acts on a part of the sequence only",
        "layer_replication": "the base would have to be made deeper first",
        "loftq_config": "LoftQ changed the base; convert the adapter in PEFT first",
    }
    return reasons.get(key, "it changes the arithmetic in a way that Lorica does not know")


def _value_problems(raw: Mapping[str, Any]) -> list[str]:
    problems = []
    for key in (
        "target_modules",
        "exclude_modules",
        "target_parameters",
        "modules_to_save",
        "layers_pattern",
    ):
        value = raw.get(key)
        if isinstance(value, list) and not all(isinstance(v, str) and v for v in value):
            problems.append(f"{key} holds something that is no name")
    layers = raw.get("layers_to_transform")
    if isinstance(layers, list) and not all(type(v) is int and v >= 0 for v in layers):
        problems.append("layers_to_transform holds something that is no number of a layer")
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_EDITS_BASE):
        problems.append(
            f"init_lora_weights is {init!r}: it changed the base too, so these tensors do not fit "
            "the plain base; in PEFT, save with path_initial_model_for_weight_conversion instead"
        )
    elif init not in PLAIN_INITS and init not in _OTHER_INITS:
        problems.append(f"init_lora_weights is {_short(init)}, which is not known")
    return problems


def _config(raw: Mapping[str, Any]) -> PeftConfig:
    value = {**_DEFAULTS, **raw}
    targets = _names(value.get("target_modules"))
    parameters = tuple(value.get("target_parameters") or ())
    excluded = _names(value.get("exclude_modules")) or ()
    layers = value.get("layers_to_transform")
    numbers = (layers,) if isinstance(layers, int) else tuple(layers or ())
    whole = tuple(dict.fromkeys(value.get("modules_to_save") or ()))
    pattern = value.get("layers_pattern") or ()
    kind = DoRA if value["use_dora"] else LoRA
    method = kind(
        r=value["r"],
        lora_alpha=value["lora_alpha"],
        lora_dropout=value["lora_dropout"],
        target_modules=_settings_targets(targets, parameters),
        exclude_modules=(_regex(excluded),) if isinstance(excluded, str) else excluded,
        rank_pattern=dict(value["rank_pattern"]),
        alpha_pattern=dict(value["alpha_pattern"]),
        use_rslora=value["use_rslora"],
        layers_to_transform=numbers or None,
        modules_to_save=whole,
        trainable_token_indices=value.get("trainable_token_indices") or (),
        init_lora_weights=PLAIN_INITS.get(value["init_lora_weights"], "kaiming"),  # pyright: ignore[reportArgumentType]
    )
    for text in (targets, excluded):  # refuse now what cannot be matched later
        if isinstance(text, str) and text != "all-linear":
            Pattern(_regex(text))
    for key in (*method.rank_pattern, *method.alpha_pattern):
        Pattern(_regex(key), suffix=True)
    return PeftConfig(
        method,
        targets,
        excluded,
        parameters,
        whole,
        numbers,
        (pattern,) if isinstance(pattern, str) else tuple(pattern),
        value.get("trainable_token_indices") or (),
        next((task for task, word in TASK_TYPES.items() if word == value.get("task_type")), None),
        value.get("base_model_name_or_path") or None,
    )


def _settings_targets(
    targets: tuple[str, ...] | str | None, parameters: tuple[str, ...]
) -> tuple[str, ...] | str:
    if isinstance(targets, str):
        return targets if targets == "all-linear" else (_regex(targets), *parameters)
    return (*(targets or ()), *parameters) or "auto"


def _names(value: list[str] | str | None) -> tuple[str, ...] | str | None:
    return tuple(sorted(set(value))) if isinstance(value, list) else value


def _regex(text: str) -> str:
    """A pattern of a file, marked so that it is read as the regular expression that it is there."""
    return text if spelling(text) != "glob" else f"regex:{text}"


def _matches(names: tuple[str, ...] | str, path: str) -> bool:
    if isinstance(names, str):
        return names == path if spelling(names) == "name" else Pattern(_regex(names)).matches(path)
    return any(_ends(path, name) for name in names)


def _heads(path: str) -> list[str]:
    """The path, and those of everything that it lies in."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _value_at(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    for key, value in patterns.items():
        if Pattern(_regex(key), suffix=True).matches(path):
            return value
    return default


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
