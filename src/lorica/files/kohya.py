"""kohya's and LyCORIS' files for text-to-image models: one safetensors file.

    LoRA   NAME.lora_down.weight (R, I[, K, K])   NAME.lora_up.weight (O, R[, 1, 1])   NAME.alpha ()
    DoRA   besides, NAME.dora_scale (O, 1[, 1, 1])
    LoHa   NAME.hada_w1_a (O, R)   .hada_w1_b (R, I K K)   .hada_w2_a   .hada_w2_b   .alpha
    LoKr   NAME.lokr_w1 or .lokr_w1_a, .lokr_w1_b;   .lokr_w2 or .lokr_w2_a, .lokr_w2_b;   .alpha

The scale is alpha / R, and 1 where there is no alpha, or where LoKr has neither factor thin.
`image_names` says what NAME is.

Legend: I in features, O out features, R rank, K size of a kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.handle import Adapter
from lorica.attach.layers import describe
from lorica.attach.places import Places
from lorica.errors import AdapterFileError
from lorica.files.folder import new_file
from lorica.files.found import Found
from lorica.files.image_names import by_kohya_name, is_sdxl, kohya_names, parts_of
from lorica.files.pairs import Pair, found_of, pairs_of
from lorica.files.peft_layout import modules_of
from lorica.files.peft_written import exact_names
from lorica.files.safetensors_file import TensorFile, write_tensors
from lorica.methods.loha import LoHa
from lorica.methods.lokr import LoKr
from lorica.methods.method import Tensors
from lorica.methods.placed import whole

_LORA = {"lora_down.weight": "A", "lora_up.weight": "B", "dora_scale": "m"}
_LOHA = {f"hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
_LOKR = {f"lokr_{n}": n for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}
_KINDS: dict[str, Any] = {"lora_": _LORA, "hada_": _LOHA, "lokr_": _LOKR}
_SHOWN = 10


def claims(path: Path) -> bool:
    """Whether a file has kohya's keys."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    with TensorFile(path) as file:
        return any(key.partition(".")[2] in {**_LORA, **_LOHA, **_LOKR} for key in file.entries)


# --- writing --------------------------------------------------------------------------------------


def write(adapter: Adapter, path: Path, dtype: str, overwrite: bool) -> list[str]:
    """Write the file; returns what the user should be told.

    Raises:
        AdapterFileError: a layer has no name there, or the method no place.
    """
    names = kohya_names(adapter.model)
    if not names:
        raise AdapterFileError(
            f"kohya's files are for parts of text-to-image pipelines; this is a "
            f"{type(adapter.model).__name__}",
            expected="a UNet or its text encoders (those of diffusion transformers have no names "
            "there that all tools share)",
            mend="write --format diffusers, peft or gguf",
        )
    if nameless := [layer for layer in adapter.slots if layer not in names]:
        raise AdapterFileError(
            "kohya's files have no names for some of the layers",
            problems=nameless[:_SHOWN],
            mend="write --format diffusers",
        )
    if isinstance(adapter.method, LoHa | LoKr):
        (tensors, r), notes, kind = _lycoris(adapter, names), [], "lycoris.kohya"
    else:
        tensors, r, notes = _lora(adapter, names)
        kind = "networks.lora"
    cast = {key: tensor.to(getattr(torch, dtype)) for key, tensor in tensors.items()}
    parts = parts_of(adapter.model)
    noted = {
        "ss_network_module": kind,
        "ss_network_dim": str(r),
        "modelspec.sai_model_spec": "1.0.0",
    }
    noted |= {"ss_base_model_version": "sdxl_base_v1-0"} if is_sdxl(parts) else {}
    with new_file(path, overwrite=overwrite) as temporary:
        write_tensors(temporary, cast, noted)
    return notes


def _lora(adapter: Adapter, names: Mapping[str, str]) -> tuple[dict[str, Tensor], int, list[str]]:
    """Tensors, the largest rank, and what the user should be told.

    All layers get one alpha, as kohya's own tools write it: diffusers takes several for one.
    """
    pairs = pairs_of(adapter, "kohya's layout", kinds=("linear", "conv2d"), dora=True)
    alpha = Counter(pair.alpha for pair in pairs.values()).most_common(1)[0][0]
    found: dict[str, Tensor] = {}
    for path, pair in pairs.items():
        name = names[path]
        found[f"{name}.lora_down.weight"] = pair.A
        found[f"{name}.lora_up.weight"] = pair.with_alpha(alpha).B
        found[f"{name}.alpha"] = torch.tensor(float(alpha))
        if pair.m is not None:
            found[f"{name}.dora_scale"] = pair.m.reshape(-1, *(1 for _ in pair.A.shape[1:]))
    moved = sum(pair.alpha != alpha for pair in pairs.values())
    notes = [f"all layers have the alpha {alpha:g}; the rest of the scale of {moved} went into B"]
    notes = [*(notes if moved else []), *_without_outputs(names[path] for path in pairs)]
    return found, max(pair.r for pair in pairs.values()), notes


