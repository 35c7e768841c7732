"""Whether a merged or exported model answers as its base does with the adapter on it.

Both are asked the same prompts. The adapter's own greedy answer is laid behind each prompt, and the
logits at every token of it are compared:

    lost = rms(other - attached) / rms(attached - base)

This is the share of what the adapter does to the logits that the other model does not do: 0 for an
exact copy, 0.5 where the scale was halved, 1 where the adapter was left out. It does not depend on
how strong the adapter is. Where every likeliest token along that answer is the same, the greedy
text of both is the same, since each token follows from those before it.

Two tests make the verdict. `lost` may not be above the limit of the precision that the other model
is stored in; and no token may differ that was clear, that is, where the two best logits lie further
apart than errors within that limit can move them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.activate import Mixture, activate
from lorica.errors import CheckRefused, ConfigError, nearest
from lorica.tasks.task import answering, device_of, num_positions, wide

LIMITS: Mapping[str, float] = {"float32": 0.01, "float16": 0.1, "bfloat16": 0.25, "int8": 0.25}
"""The largest `lost` by the type of the stored weights. In float32 there is nothing but another
order of sums, which loses 1e-4 at most; 0.01 finds one changed place of ten thousand equal ones.
Half precision rounds the base's weights too, which an adapter of small effect feels; 0.25 is half
of what the nearest real mistake, a scale of one half, would lose."""
CLEAR = 8
"""A token is clear where its logit leads by so many errors of the size of the limit: for normal
errors the difference of two is 5.6 standard deviations."""
FAINT = 1e-4
"""An adapter whose effect is smaller than this share of the logits is measured against that."""
MAX_NEW_TOKENS = 12
_SHOWN = 5


@dataclass(frozen=True)
class Question:
    """Token ids of a prompt, and of the greedy answer that follows it (none for a class)."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()


Answering = nn.Module | Callable[[Question], Tensor]
"""A model of transformers, or a function from a question to its logits, (places, vocabulary): the
place of the last token of the prompt and those of all tokens of the answer; for classes
(1, classes)."""


@dataclass(frozen=True, eq=False)
class Expected:
    """What base and adapter answer, kept so that the model may go before the other one comes.

    Attributes:
        questions: the prompts with their greedy answers.
        attached, base: logits of each, (places, vocabulary), float32 on the CPU.
    """

    questions: tuple[Question, ...]
    attached: tuple[Tensor, ...]
    base: tuple[Tensor, ...]


