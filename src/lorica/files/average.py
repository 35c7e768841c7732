"""One adapter folder from several of one kind: the weighted mean of every tensor.

    T = sum_i w_i T_i        sum_i w_i = 1

Chronopoulou et al. 2023, "AdapterSoup: Weight Averaging to Improve Generalization of Pretrained
Language Models" (arXiv 2302.07027), after Wortsman et al. 2022, "Model soups" (arXiv 2203.05482).
The mean of factors is not the mean of their products: it is meant for adapters that began alike,
such as runs from one `init_adapter`, or copies of the base's parameters. For the exact
mixture of what any adapters do, activate them together with weights.

Files are compared and averaged as they lie; no base is loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorica.errors import AdapterFileError, ConfigError, LoricaWarning
from lorica.files.adapter import CARD, CONFIG, PROVENANCE, WEIGHTS, check_folder, read_facts
from lorica.files.folder import new_folder, read_json
from lorica.files.safetensors_file import TensorFile, write_tensors
from lorica.records.atomic import write_file

_STARTS = {"init_lora_weights", "init_records", "eva_rho", "eva_tau", "lora_ga_gamma", "loftq_iter"}
_STARTS |= {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"}
_TRAINING = {"lora_dropout", "hira_dropout", "vera_dropout", "reinit_top_layers", "selection"}
_TRAINING |= {"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"}
_TRAINING |= {"total_step", "lisa_activated_layers", "lisa_interval_steps", "lisa_ends"}
_NETWORKS = {"encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type"}
_FREE = {*_STARTS, *_TRAINING, *_NETWORKS, "peft_version", "inference_mode", "revision"}
_FREE |= {"relevance_records"}
"""Keys of a config that say how an adapter was trained, not what its tensors mean."""
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_BESIDE += ("chat_template.jinja",)
_SHOWN, _WIDE = 10, 80
ALIKE = 0.3
"""Cosine below which factors have nothing in common."""


def average(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the weighted mean of adapters as an adapter folder.

    Args:
        folders: adapter folders of one kind, with the same places, shapes, scales and base.
        output: appears whole or not at all.
        weights: one per folder, with the sum 1; None: all alike.
        overwrite: replace an adapter that is there.

    Raises:
        ConfigError: fewer than two folders, or weights that are no shares of 1.
        AdapterFileError: the folders differ in kind, places, shapes or base; all differences at
            once. Nothing was written.

    Warns where adapters began apart, so that the mean of their factors means nothing.
    """
    paths = [Path(folder) for folder in folders]
    shares = check_shares(paths, weights)
    for path in paths:
        check_folder(path)
    configs = [read_json(path / CONFIG) for path in paths]
    facts = [read_facts(path) for path in paths]
    if staged := [str(path) for path, fact in zip(paths, facts, strict=True) if fact.get("on")]:
        raise AdapterFileError(
            "adapters that were trained on top of others have no mean: " + ", ".join(staged),
            mend="mix what they do by activating them together, with weights",
        )
    files = []
    try:
        for path in paths:
            files.append(TensorFile(path / WEIGHTS))
        _refuse_differing(paths, configs, facts, files)
        tensors = {name: _mean(name, files, shares, paths) for name in files[0].entries}
        _warn_if_apart(paths, files)
    finally:
        for file in files:
            file.close()
    with new_folder(
        output, marker=CONFIG, overwrite=overwrite, error=AdapterFileError
    ) as temporary:
        write_tensors(temporary / WEIGHTS, tensors)
        shutil.copyfile(paths[0] / CONFIG, temporary / CONFIG)
        if (paths[0] / CARD).is_file():
            shutil.copyfile(paths[0] / CARD, temporary / CARD)
        for name in _BESIDE:
            if (paths[0] / name).is_file():
                shutil.copyfile(paths[0] / name, temporary / name)
        write_file(temporary / PROVENANCE, _provenance(paths, shares, facts[0]))
    return Path(output)


def check_shares(paths: Sequence[object], weights: Sequence[float] | None) -> list[float]:
    """One share for each of several adapters, with the sum 1; None: all alike.

    Raises:
        ConfigError: there are fewer than two, or the weights are no shares of 1.
    """
    if len(paths) < 2:
        raise ConfigError("an average needs at least two adapters", expected="several folders")
    if weights is None:
        return [1 / len(paths)] * len(paths)
    shares = [float(weight) for weight in weights]
    problems = []
    if len(shares) != len(paths):
        problems.append(f"there are {len(shares)} weights for {len(paths)} adapters")
    if not all(math.isfinite(share) for share in shares):
        problems.append("a weight is no finite number")
    elif abs(sum(shares) - 1) > 1e-6:
        problems.append(f"the weights sum to {sum(shares):g}; those of an average sum to 1")
    if problems:
        raise ConfigError("these weights make no average", problems=problems)
    return shares