def _without_outputs(names: Iterable[str]) -> list[str]:
    """What diffusers does with a text encoder whose attention outputs are not adapted."""
    texts = [name for name in names if name.startswith("lora_te")]
    heads = {name.partition("_text_model")[0] for name in texts}
    complete = {n.partition("_text_model")[0] for n in texts if n.endswith("_self_attn_out_proj")}
    return [
        f"diffusers 0.42 needs out_proj among the layers of {head}, else it reads none of them, or "
        "reads them wrongly; give it --format diffusers"
        for head in sorted(heads - complete)
    ]


def _lycoris(adapter: Adapter, names: Mapping[str, str]) -> tuple[dict[str, Tensor], int]:
    """LoHa and LoKr. Raises AdapterFileError where something else sits beside them."""
    modules, method = modules_of(adapter.model), adapter.method
    assert isinstance(method, LoHa | LoKr)
    head, found, problems = "hada" if isinstance(method, LoHa) else "lokr", dict[str, Tensor](), []
    for path, slot in adapter.slots.items():
        kind = describe(modules[path]).kind if path in modules else "bare"
        if type(slot.method) is not type(method) or kind not in ("linear", "conv2d"):
            problems.append(f"{path}: {slot.method.kind} on a layer of kind {kind}")
            continue
        tensors = {key: t.detach().cpu() for key, t in slot.tensors.items()}
        alpha = float(method.lora_alpha)
        if {"w1", "w2"} <= tensors.keys():  # LyCORIS has the scale 1 there
            tensors["w1"] = tensors["w1"] * (method.lora_alpha / method.r)
            alpha = float(method.r)
        kernel = describe(modules[path]).kernel_size
        if kernel and "w2" in tensors:
            tensors["w2"] = tensors["w2"].unflatten(-1, (-1, *kernel))
        found |= {f"{names[path]}.{head}_{key}": tensor for key, tensor in tensors.items()}
        found[f"{names[path]}.alpha"] = torch.tensor(alpha)
    if adapter.on is not None:
        problems.append(f"it lies on another adapter ({adapter.on.method.kind}), which acts too")
    if problems:
        raise AdapterFileError("LyCORIS cannot hold this adapter", problems=problems[:_SHOWN])
    return found, method.r


# --- reading --------------------------------------------------------------------------------------


def read(model: nn.Module, path: Path) -> Found:
    """The adapter in a file, for `model`.

    Raises:
        AdapterFileError: layers that the model lacks, halves without their other half, several
            methods in one file, or parts that have no counterpart here (Tucker's, GLoRA's ...).
    """
    by_name = by_kohya_name(model)
    if not by_name:
        raise AdapterFileError(
            f"{path} is for a text-to-image pipeline, and this is a {type(model).__name__}",
            mend="load the pipeline: lorica.base.image_pipeline.ImagePipeline(pipeline)",
        )
    with TensorFile(path) as file:
        held, alphas, problems = _sorted_keys(file, by_name)
        kinds = {
            mark
            for mark, table in _KINDS.items()
            for own in held.values()
            if own.keys() & table.keys()
        }
        if len(kinds) > 1:
            problems.append("LoRA, LoHa and LoKr are mixed in one file")
        if problems or not kinds:
            raise AdapterFileError(
                f"{path} does not fit this {type(model).__name__}",
                problems=problems[:_SHOWN] or ["it holds no factors"],
                mend="load the pipeline that the adapter was made for",
            )
        mark = kinds.pop()
        layers = {
            layer: {_KINDS[mark][key]: file.read(name) for key, name in own.items()}
            for layer, own in held.items()
        }
        given = {layer: float(file.read(name)) for layer, name in alphas.items()}
    if mark == "lora_":
        return found_of(model, _pairs(layers, given, path), path)
    return _found_lycoris(model, LoHa if mark == "hada_" else LoKr, layers, given, path)


def _sorted_keys(
    file: TensorFile, by_name: Mapping[str, str]
) -> tuple[dict[str, dict[str, str]], dict[str, str], list[str]]:
    """Layer -> what is said of it -> its key; layer -> the key of its alpha; what fits nowhere."""
    known = {**_LORA, **_LOHA, **_LOKR}
    held: dict[str, dict[str, str]] = {}
    alphas: dict[str, str] = {}
    problems = []
    for key, entry in file.entries.items():
        name, _, part = key.partition(".")
        layer = by_name.get(name)
        if layer is None:
            problems.append(f"{key}: the model has no such layer")
        elif part == "alpha" and entry.shape in ((), (1,)):
            alphas[layer] = key
        elif part not in known:
            problems.append(f"{key}: a part of a method that is not read")
        elif part in held.get(layer, {}):
            problems.append(f"{key}: the same layer under two names")
        else:
            held.setdefault(layer, {})[part] = key
    problems += [
        f"{alphas[layer]}: an alpha without factors" for layer in alphas if layer not in held
    ]
    return held, alphas, problems


