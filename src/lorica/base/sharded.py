"""A base that is spread over several processes: each holds a share of the rows of every weight.

The layers are units of FSDP2 (`torch.distributed.fsdp.fully_shard`): in front of a layer its
weights are gathered, behind it they are let go, and again in the backward pass. Embeddings
and output head are units too, where each has a weight of its own; where they share one, it lies
whole in every process, as does the norm behind the last layer.

Every process reads its own rows of the weight files, so none ever has the whole base.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.initialization import guard_torch_init_functions

from lorica.base.choose import choose_dtype
from lorica.base.digest import digest_of_files
from lorica.base.empty import empty_model
from lorica.base.ending import end_token_note, set_end_token
from lorica.base.known import Base
from lorica.base.locate import weight_files
from lorica.base.processes import Processes, first_line, is_gone
from lorica.base.tokenizer import load_tokenizer
from lorica.errors import BaseModelError

Where = Mapping[str, tuple[Path, str]]
"""Tensor of the model -> its file, and its name there."""


def load_sharded(
    name: str | Path,
    processes: Processes,
    *,
    dtype: str = "auto",
    revision: str = "main",
    trust_remote_code: bool = False,
    eos_token: str | None = None,
) -> nn.Module:
    """A causal language model that processes hold together; arguments as of `load_model`.

    Raises:
        BaseModelError: as `load_model`; or its weight files are not on this machine, are quantized,
            or it leaves out layers at random, or it cannot be spread.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    chosen = choose_dtype(dtype, processes.device)
    assert isinstance(chosen, torch.dtype)
    files = weight_files(name, revision=revision)
    if not files:
        raise BaseModelError(
            f"the weights of {name} are not on this machine as safetensors",
            expected="a folder, or a hub id that was fetched before: processes read it by rows",
            mend=f"fetch it once: hf download {name}",
        )
    model: Any = empty_model(name, dtype=chosen, **options)
    if getattr(model.config, "quantization_config", None) is not None:
        raise BaseModelError(
            f"{name} is quantized, and packed weights are not spread over processes",
            mend="name the base that it was made from, or train it in one process",
        )
    _refuse_dropped_layers(model, name)
    unused = shard(model, files, processes)
    lasting = str(Path(name).absolute()) if Path(name).is_dir() else str(name)
    digest = digest_of_files(files[0].parent) if processes.first else ""
    base = Base(lasting, "causal-lm", processes.text_of_first(digest), processes=processes)
    base.tokenizer = load_tokenizer(name, eos_token=eos_token, **options)
    if eos_token is not None:
        set_end_token(model, base.tokenizer, eos_token)
    if note := end_token_note(model, base.tokenizer):
        base.notes.append(note)
    if unused:
        shown = ", ".join(unused[:3]) + (" ..." if unused[3:] else "")
        base.notes.append(f"{len(unused)} tensors of the files are not used: {shown}")
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    base.notes.append(
        f"{processes.size} processes hold it together, each {own_bytes(model):,} of "
        f"{total:,} bytes between the passes"
    )
    model.__dict__["_lorica_base"] = base
    return model.eval()


def _refuse_dropped_layers(model: Any, name: str | Path) -> None:
    """Each process draws for itself which layers its pass leaves out; then it waits in vain for the
    others to gather what they go by.
    """
    if dropped := [*_layer_drops(model.config.to_dict())]:
        raise BaseModelError(
            f"{name} leaves out layers at random when it trains ({', '.join(dropped)}), and "
            "processes that hold a base together go through each of them together",
            mend="set it to 0 in the config.json of the base, or train it in one process",
        )


