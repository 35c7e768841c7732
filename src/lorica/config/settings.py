"""What can be set for a run. A setting lives here once: name, type, range, default and help.

The help strings are what `lorica train --help` prints.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    model_validator,
)

from lorica.config.names import ALIASES
from lorica.config.words import Expects, describe, members, problem_of
from lorica.errors import ConfigError, nearest

DEFAULT_EPOCHS = 3.0
DEFAULT_DECAY_RATIO = 0.2

STATE = "state"
"""Marks a field of a method in its metadata that is no setting: see `methods.method.state`."""

REQUIRED = object()
"""The default of a setting that has none."""


def _one_line(text: str) -> str:
    if not text.strip() or any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise ValueError("empty, or with control characters")
    return text


def _path(text: str) -> str:
    """Only a leading `~/` is expanded: nothing else in a path is read as an instruction."""
    return str(Path(text).expanduser()) if text.startswith("~/") else text


def _quantizer(word: Any) -> Any:
    """A truth for the usual one, as other tools' `load_in_4bit` has it."""
    return {True: "nf4", False: None}.get(word, word) if isinstance(word, bool) else word


def _share_or_number(size: float) -> float:
    if isinstance(size, float) and size >= 1:
        raise ValueError("neither a share nor a number of records")
    return size


PathText = Annotated[str, AfterValidator(_one_line), AfterValidator(_path), Expects("a path")]
Word = Annotated[str, AfterValidator(_one_line), Expects("a text in one line")]
Words = Annotated[tuple[Word, ...], Strict(False)]  # YAML and JSON know lists only


class Settings(BaseModel):
    """Strict, frozen settings. Whatever is wrong with them comes as one ConfigError.

    Every problem begins with the name of its setting, so that a caller can say where that was set.
    """

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, values: Any, handler: Any) -> Any:
        try:
            made = handler(values)
        except ValidationError as error:
            problems = list(_field_problems(cls, values, error))
            raise ConfigError(f"{cls.__name__} cannot be used", problems=problems) from None
        problems = made.contradictions()
        if problems:
            raise ConfigError(f"{cls.__name__} cannot be used", problems=problems)
        return made

    def contradictions(self) -> list[str]:
        """What cannot hold together, each in a sentence that begins with a setting's name."""
        return []


def _field_problems(kind: type[Settings], values: Any, error: ValidationError) -> Iterator[str]:
    seen = set()
    for item in error.errors(include_url=False, include_context=False):
        key = str(item["loc"][0]) if item["loc"] else kind.__name__
        if key in seen:  # a union reports once per member
            continue
        seen.add(key)
        if item["type"] == "missing":
            yield f"{key} is missing; it is {kind.model_fields[key].description}"
        elif key not in kind.model_fields:
            near = nearest(key, [*kind.model_fields, *ALIASES])
            near = ALIASES.get(near, near) if near else None
            yield f"{key} is not a setting" + (f"; did you mean {near}?" if near else "")
        else:
            field = kind.model_fields[key]
            given = values[key] if isinstance(values, Mapping) else item["input"]
            yield problem_of(key, given, field.annotation, expected_of(kind, key))