def _pairs(
    layers: Mapping[str, Tensors], alphas: Mapping[str, float], path: Path
) -> dict[str, Pair]:
    if lacking := [layer for layer, own in layers.items() if not {"A", "B"} <= own.keys()]:
        raise AdapterFileError(
            f"{path}: lora_down or lora_up is missing", problems=lacking[:_SHOWN]
        )
    found = {}
    for layer, own in layers.items():
        A, B = own["A"], own["B"]
        alpha = alphas.get(layer) or float(A.shape[0] if A.dim() else 1)
        sign = -1.0 if alpha < 0 else 1.0  # what strengthens nothing is a file made to subtract
        m = own.get("m")
        if m is not None and m.shape[0] == 1 and m.numel() > 1:
            raise AdapterFileError(
                f"{path}: {layer}: dora_scale is one number per input",
                expected="one per output, as the paper and PEFT have it",
            )
        found[layer] = Pair(A, B * sign, alpha * sign, None if m is None else m.reshape(-1))
    return found


def _found_lycoris(
    model: nn.Module,
    kind: type[LoHa] | type[LoKr],
    layers: Mapping[str, Tensors],
    alphas: Mapping[str, float],
    path: Path,
) -> Found:
    """LoHa or LoKr with one rank and one scale: ranks are filled with zeros, the rest of a scale
    goes into the first factor.
    """
    modules = modules_of(model)
    ranks = [r for own in layers.values() if (r := _rank(own))]
    r = max(ranks, default=1)
    first = next(iter(layers))
    scale = _scale_of(layers[first], alphas.get(first))
    names, excluded = exact_names(layers, modules)
    method: Any = kind(
        r=r,
        lora_alpha=whole(scale * r),
        target_modules=tuple(names),
        exclude_modules=tuple(excluded),
    )
    places, tensors, problems = Places(), dict[str, Tensors](), []
    for layer in sorted(layers, key=list(modules).index):
        own = _filled(layers[layer], r if kind is LoHa else 0)
        share = _scale_of(layers[layer], alphas.get(layer)) / scale
        key = "w1_a" if "w1_a" in own else "w1"
        own = {n: t.float() for n, t in own.items()}
        own[key] = own[key] * share if key in own else torch.empty(0)
        method = _factorised(method, own, modules[layer])
        wanted = method.start(describe(modules[layer]), torch.Generator())
        shaped = {
            n: t.reshape(wanted[n].shape)
            for n, t in own.items()
            if n in wanted and t.numel() == wanted[n].numel()
        }
        if shaped.keys() != wanted.keys() or own.keys() != wanted.keys():
            there = {n: tuple(t.shape) for n, t in own.items()}
            needed = {n: tuple(t.shape) for n, t in wanted.items()}
            problems.append(f"{layer}: {there}, but {kind.kind} has {needed} here")
        places[layer], tensors[layer] = (modules[layer], None, method), shaped
    if problems:
        raise AdapterFileError(
            f"{path} does not fit this {type(model).__name__}",
            problems=problems[:_SHOWN],
            mend="load the pipeline that the adapter was made for",
        )
    alike: Places = {layer: (module, None, method) for layer, (module, _, _) in places.items()}
    return Found(method, alike, tensors)


def _rank(own: Tensors) -> int:
    """The rank of the thin factors; 0 where there are none."""
    key = next((name for name in ("w1_b", "w2_b") if name in own), None)
    return own[key].shape[0] if key and own[key].dim() else 0


def _scale_of(own: Tensors, alpha: float | None) -> float:
    r = _rank(own)
    return 1.0 if not r or not alpha else alpha / r


def _filled(own: Tensors, r: int) -> Tensors:
    """Thin factors of LoHa at rank r."""
    found = dict(own)
    missing = r - _rank(own)
    if r and missing > 0:
        for name in ("w1_a", "w2_a"):
            found[name] = torch.cat([own[name], own[name].new_zeros(len(own[name]), missing)], 1)
        for name in ("w1_b", "w2_b"):
            found[name] = torch.cat([own[name], own[name].new_zeros(missing, own[name].shape[1])])
    return found


def _factorised(method: Any, own: Tensors, module: nn.Module) -> Any:
    """LoKr's settings under which a layer has factors of the sizes in the file."""
    if not isinstance(method, LoKr):
        return method
    if "w1_a" in own:
        method = replace(method, decompose_both=True)
    rows = own["w1_a" if "w1_a" in own else "w1"].shape[0] if own else 0
    for factor in dict.fromkeys((method.decompose_factor, -1, rows)):
        if factor:
            wanted = replace(method, decompose_factor=factor).start(
                describe(module), torch.Generator()
            )
            if all(n in own and own[n].numel() == t.numel() for n, t in wanted.items()):
                return replace(method, decompose_factor=factor)
    return method
