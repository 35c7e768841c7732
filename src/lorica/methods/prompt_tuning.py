"""Prompt tuning: trained embeddings in front of the embedded tokens.

    [p_1 ... p_P ; E x_1 ... E x_L]

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning" (arXiv 2104.08691),
section 2; its figure 3 finds starts from the vocabulary better than random ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from lorica.errors import ConfigError
from lorica.methods.method import Layer, Tensors, setting, state
from lorica.methods.virtual import VirtualTokens, embedded

_STARTS = ("sample_vocab", "random", "text")


@dataclass(frozen=True)
class PromptTuning(VirtualTokens):
    """Settings and arithmetic of prompt tuning."""

    prompt_tuning_init: Literal["sample_vocab", "random", "text"] = setting(
        "sample_vocab", "start: embeddings of tokens drawn at random, noise, or those of a text"
    )
    prompt_tuning_init_text: str | None = setting(
        None, "the text for prompt_tuning_init: text; repeated or cut to the number of tokens"
    )
    prompt_tuning_init_ids: tuple[int, ...] = state(())
    """The token ids of that text; empty: found when it is put on a model."""

    kind: ClassVar[str] = "prompt-tuning"
    title: ClassVar[str] = "trained embeddings in front of the input (arXiv 2104.08691)"
    folded: ClassVar[str] = "prompt"

    def told(self, tokenize: Callable[[str], Sequence[int]] | None) -> Self:
        """The settings with the token ids of the text, if they begin from one.

        Raises:
            ConfigError: there is a text, and no tokenizer to read it with.
        """
        text = self.prompt_tuning_init_text
        if text is None or self.prompt_tuning_init_ids:
            return self
        ids = tuple(tokenize(text)) if tokenize is not None else ()
        if not ids:
            what = "has no tokens" if tokenize else "needs the tokenizer of the base"
            raise ConfigError(
                f"prompt_tuning_init_text {what}",
                mend="load the base with lorica.load_model, give prompt_tuning_init_ids, or use "
                "prompt_tuning_init: sample_vocab",
            )
        return replace(self, prompt_tuning_init_ids=ids)

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        count = self.num_virtual_tokens
        if self.prompt_tuning_init == "random":  # as far out as the tokens of the base are
            noise = torch.randn(count, layer.out_features, generator=generator)
            spread = layer.stored().float().std().cpu() * layer.output_scale
            return {"prompt": noise * spread}
        if self.prompt_tuning_init == "text":
            given = torch.tensor(self.prompt_tuning_init_ids)
            ids = given.repeat(math.ceil(count / len(given)))[:count]
        else:
            ids = torch.randint(layer.in_features, (count,), generator=generator)
        return {"prompt": embedded(layer, ids)}

    def problems(self, layer: Layer) -> list[str]:
        found = super().problems(layer)
        if not found and max(self.prompt_tuning_init_ids, default=0) >= layer.in_features:
            found.append(f"prompt_tuning_init_ids name tokens beyond the {layer.in_features:,}")
        return found

    def embeddings(self, tensors: Tensors) -> Tensor:
        """The virtual tokens (P, H)."""
        return tensors["prompt"]

    def fold(self, tensors: Tensors) -> Tensor:
        """What acts, as one matrix (P, H)."""
        return tensors["prompt"]

    def _problems(self) -> list[str]:
        found = super()._problems()
        begins, text = self.prompt_tuning_init, self.prompt_tuning_init_text
        ids = self.prompt_tuning_init_ids
        if begins not in _STARTS:
            found.append(f"prompt_tuning_init is {begins!r}; there are {', '.join(_STARTS)}")
        if begins == "text" and not text and not ids:
            found.append("prompt_tuning_init: text needs a prompt_tuning_init_text")
        for name, value in (("text", text), ("ids", ids)):
            if begins != "text" and value:
                found.append(
                    f"prompt_tuning_init_{name} has no effect with prompt_tuning_init: {begins}"
                )
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            found.append("prompt_tuning_init_ids must be whole numbers from 0")
        return found

    def _canonical(self) -> dict[str, Any]:
        return super()._canonical() | {"prompt_tuning_init_ids": tuple(self.prompt_tuning_init_ids)}