class TrainSettings(Settings):
    """How training goes. Frozen; every value is checked when the object is made.

    Raises:
        ConfigError: values of a wrong type, out of range, unknown or contradicting; all at once.
    """

    learning_rate: float = Field(
        default=2e-4, gt=0, le=1, description="peak learning rate of AdamW"
    )
    batch_size: int = Field(default=16, ge=1, le=65536, description="records per micro-batch")
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, le=65536, description="micro-batches per optimizer step"
    )
    epochs: float | None = Field(
        default=None,
        gt=0,
        le=100_000,
        description="passes over the data; 3 where max_steps is not given either. With both, the "
        "first to be reached ends the run",
    )
    max_steps: int | None = Field(
        default=None, ge=1, description="optimizer steps after which the run ends"
    )
    max_length: int | None = Field(
        default=None,
        ge=2,
        le=16_777_216,
        description="tokens per record, longer ones are truncated; null: as the data needs and the "
        "model allows",
    )
    optim: Literal["adamw", "adamw_8bit"] = Field(
        default="adamw",
        description="the optimizer: AdamW, or AdamW with moments in 8 bits, for a quarter of their "
        "memory",
    )
    loraplus_lr_ratio: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="LoRA+: the learning rate of LoRA's B is so many times that of A; the paper "
        "advises 16",
    )
    weight_decay: float = Field(
        default=0.0, ge=0, le=10, description="decoupled weight decay of AdamW"
    )
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of AdamW's first moment")
    adam_beta2: float = Field(
        default=0.999, ge=0, lt=1, description="decay of AdamW's second moment"
    )
    adam_epsilon: float = Field(default=1e-8, gt=0, le=1, description="AdamW's epsilon")
    max_grad_norm: float = Field(
        default=1.0,
        ge=0,
        description="the gradient of each adapter is clipped to this norm; 0: no clipping",
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "wsd"] = Field(
        default="linear",
        description="course of the learning rate after warm-up: down to 0 in a line or a cosine, "
        "constant, or constant with a decay at the end (wsd)",
    )
    warmup_steps: int | None = Field(
        default=None, ge=0, description="optimizer steps in which the learning rate rises from 0"
    )
    warmup_ratio: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="the same as a share of all steps, where warmup_steps is not given",
    )
    decay_ratio: float = Field(
        default=DEFAULT_DECAY_RATIO,
        gt=0,
        le=1,
        description="share of all steps in which wsd decays at the end",
    )
    seed: int = Field(
        default=0, ge=0, le=2**32 - 1, description="seed of everything random in the run"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="precision of the base and of its arithmetic; auto: what the device is fast in",
    )
    gradient_checkpointing: Literal["offload"] | bool = Field(
        default=False,
        description="recompute activations in the backward pass: less memory, more time; offload: "
        "what every layer was given waits in the host's memory meanwhile, on a GPU",
    )
    reuse_frozen_layers: Literal["memory", "disk"] | None = Field(
        default=None,
        description="run the layers below the lowest adapted one once per record and keep what "
        "comes out: in memory, or in a file of the user's cache folder, which later runs find; "
        "null: run them in every step",
    )
    packing: Literal["auto"] | bool = Field(
        default="auto",
        description="several records in a row, each seeing only itself; auto: where the model can",
    )
    share_prompts: bool = Field(
        default=True,
        description="what the prompts of packed records begin with in common goes through the base "
        "once per batch, where that changes nothing and saves at least 64 tokens",
    )
    eval_steps: int | None = Field(
        default=None, ge=1, description="evaluate every so many steps; null: after every epoch"
    )
    eval_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="records per batch in evaluation; null: batch_size",
    )
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="stop after so many evaluations without a better eval loss",
    )
    keep_best: bool = Field(
        default=True,
        description="keep the adapter of the best evaluation rather than of the last step",
    )
    save_steps: int | None = Field(
        default=None,
        ge=1,
        description="write a checkpoint every so many steps; null: with evaluations, as long as it "
        "takes little of the time",
    )
    save_total_limit: int = Field(
        default=2, ge=1, le=100_000, description="checkpoints that are kept"
    )
    logging_steps: int = Field(
        default=10, ge=1, description="write a row of metrics every so many steps"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        if filled.get("epochs") is None and filled.get("max_steps") is None:
            filled["epochs"] = DEFAULT_EPOCHS
        return filled

    def contradictions(self) -> list[str]:
        found = []
        if self.warmup_steps is not None and self.warmup_ratio:
            found.append(
                f"warmup_ratio={self.warmup_ratio} has no effect beside "
                f"warmup_steps={self.warmup_steps}; keep one"
            )
        if self.warmup_steps and self.max_steps and self.warmup_steps > self.max_steps:
            found.append(
                f"warmup_steps={self.warmup_steps} is more than max_steps={self.max_steps}; the "
                "learning rate would never reach its peak"
            )
        wsd = self.lr_scheduler_type == "wsd"
        if self.decay_ratio != DEFAULT_DECAY_RATIO and not wsd:
            found.append(
                f"decay_ratio={self.decay_ratio} has no effect with "
                f"lr_scheduler_type={self.lr_scheduler_type}; it belongs to wsd"
            )
        if wsd and self.warmup_ratio + self.decay_ratio > 1:
            found.append(
                f"decay_ratio={self.decay_ratio} and warmup_ratio={self.warmup_ratio} are together "
                "more than the whole run"
            )
        if self.max_steps:
            found += [
                f"{key}={value} is more than max_steps={self.max_steps}; it would never happen"
                for key in ("eval_steps", "save_steps")
                if (value := getattr(self, key)) and value > self.max_steps
            ]
        return found


class RunConfig(Settings):
    """What a run works on, what it writes, and how it is judged.

    Raises:
        ConfigError: values of a wrong type, out of range, unknown or contradicting; all at once.
    """

    model: PathText = Field(description="the base: a folder, or an id on the Hugging Face hub")
    data: PathText = Field(
        description="training records: a file, a folder, a hub id, or - for standard input"
    )
    eval_data: PathText | None = Field(
        default=None, description="records to evaluate on while training"
    )
    test_data: PathText | None = Field(
        default=None,
        description="records for the final scores; null: the evaluation records, which then also "
        "choose the adapter that is kept",
    )
    task: Literal["auto", "causal-lm", "text-classification", "seq2seq", "text-to-image"] = Field(
        default="auto", description="what the model learns to do; auto: as model and data say"
    )
    output_dir: PathText | None = Field(
        default=None, description="folder of the run; null: a new folder under runs/"
    )
    method: Annotated[
        Word | Annotated[tuple[Word | dict[str, Any], ...], Strict(False)],
        Expects("a method, or a list of methods"),
    ] = Field(
        default="lora",
        description="how the base is adapted; several train together as one adapter: "
        "prefix-tuning,parallel, or in YAML a list of words or of {method: word, setting: value}",
    )
    stages: (
        Annotated[
            tuple[dict[str, Any], ...], Strict(False), Expects("a list of mappings of settings")
        ]
        | None
    ) = Field(
        default=None,
        description="several trainings one after the other, each on top of the last, which it "
        "keeps: a list of {method: word, max_steps: N, setting: value}; settings beside it are "
        "those of all stages",
    )
    search: Annotated[dict[str, Any], Expects("a mapping of settings to choices")] | None = Field(
        default=None,
        description="what lorica search chooses, each from a list or a range: {r: [4, 8, 16], "
        "learning_rate: {low: 1e-4, high: 1e-3, log: true}}; and how it goes: sampler, candidates, "
        "at_once, rungs, keep, hopeless, standard_errors, spectrum, storage",
    )
    adapters: (
        Annotated[
            tuple[dict[str, Any], ...], Strict(False), Expects("a list of mappings with a name")
        ]
        | None
    ) = Field(
        default=None,
        description="several adapters that train together on one base, each to the same bits as "
        "alone: a list of {name: word, data: path, setting: value}; settings beside it are those "
        "of all adapters",
    )
    init_adapter: PathText | None = Field(
        default=None,
        description="a trained adapter to begin from, such as that of another task: a run folder "
        "or an adapter folder of the same kind; ranks and layers are its own where they are not "
        "given",
    )
    on_adapter: PathText | None = Field(
        default=None,
        description="a trained adapter to train this one on top of: it stays as it is, acts with "
        "this one and is saved with it; a run folder or an adapter folder of the same base",
    )
    data_seed: int | None = Field(
        default=None,
        ge=0,
        le=2**32 - 1,
        description="seed of which records are held out and scored; null: seed, or the first of "
        "seeds",
    )
    seeds: Annotated[tuple[int, ...], Strict(False), Expects("a list of whole numbers")] | None = (
        Field(
            default=None,
            description="a whole run for each of these seeds, in folders seed-N of output_dir; the "
            "reports say median and worst",
        )
    )
    columns: dict[str, str] | None = Field(
        default=None,
        description="columns of the data by their part: {prompt: question, completion: answer}",
    )
    format: Word | None = Field(
        default=None, description="format of the records; null: detected and printed"
    )
    train_on: Literal["completion", "last", "all"] = Field(
        default="completion", description="tokens that count in the loss: of the completion, or all"
    )
    separator: str | None = Field(
        default=None,
        description="text between prompt and completion; null: a line break if the data has none",
    )
    add_bos: bool | None = Field(
        default=None,
        description="begin records with the beginning-of-text token; null: as the tokenizer does",
    )
    eos_token: str | None = Field(
        default=None, description="token that ends a text; null: the tokenizer's own"
    )
    chat_template: PathText | None = Field(
        default=None, description="file with a Jinja chat template; null: the model's own"
    )
    system: str | None = Field(
        default=None, description="system message for records that have none"
    )
    eval_size: (
        Annotated[
            int | float,
            AfterValidator(_share_or_number),
            Expects("a whole number of records or a share below 1"),
        ]
        | None
    ) = Field(
        default=None,
        ge=0,
        description="records to hold out where the data has no evaluation part, as a number or a "
        "share; null: a tenth, at most 500; 0: no evaluation",
    )
    eval_records: int | None = Field(
        default=500,
        ge=1,
        description="at most so many records are scored with base and tuned; null: all",
    )
    metrics: Words | None = Field(
        default=None, description="scores to compute; null: those of the task"
    )
    max_new_tokens: int = Field(
        default=128,
        ge=1,
        le=1_048_576,
        description="tokens to generate at most per record when scoring",
    )
    num_samples: int = Field(
        default=8, ge=0, le=10_000, description="before-and-after samples shown in the report"
    )
    quantize: Annotated[
        Literal["nf4", "fp4", "int8"] | bool | None, BeforeValidator(_quantizer)
    ] = Field(
        default=None,
        description="store the base's linear layers in 4 bits (nf4, fp4) or 8 (int8): a quarter "
        "or half of the memory of bfloat16, some accuracy and some time; true: nf4",
    )
    shard_base: bool = Field(
        default=False,
        description="under torchrun: spread the base over the processes, which train on it "
        "together; each holds a share of every weight and gathers a layer at a time",
    )
    resolution: int | None = Field(
        default=None,
        ge=8,
        le=16384,
        description="text-to-image: pixels of a side, to which pictures are resized and cropped; "
        "null: as the base was made for",
    )
    num_inference_steps: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="text-to-image: denoising steps of a picture in the report; null: 30",
    )
    guidance_scale: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="text-to-image: how far pictures in the report follow their caption; null: "
        "the pipeline's own",
    )
    trust_remote_code: bool = Field(
        default=False, description="let the base bring and run Python code of its own"
    )
    revision: Word | None = Field(
        default=None, description="branch, tag or commit of a base on the hub"
    )
    cache_encoded: bool = Field(
        default=True,
        description="keep the token ids of large data sets in the user's cache folder, for "
        "the next run on them",
    )
    threads: int | None = Field(
        default=None, ge=1, le=4096, description="CPU threads; null: as many as there are cores"
    )

    def contradictions(self) -> list[str]:
        found = []
        if self.eval_data is not None and self.eval_size is not None:
            found.append(
                f"eval_size={self.eval_size} has no effect beside eval_data; keep one of them"
            )
        return found

    def num_held_out(self, num_records: int) -> int:
        """Records of `num_records` to set apart, where the data brings no part for evaluation."""
        if self.eval_size is None:
            return min(500, round(num_records / 10))
        if isinstance(self.eval_size, float):
            return round(self.eval_size * num_records)
        return self.eval_size