def _refuse_differing(
    paths: Sequence[Path],
    configs: Sequence[Mapping[str, Any]],
    facts: Sequence[Mapping[str, Any]],
    files: Sequence[TensorFile],
) -> None:
    """One error for all that keeps the adapters from having a mean."""
    first = paths[0]
    problems = []
    for path, config, fact, file in zip(paths[1:], configs[1:], facts[1:], files[1:], strict=True):
        kinds = _kind(configs[0]), _kind(config)
        if kinds[0] != kinds[1]:
            problems.append(f"{path} is {kinds[1]}, and {first} is {kinds[0]}")
            continue
        here, there = _meaning(config), _meaning(configs[0])
        problems += [
            f"{key} is {_short(here.get(key))} in {path}, and {_short(there.get(key))} in {first}"
            for key in sorted(here.keys() | there.keys())
            if here.get(key) != there.get(key)
        ]
        problems += _differing_tensors(path, first, file, files[0])
        problems += _differing_facts(path, first, fact, facts[0])
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise AdapterFileError(
            "these adapters have no average",
            problems=[*problems[:_SHOWN], *more],
            expected="adapters of one kind, with the same places, shapes and base",
            mend="activate them together instead: a mixture needs nothing in common but the base",
        )


def _short(value: Any) -> str:
    return text if len(text := repr(value)) <= _WIDE else f"{text[: _WIDE - 3]}..."


def _kind(config: Mapping[str, Any]) -> str:
    return str(config.get("peft_type") or config.get("kind")).lower()


def _meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of its tensors; lists without their order."""
    flat = {**config, **{f"settings.{k}": v for k, v in (config.get("settings") or {}).items()}}
    flat.pop("settings", None)
    found = {k: v for k, v in flat.items() if k.removeprefix("settings.") not in _FREE}
    found = {k: sorted(map(str, v)) if isinstance(v, list) else v for k, v in found.items()}
    name = found.pop("base_model_name_or_path", None)  # where the base lay, which may have moved
    return {**found, "base": str(name or "").rstrip("/").rpartition("/")[2]}


def _differing_tensors(path: Path, first: Path, file: TensorFile, other: TensorFile) -> list[str]:
    here = {name: entry.shape for name, entry in file.entries.items()}
    there = {name: entry.shape for name, entry in other.entries.items()}
    return [
        f"{name} is {here.get(name, 'missing')} in {path}, and {there.get(name, 'missing')} in "
        f"{first}"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]


def _differing_facts(
    path: Path, first: Path, here: Mapping[str, Any], there: Mapping[str, Any]
) -> list[str]:
    """Other weights of the base, or another way of asking it."""
    found = []
    for key, what in (("base", "digest"), ("task", None)):
        pair = [fact.get(key) for fact in (here, there)]
        if what is not None:
            pair = [one.get(what) if isinstance(one, dict) else None for one in pair]
        if None not in pair and pair[0] != pair[1]:
            meant = "the digest of the base" if what else "how the base is asked (task)"
            found.append(f"{meant} differs between {path} and {first}")
    return found


def _mean(
    name: str, files: Sequence[TensorFile], shares: Sequence[float], paths: Sequence[Path]
) -> torch.Tensor:
    """The mean in float64, in the dtype of the first; what counts or is equal stays as it is."""
    read = [file.read(name) for file in files]
    if all(torch.equal(tensor, read[0]) for tensor in read[1:]):
        return read[0]
    if not read[0].is_floating_point():
        raise AdapterFileError(
            f"{name} counts places, and differs between {', '.join(map(str, paths))}",
            mend="average adapters that train the same entries",
        )
    total = sum(share * one.double() for share, one in zip(shares, read, strict=True))
    return torch.as_tensor(total).to(read[0].dtype)


def _warn_if_apart(paths: Sequence[Path], files: Sequence[TensorFile]) -> None:
    """Warn where the factors of products have nothing in common, so that their mean means nothing.

    Factors that began alike still point the same way after training, at least one of each product;
    those of different seeds are at right angles.
    """
    places: dict[str, list[str]] = {}
    for name, entry in files[0].entries.items():
        if len(entry.shape) > 1:
            places.setdefault(name.removesuffix(".weight").rpartition(".")[0], []).append(name)
    products = [names for names in places.values() if len(names) > 1]
    for path, file in zip(paths[1:], files[1:], strict=True):
        alike = [max(_cosine(files[0].read(n), file.read(n)) for n in ns) for ns in products]
        if alike and (middle := statistics.median(alike)) < ALIKE:
            warnings.warn(
                f"{path} and {paths[0]} began apart: their factors are at right angles (cosine "
                f"{middle:.2f} in the median of {len(alike)} places), and the mean of factors is "
                "then not the mean of what they do; begin all from one adapter (init_adapter), or "
                "mix them exactly: lorica.activate(model, {name: weight, ...})",
                LoricaWarning,
                stacklevel=3,
            )


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    if not one.is_floating_point():
        return 1.0
    return torch.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0).item()


def _provenance(paths: Sequence[Path], shares: Sequence[float], first: Mapping[str, Any]) -> str:
    kept = {key: first[key] for key in ("base", "task", "versions", "format") if key in first}
    sources = [
        {
            "path": str(path.absolute()),
            "digest": hashlib.sha256((path / WEIGHTS).read_bytes()).hexdigest(),
            "weight": share,
        }
        for path, share in zip(paths, shares, strict=True)
    ]
    reason = f"the mean of {len(paths)} adapters"
    return (
        json.dumps({**kept, "average_of": sources, "reason": reason}, indent=2, sort_keys=True)
        + "\n"
    )
