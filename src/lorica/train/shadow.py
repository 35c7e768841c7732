"""A model without its weights that can be run all the same, for finding out what a run would need.

Under torch's fake tensors (`torch._subclasses`, which torch.compile rests on) a model of any size
is made and run within seconds: every operation knows the shape, dtype and device of its result, and
computes nothing. What cannot be known without numbers, such as whether a model keeps packed
documents apart, is asked of a miniature: the same architecture with one layer and random weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorica.attach.attach import attach, detach
from lorica.attach.handle import Adapter
from lorica.base.choose import choose_dtype
from lorica.base.empty import empty_model
from lorica.base.known import Base
from lorica.base.locate import weight_files
from lorica.base.missing import missing_heads
from lorica.base.quantize import check, make_room, quantizable, quantize_model, quantizer_of
from lorica.base.stored import OWN, method_of, quantizers_of, read_stored
from lorica.base.tokenizer import load_tokenizer
from lorica.config import TrainSettings
from lorica.data.encode import IGNORED, Example
from lorica.errors import LoricaError
from lorica.files.adapter import load_adapter
from lorica.methods import LoRA
from lorica.methods.method import Method
from lorica.tasks import CausalLM, Seq2Seq, TextClassification
from lorica.tasks.last_layer import Place
from lorica.tasks.probe import plain_decoder_head, plain_head
from lorica.train.engine import Engine, Trainee
from lorica.train.fake import FakeTensors

LAYER_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "num_decoder_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
)
"""What configs call the number of layers."""

MINIATURE_VOCABULARY = 512
LARGEST_MINIATURE = 64_000_000
"""Parameters above which even one layer is too much to try out."""


@dataclass(frozen=True)
class Request:
    """Which base, and how it would be loaded: the arguments of `load_model`."""

    name: str
    task: str = "causal-lm"
    dtype: str = "auto"
    labels: tuple[str, ...] = ()
    revision: str = "main"
    trust_remote_code: bool = False
    eos_token: str | None = None
    quantize: str | None = None

    @property
    def device(self) -> torch.device:
        """Where `load_model` puts it."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Lower:
    """An adapter that is to lie below that of a run.

    Attributes:
        source: its folder, or the method of one that is still to be made.
        trains: whether it trains with the one on top of it; else it is frozen.
    """

    source: Path | Method
    trains: bool = False


@dataclass(eq=False)
class Shadow:
    """A base without numbers.

    Attributes:
        request: what it is the shadow of.
        model: its parameters have shape, dtype and device, and no memory.
        base: what is known without the weights; `digest` is empty.
        mode: the fake tensors' own; everything that runs the model must run inside.
        packs: whether documents may share a row, as far as the miniature tells.
        plain: whether the head is the last layer and nothing more.
        place: where rows that nobody reads leave it.
        notes: what was assumed.
    """

    request: Request
    model: nn.Module
    base: Base
    mode: FakeTensors
    packs: bool = True
    plain: bool = True
    place: Place | None = None
    notes: list[str] = field(default_factory=list)

    def task(self, task: Any) -> Any:
        """A copy of a task that knows what only numbers would tell of this model."""
        own = replace(task, notes=[])
        if isinstance(own, CausalLM):
            own.assume(self.model, packs=self.packs, plain=self.plain, place=self.place)
        elif isinstance(own, TextClassification):
            own.assume(self.model, self.place)
        elif isinstance(own, Seq2Seq):
            own.assume(self.model, plain=self.plain)
        return own

    @contextmanager
    def adapted(self, method: Method, lower: Sequence[Lower] = ()) -> Iterator[Adapter]:
        """The shadow with an adapter on it, for a while, and below it what is to lie there.

        Raises:
            LoricaError: what `attach` and `load_adapter` raise.
        """
        stack: list[Adapter] = []
        try:
            for one in (*lower, Lower(method)):
                stack.append(self._lay(one, stack, lower))
            yield stack[-1]
        finally:
            with self.mode:
                for adapter in reversed(stack):
                    detach(self.model, adapter)

    def _lay(self, one: Lower, stack: Sequence[Adapter], lower: Sequence[Lower]) -> Adapter:
        """Put the next adapter on top of those that are there."""
        name = f"planned{len(stack)}"
        if isinstance(one.source, Path):
            return self._read(one.source, name)
        method = one.source
        if hasattr(method, "stand_in"):  # what needs records or numbers is as large without
            method = method.stand_in()  # type: ignore[attr-defined]
        on, together = (stack[-1], lower[len(stack) - 1].trains) if stack else (None, False)
        with self.mode:
            return attach(self.model, method, name=name, on=on, together=together)

    def _read(self, folder: Path, name: str) -> Adapter:
        """An adapter from its folder, of whose tensors only the sizes are kept."""
        adapter = load_adapter(self.model, folder, name=name)
        for stage in adapter.stages:
            for slot in stage.slots.values():
                slot.tensors = {
                    key: nn.Parameter(self.mode.from_tensor(tensor.detach()), tensor.requires_grad)
                    for key, tensor in slot.tensors.items()
                }
        return adapter