@dataclass(frozen=True)
class Preset:
    """A method's own name for settings of another one, such as rslora for LoRA with use_rslora.

    Attributes:
        method: the settings class.
        values: what the name stands for: settings of the method or of training.
        title: the method in a line, with its paper.
        proposes: further settings; what is given instead wins.
    """

    method: type
    values: Mapping[str, Any]
    title: str
    proposes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Union:
    """A name for several methods that train together as one adapter, such as mam.

    Attributes:
        parts: words of methods, the topmost last, with settings; what is given instead wins.
        title: the methods in a line, with their paper.
    """

    parts: tuple[tuple[str, Mapping[str, Any]], ...]
    title: str


@dataclass(frozen=True)
class Setting:
    """One thing that can be set, for whoever makes options, checks or pages of it.

    Attributes:
        key: the name in YAML and in Python.
        group: "run", "train", or the kind of the method it belongs to.
        annotation: the type.
        default: the default, or `REQUIRED`.
        help: what it does, in a line.
        expected: type and range in words.
        aliases: names that other tools use for it, accepted too.
    """

    key: str
    group: str
    annotation: Any
    default: Any
    help: str
    expected: str
    aliases: tuple[str, ...]

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The alternatives of its type."""
        return members(self.annotation)

    @property
    def flag(self) -> str:
        """The name on the command line."""
        return "--" + self.key.replace("_", "-")


def known_settings(
    methods: Mapping[str, type | Preset | Union] | None = None,
) -> dict[str, Setting]:
    """Everything that can be set with these methods (kind -> settings class), by name and in order.

    A setting that several methods share is listed once, with the first.
    """
    found: dict[str, Setting] = {}
    for group, kind in (("run", RunConfig), ("train", TrainSettings)):
        for key, info in kind.model_fields.items():
            default = REQUIRED if info.is_required() else info.get_default()
            found[key] = _setting(
                key, group, info.annotation, default, info.description or "", expected_of(kind, key)
            )
    for group, kind in (methods or {}).items():
        for setting in [] if isinstance(kind, Preset | Union) else method_settings(group, kind):
            assert found.get(setting.key, setting).group not in ("run", "train"), setting.key
            found.setdefault(setting.key, setting)
    return found


def method_settings(group: str, kind: type) -> list[Setting]:
    """The settings of one method: the fields of its dataclass, but for those that are state."""
    return [setting for setting, is_state in method_fields(group, kind) if not is_state]


@cache
def method_fields(group: str, kind: type) -> tuple[tuple[Setting, bool], ...]:
    """The fields of a method's dataclass as its files have them, and whether each is state."""
    annotations = typing.get_type_hints(kind, include_extras=True)
    return tuple(
        (
            _setting(
                field.name,
                group,
                annotations[field.name],
                _default(field),
                str(field.metadata.get("help", "")),
                describe(annotations[field.name]),
            ),
            STATE in field.metadata,
        )
        for field in dataclasses.fields(kind)
        if field.init
    )


def method_values(method: Any) -> dict[str, Any]:
    """Name -> value of the settings of a method; empty for None."""
    if method is None:
        return {}
    fields = [f for f in dataclasses.fields(method) if f.init and STATE not in f.metadata]
    return {field.name: getattr(method, field.name) for field in fields}


def _setting(
    key: str, group: str, annotation: Any, default: Any, text: str, expected: str
) -> Setting:
    aliases = tuple(alias for alias, name in ALIASES.items() if name == key)
    return Setting(key, group, annotation, default, text, expected, aliases)


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED


def expected_of(kind: type[Settings], key: str) -> str:
    """What a setting of a model takes: type and range in words."""
    info = kind.model_fields[key]
    return describe(info.annotation, info.metadata)