def _layer_drops(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _layer_drops(value)
        elif "layerdrop" in str(key).replace("_", "") and value:
            yield f"{key}: {value}"


def shard(model: Any, files: Sequence[Path], processes: Processes) -> list[str]:
    """Spread a model without numbers over processes, and let each read its share.

    Args:
        model: on the meta device, in the dtype that it is to have, without adapters.
        files: its weight files.

    Returns:
        names of tensors in the files that it has no use for.

    Raises:
        BaseModelError: the files do not fill the model by their names, or the model cannot be
            spread in this way.
    """
    model.requires_grad_(False)
    where, unused = _found(model, files)
    mesh = processes.mesh
    backbone = model.base_model
    units = _units(model, backbone)
    if not units:
        raise BaseModelError(
            f"a {type(model).__name__} has no list of layers to spread over processes",
            mend="train it in one process, with quantize where memory is short",
        )
    for unit in units:
        fully_shard(unit, mesh=mesh)
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        fully_shard(head, mesh=mesh, reshard_after_forward=True)
    whole = {p for p in backbone.parameters() if not isinstance(p, DTensor)}
    fully_shard(backbone, mesh=mesh, ignored_params=whole)
    _fill(model, where, processes.device)
    _start_buffers(model, processes.device)
    _try(model, processes.device)
    return unused


def own_bytes(model: nn.Module) -> int:
    """Bytes of the weights that lie in this process between two passes."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(p.numel() * p.element_size() for p in local)


def _units(model: Any, backbone: nn.Module) -> list[nn.Module]:
    """What is gathered and let go as one: the layers, and the embeddings where no other module
    shares them.
    """
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            layers = [m for m in module if any(True for _ in m.parameters())]
            found += layers
            inside.update(*(m.modules() for m in layers))
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if table is not None and (head is None or table.weight is not head.weight):
        found.append(table)
    return found


def _found(model: Any, files: Sequence[Path]) -> tuple[Where, list[str]]:
    """Where the tensors of the model lie, and what of the files it has no use for."""
    there: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            there |= dict.fromkeys(stored.keys(), file)
    prefix = f"{model.base_model_prefix}."
    where: dict[str, tuple[Path, str]] = {}
    own = model.state_dict(keep_vars=True)
    for name in own:
        spelled = (name, name.removeprefix(prefix), prefix + name)
        if (stored_as := next((s for s in spelled if s in there), None)) is not None:
            where[name] = there[stored_as], stored_as
    known = {id(own[name]) for name in where}  # of a tied pair one is enough
    if missing := [name for name, tensor in own.items() if id(tensor) not in known]:
        raise BaseModelError(
            f"the names in the weight files do not fill a {type(model).__name__}: {len(missing)} "
            "tensors are missing",
            problems=missing[:10],
            expected="files with the names of the model: a spread base is read by rows, and "
            "nothing is converted on the way",
            mend="load it once by lorica or transformers and save it again; or train it in one "
            "process",
        )
    used = {stored for _, stored in where.values()}
    return where, sorted(set(there) - used)


@torch.no_grad()
def _fill(model: nn.Module, where: Where, device: torch.device) -> None:
    """Read the rows of this process, and the whole of what is not spread."""
    made: dict[int, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is None or (kind is module._buffers and not _is_saved(module, name)):
                    continue
                full = f"{path}.{name}" if path else name
                if id(tensor) not in made and full in where:
                    made[id(tensor)] = _read(tensor, *where[full], device)
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None and id(tensor) in made:
                    kind[name] = made[id(tensor)]  # type: ignore[assignment]


def _read(tensor: Tensor, file: Path, name: str, device: torch.device) -> Tensor:
    """A tensor with the numbers of a file, or those of its rows that belong to this process."""
    shape, offset = tuple(tensor.shape), (0,) * tensor.dim()
    if isinstance(tensor, DTensor):
        mesh, placements = tensor.device_mesh, tensor.placements
        local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    with safe_open(file, framework="pt") as stored:
        lies = stored.get_slice(name)
        if tuple(lies.get_shape()) != shape:
            raise BaseModelError(
                f"{file}: {name} is {tuple(lies.get_shape())}, and the model has {shape}"
            )
        if not isinstance(tensor, DTensor):
            rows = stored.get_tensor(name)
        elif math.prod(local):
            rows = lies[offset[0] : offset[0] + local[0]]
        else:
            rows = torch.empty(local)
        # a copy: what is mapped would change with the file
        rows = rows.to(device=device, dtype=tensor.dtype, copy=True)
    if isinstance(tensor, DTensor):
        how = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
        rows = DTensor.from_local(rows, mesh, placements, **how)
    if isinstance(tensor, nn.Parameter):
        rows = nn.Parameter(rows, requires_grad=False)
    # transformers starts what lacks this mark, also beside a buffer that alone is to be started
    rows._is_hf_initialized = True  # type: ignore[attr-defined]
    return rows


def _is_saved(module: nn.Module, buffer: str) -> bool:
    return buffer not in module._non_persistent_buffers_set


@torch.no_grad()
def _start_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers that no file has, as the model itself starts them.

    Each is started twice, on other numbers: what is not the same then was not written, or is drawn.
    """
    broken: list[str] = []
    for path, module in model.named_modules():
        own = {n: b for n, b in module._buffers.items() if b is not None and b.is_meta}
        if not own:
            continue
        found: list[dict[str, Tensor]] = []
        for second in (False, True):
            for name, buffer in own.items():
                module._buffers[name] = _unwritten(buffer, device, second=second)
            with guard_torch_init_functions():
                model._init_weights(module)
            found.append({name: module._buffers[name].clone() for name in own})
        broken += [f"{path}.{n}" for n, first in found[0].items() if not first.equal(found[1][n])]
    if broken:
        raise BaseModelError(
            f"a {type(model).__name__} does not say how these are computed, and no file has them",
            problems=broken[:10],
            mend="train it in one process",
        )


def _unwritten(like: Tensor, device: torch.device, *, second: bool) -> Tensor:
    """Numbers that no model starts a buffer with, to see whether something was written there."""
    value = torch.full_like(like, int(second), device=device)
    return value.fill_(torch.nan) if value.is_floating_point() and not second else value


def _try(model: Any, device: torch.device) -> None:
    """Run the model once: FSDP takes its first pass to find out which unit is the outermost."""
    try:
        with torch.no_grad():
            model.eval()(torch.ones(1, 2, dtype=torch.long, device=device), use_cache=False)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        if is_gone(error):
            raise
        raise BaseModelError(
            f"a {type(model).__name__} cannot be spread over processes: {first_line(error)}",
            mend="train it in one process, with quantize where memory is short",
        ) from error
