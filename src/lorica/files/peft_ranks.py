"""The words of AdaLoRA in PEFT's config: which triplets of which layer were kept.

PEFT writes for every layer a list of `init_r` truth values, `rank_pattern`, and tensors of the rank
that is left; which of the values are true says nothing any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorica.files.peft_config import NEUTRAL, NO_EFFECT
from lorica.methods.adalora import AdaLoRA, exact_ranks

SETTINGS = {
    **{key: key for key in ("init_r", "target_r", "orth_reg_weight")},
    "delta_t": "deltaT",
    "sensitivity_beta": "beta1",
    "uncertainty_beta": "beta2",
    **{key: key for key in ("lora_alpha", "lora_dropout", "tinit", "tfinal")},
}
"""Our name of a setting -> PEFT's. The schedule has whole numbers there, or is left out."""

UNUSED = {
    "r",
    "use_rslora",
    "use_dora",
    "alpha_pattern",
    "init_lora_weights",
    "total_step",
    *NO_EFFECT,
}
"""Keys of LoRA that PEFT's AdaLoRA does not look at, or in training only."""

OTHER_VARIANTS = {**NEUTRAL, "target_parameters": None, "trainable_token_indices": None}
"""Keys that would change the arithmetic, at the value that changes nothing."""


def ranks_of(raw: Mapping[str, Any]) -> dict[str, int] | str:
    """Path of a layer -> the rank that is left; or what is wrong with the pattern."""
    pattern = raw.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        return "rank_pattern is no table"
    found: dict[str, int] = {}
    for key, kept in pattern.items():
        path, mark, _ = key.rpartition(".lora_E")
        if not mark or not isinstance(kept, list) or not all(type(k) is bool for k in kept):
            return f"rank_pattern[{key[:60]!r}] is no list of true and false for a lora_E"
        if len(kept) != raw.get("init_r", AdaLoRA.init_r):
            return f"rank_pattern[{key[:60]!r}] has not as many values as init_r says"
        found[path] = sum(kept)
    return found


def as_setting(raw: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, int]:
    """What `ranks_of` gave, as the setting."""
    return exact_ranks(ranks, raw.get("init_r", AdaLoRA.init_r))


def target_of(raw: Mapping[str, Any]) -> Any:
    """The mean rank that was aimed at. PEFT takes one above the initial rank, which its default is
    where init_r is small, and then cuts nothing.
    """
    target, init_r = raw.get("target_r", AdaLoRA.target_r), raw.get("init_r", AdaLoRA.init_r)
    return min(target, init_r) if type(target) is type(init_r) is int else target


def without_rank(raw: Mapping[str, Any]) -> set[str]:
    """The layers where nothing is left: their tensors are empty."""
    ranks = ranks_of(raw)
    return set() if isinstance(ranks, str) else {path for path, r in ranks.items() if not r}


def written(method: AdaLoRA, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The keys of PEFT's config that the table of settings does not give.

    Args:
        ranks: path of a layer -> its rank.
    """
    init_r = method.init_r
    cut = any(rank != init_r for rank in ranks.values())
    pattern = {
        f"{path}.lora_E": [number < rank for number in range(init_r)]
        for path, rank in ranks.items()
    }
    tinit, tfinal = method.tinit or 0, method.tfinal or 0
    return {
        **OTHER_VARIANTS,
        **{key: value for key, value in NO_EFFECT.items() if key != "runtime_config"},
        "r": 8,  # any other is warned of
        "init_lora_weights": True,
        "rank_pattern": pattern if cut else None,
        "total_step": tinit + tfinal + 1,  # must be there; what a run had stands in its run.json
        "use_dora": False,
        "use_rslora": False,
        "alpha_pattern": {},
    }