def make_shadow(request: Request) -> Shadow:
    """The shadow of a base, from its config, its tokenizer and the headers of its files.

    Raises:
        BaseModelError: there is no such base, or its config fits no such task.
    """
    how = {"revision": request.revision, "trust_remote_code": request.trust_remote_code}
    dtype = choose_dtype(request.dtype, request.device)
    made = empty_model(
        request.name,
        task=request.task,
        labels=request.labels,
        dtype=dtype if isinstance(dtype, torch.dtype) else None,
        **how,  # type: ignore[arg-type]
    )
    if request.quantize:
        kind, layers = quantizer_of(request.quantize), quantizable(made)
        check(kind, layers, type(made).__name__)
        make_room(made, dict.fromkeys(layers, kind), next(made.parameters()).dtype)
    elif method_of(made.config) == OWN:
        files = weight_files(request.name, revision=request.revision)
        make_room(made, quantizers_of(read_stored(files)[1]), next(made.parameters()).dtype)
    mode = FakeTensors()
    with mode:
        model = made.to_empty(device=request.device)
        if hasattr(model, "tie_weights"):
            model.tie_weights()  # type: ignore[operator]
    base = Base(request.name, request.task, digest="")
    base.tokenizer = load_tokenizer(
        request.name,
        task=request.task,
        eos_token=request.eos_token,
        **how,  # type: ignore[arg-type]
    )
    if request.task == "text-classification":
        config: Any = model.config
        base.labels = tuple(str(config.id2label[i]) for i in range(config.num_labels))
        base.new_modules = missing_heads(request.name, made, labels=request.labels, **how)  # type: ignore[arg-type]
    model.__dict__["_lorica_base"] = base
    return Shadow(request, model.eval(), base, mode)


def try_out(shadow: Shadow, task: Any, examples: Sequence[Example]) -> None:
    """Run a miniature of the base through two real steps, in this process.

    It tells whether documents may be packed, and it makes torch load what training needs: kernels,
    their buffers, the autograd engine. What that takes is then part of the process, and measured.

    Raises:
        ConfigError: packing is on, and this model cannot.
    """
    try:
        model = _miniature(shadow)
    except LoricaError as error:
        shadow.notes.append(f"no miniature of the base could be made: {error.what}")
        return
    if model is None:
        shadow.notes.append("one layer is too large to try it out: packing is taken for granted")
        return
    own = replace(task, notes=[])
    if shadow.request.task == "causal-lm":
        shadow.packs, shadow.plain = own.packs(model), plain_head(model) is not None
        shadow.place = own.place(model)
    elif shadow.request.task == "text-classification":
        shadow.place = own.place(model)
    elif shadow.request.task == "seq2seq":
        shadow.plain = plain_decoder_head(model) is not None
    small = [_within(example, shadow.request.task) for example in examples[:4]]
    try:
        adapter = attach(model, LoRA(r=4, target_modules="all-linear"), name="tried")
        trainee, engine = Trainee(adapter, TrainSettings(max_steps=2), 2), Engine(model, own)
        with torch.random.fork_rng(devices=[]):
            for _ in range(2):
                engine.step([trainee], [[small]])
    except (LoricaError, RuntimeError, LookupError, ValueError, TypeError) as error:
        text = next(iter(str(error).splitlines()), type(error).__name__)
        shadow.notes.append(f"a miniature of the base could not be trained: {text}")


def _miniature(shadow: Shadow) -> nn.Module | None:
    """One layer of the base with random weights and a small vocabulary; None where that is still
    large.
    """
    request = shadow.request
    dtype = next(shadow.model.parameters()).dtype
    how: dict[str, Any] = {
        "task": request.task,
        "revision": request.revision,
        "trust_remote_code": request.trust_remote_code,
        "labels": request.labels,
        "dtype": dtype,
        "change": _shrink,
    }
    empty = empty_model(request.name, **how)
    if sum(p.numel() for p in empty.parameters()) > LARGEST_MINIATURE:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = empty_model(request.name, **how, device=str(request.device)).eval()
    if request.quantize:
        quantize_model(model, request.quantize)
    return model


def _shrink(config: Any) -> None:
    """One layer and few tokens, as far as the config has words for them."""
    text = config.get_text_config()
    for key in LAYER_COUNTS:
        if isinstance(getattr(text, key, None), int):
            setattr(text, key, 1)
    if isinstance(getattr(text, "layer_types", None), list):
        text.layer_types = text.layer_types[:1]
    text.vocab_size = min(text.vocab_size, MINIATURE_VOCABULARY)
    for key in ("pad_token_id", "eos_token_id", "bos_token_id"):
        number = getattr(text, key, None)
        if isinstance(number, int) and number >= text.vocab_size:
            setattr(text, key, 0)


def _within(example: Example, task: str) -> Example:
    """An example whose tokens the miniature knows."""
    fit = [i % MINIATURE_VOCABULARY for i in example.input_ids[:64]]
    labels = example.labels
    if task != "text-classification":
        labels = [i if i == IGNORED else i % MINIATURE_VOCABULARY for i in labels[:64]]
        labels[-1] = fit[-1] if labels[-1] == IGNORED else labels[-1]
    changes: dict[str, Any] = {"input_ids": fit, "labels": labels}
    if hasattr(example, "segments"):
        changes["segments"] = getattr(example, "segments", ())[:64]
    return replace(example, **changes)