@dataclass(frozen=True)
class Verification:
    """How another model's answers compare with those of base and adapter.

    Attributes:
        prompts, tokens: how many were compared.
        same: tokens that are the likeliest in both.
        flipped: clear tokens that differ.
        lost: share of the adapter's effect on the logits that is missing or wrong.
        limit: the largest `lost` that passes.
        largest: largest difference of a logit.
        effect: root mean square of what the adapter does to a logit.
        precision: of the other model's weights, which decided the limit.
        problems: why it is refused, a sentence each; empty where it passes.
    """

    prompts: int
    tokens: int
    same: int
    flipped: int
    lost: float
    limit: float
    largest: float
    effect: float
    precision: str
    problems: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether the other model is what base and adapter are."""
        return not self.problems

    def check(self, what: str = "this model") -> None:
        """Raises CheckRefused with all problems where it did not pass."""
        if self.problems:
            raise CheckRefused(
                f"{what} does not answer as its base with the adapter does",
                problems=self.problems,
                expected=f"at most {self.limit:.0%} of the adapter's effect lost in "
                f"{self.precision}, and every clear token the same",
                mend="write it again; where the precision is to blame, keep more of it (--dtype)",
            )

    def __str__(self) -> str:
        verdict = "the same" if self.ok else "NOT the same"
        lines = [
            f"{verdict}: {self.prompts} prompts, {self.same} of {self.tokens} greedy tokens equal, "
            f"{self.lost:.2%} of the adapter's effect lost (at most {self.limit:.0%} in "
            f"{self.precision}); largest difference of a logit {self.largest:.2g}, where the "
            f"adapter moves logits by {self.effect:.2g}"
        ]
        return "\n".join([*lines, *(f"  {problem}" for problem in self.problems)])


def verify(
    model: nn.Module,
    mixture: Mixture,
    other: Answering,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    precision: str = "float32",
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Verification:
    """Compare another model with what `model` answers under a mixture of its adapters.

    Args:
        model: the base with the adapters attached.
        mixture: what the other model is to be, as for `activate`.
        other: the merged or exported model.
        prompts: token ids; None: some drawn at random from the vocabulary, which every model has.
        precision: of the other model's stored weights, a key of `LIMITS`.
        max_new_tokens: length of the greedy answers that are compared.

    Raises:
        ConfigError: an unknown precision, or a prompt without tokens.
    """
    _limit(precision)
    found = expect(model, mixture, prompts, max_new_tokens=max_new_tokens)
    return judge(found, other, precision=precision)


def expect(
    model: nn.Module,
    mixture: Mixture,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Expected:
    """What base and adapter answer; see `verify`."""
    given = random_prompts(model) if prompts is None else [tuple(ids) for ids in prompts]
    if not given or not all(given):
        raise ConfigError("there is nothing to ask", problems=["a prompt has no tokens"])
    if (most := num_positions(model)) is not None:
        max_new_tokens = min(max_new_tokens, most // 2)
        given = [ids[: most - max_new_tokens] for ids in given]
    with answering(model), activate(model, mixture):
        questions = tuple(_answered(model, prompt, max_new_tokens) for prompt in given)
        attached = tuple(_logits(model, question) for question in questions)
    with answering(model), activate(model, None):
        base = tuple(_logits(model, question) for question in questions)
    return Expected(questions, attached, base)


def judge(expected: Expected, other: Answering, *, precision: str = "float32") -> Verification:
    """Ask another model the same questions, and say whether it is the same; see `verify`."""
    limit = _limit(precision)
    if isinstance(other, nn.Module):
        with answering(other):
            given = [_logits(other, question) for question in expected.questions]
    else:
        given = [other(question).detach().float().cpu() for question in expected.questions]
    wrong = [
        f"prompt {number}: logits of the shape {tuple(one.shape)}, expected {tuple(own.shape)}"
        for number, (one, own) in enumerate(zip(given, expected.attached, strict=True))
        if one.shape != own.shape
    ]
    if wrong:
        sizes = len(expected.questions), 0, 0, 0
        return Verification(
            *sizes, math.inf, limit, math.inf, 0.0, precision, tuple(wrong[:_SHOWN])
        )
    return _compared(expected, torch.cat(given), limit, precision)


def random_prompts(model: nn.Module, *, number: int = 6, length: int = 16) -> list[tuple[int, ...]]:
    """Token ids from the whole vocabulary; always the same ones for a size of it."""
    table: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(table.weight.shape[0], (number, length), generator=generator)
    return [tuple(row) for row in drawn.tolist()]


def _limit(precision: str) -> float:
    if precision not in LIMITS:
        near = nearest(precision, LIMITS)
        raise ConfigError(
            f"there is no limit for weights of the type {precision!r}",
            expected=f"one of: {', '.join(LIMITS)}",
            mend=f"did you mean {near}?" if near else None,
        )
    return LIMITS[precision]


def _compared(expected: Expected, other: Tensor, limit: float, precision: str) -> Verification:
    """The figures over all places, and what they forbid. All (places, vocabulary)."""
    attached, base = torch.cat(expected.attached), torch.cat(expected.base)
    effect, error = _rms(attached - base), _rms(other - attached)
    lost = error / max(effect, FAINT * _rms(attached))
    best = attached.topk(min(2, attached.shape[-1]), dim=-1).values
    lead = best[:, 0] - best[:, -1]
    differs = other.argmax(-1) != attached.argmax(-1)
    clear = lead > CLEAR * limit * max(effect, FAINT * _rms(attached))
    flipped = int((differs & clear).sum())
    problems = []
    if not math.isfinite(lost):
        problems.append("it answers with NaN or infinite logits")
    elif lost > limit:
        left_out = " (1 would be the base without the adapter)" if lost > 0.5 else ""
        problems.append(f"{lost:.1%} of the adapter's effect on the logits is lost{left_out}")
    if flipped:
        which = (differs & clear).nonzero()[0].item()
        lead_there = float(lead[int(which)])
        problems.append(
            f"{flipped} of {len(differs)} greedy tokens are others although they were clear; the "
            f"first led by {lead_there:.2g}"
        )
    return Verification(
        len(expected.questions),
        len(differs),
        int((~differs).sum()),
        flipped,
        lost,
        limit,
        float((other - attached).abs().max()),
        effect,
        precision,
        tuple(problems),
    )


def _answered(model: nn.Module, prompt: Sequence[int], max_new_tokens: int) -> Question:
    """The prompt with the model's greedy answer, token by token and without a cache: the plainest
    way there is, which no other part of a model can make wrong.
    """
    answer: list[int] = []
    while True:
        question = Question(tuple(prompt), tuple(answer))
        if _is_class(model) or len(answer) >= max_new_tokens:
            return question
        answer.append(int(_logits(model, question)[-1].argmax()))


def _is_class(model: nn.Module) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def _logits(model: Any, question: Question) -> Tensor:
    """(places, vocabulary), float32 on the CPU: behind the prompt and behind every token of the
    answer.
    """
    device = device_of(model)
    config: Any = getattr(model, "config", None)
    if _is_class(model):
        ids = torch.tensor([question.prompt], device=device)
        return wide(model(input_ids=ids).logits).float().cpu()
    if getattr(config, "is_encoder_decoder", False):
        start = config.decoder_start_token_id
        given = {
            "input_ids": torch.tensor([question.prompt], device=device),
            "decoder_input_ids": torch.tensor([[start, *question.answer]], device=device),
        }
        return wide(model(**given).logits[0]).float().cpu()
    ids = torch.tensor([[*question.prompt, *question.answer]], device=device)
    return wide(model(input_ids=ids).logits[0, len(question.prompt) - 1 :]).float().cpu()


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())
