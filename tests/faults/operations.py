"""The operations that write what a user must not lose, and what has to be true after any fault."""

import hashlib
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.utils import logging

from architectures import ARCHITECTURES
from faults.injection import Operation
from lorica.attach.attach import attach
from lorica.attach.handle import adapters
from lorica.errors import LoricaError
from lorica.files.adapter import load_adapter, save_adapter
from lorica.files.whole import save_merged
from lorica.methods.lora import LoRA
from lorica.records.folder import RunFolder
from lorica.records.read import read_lines
from lorica.records.write import RunRecorder
from lorica.train import checkpoint
from lorica.train.checkpoint import State, load, save

IDENTITY = {"base": "abc"}
ADAPTER = "adapter"

logging.disable_progress_bar()  # a fault would leave it half-drawn


def state(step: int) -> State:
    """A small state that is told from those of other steps by every tensor."""
    generator = torch.Generator().manual_seed(step)

    def tensors() -> dict:
        return {name: torch.randn(5, 7, generator=generator) for name in "AB"}

    return State(
        step,
        IDENTITY,
        counters={"a": {"step": step}},
        adapters={"a": tensors()},
        optimizers={"a": tensors()},
        best={"a": tensors()},
    )


def differs(found: State) -> str | None:
    """What in a state is not that of its step."""
    wanted = state(found.step)
    if found.counters != wanted.counters:
        return f"counters {found.counters} in the state of step {found.step}"
    for group in ("adapters", "optimizers", "best"):
        for key, tensor in getattr(wanted, group)["a"].items():
            if not torch.equal(getattr(found, group)["a"][key], tensor):
                return f"{group} of another step in the state of step {found.step}"
    return None


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


# --- checkpoints ----------------------------------------------------------------------------------


def _two_saved(folder: Path) -> None:
    save(folder, state(1))
    save(folder, state(2))


def _saved_or_not(folder: Path, ended: bool) -> str | None:
    found, notes = load(folder, IDENTITY)
    if notes:
        return f"something was torn: {notes}"
    if found is None or found.step not in ((3,) if ended else (2, 3)):
        return f"read {found and found.step} after the save {'ended' if ended else 'did not end'}"
    if fault := differs(found):
        return fault
    checkpoint.clean(folder)
    save(folder, state(3))  # the disk is well again
    found, _ = load(folder, IDENTITY)
    if found is None or found.step != 3 or differs(found):
        return "saving once more did not mend it"
    odd = [name for name in names(folder) if not name.startswith("step-")]
    return f"left behind: {odd}" if odd else None


def _saved_after_loss(folder: Path, ended: bool) -> str | None:
    """After a loss of power a torn checkpoint may be there, but it is never taken for one; and what
    was told to be saved is saved.
    """
    found, _ = load(folder, IDENTITY)
    wanted = (3,) if ended else (2, 3)
    if found is None or found.step not in wanted:
        return f"read {found and found.step} instead of {wanted}"
    return differs(found)


SAVE = Operation("save and prune", _two_saved, lambda f: save(f, state(3)), _saved_or_not)
FIRST_SAVE = Operation(
    "first save",
    lambda folder: None,
    lambda folder: save(folder / "checkpoints", state(3)),
    lambda folder, ended: _first_saved(folder / "checkpoints", ended),
)


def _first_saved(folder: Path, ended: bool) -> str | None:
    found, notes = load(folder, IDENTITY)
    if notes or (found is None and ended) or (found is not None and differs(found)):
        return f"read {found and found.step}, told {notes}"
    save(folder, state(3))
    return None


def _one_damaged(folder: Path) -> None:
    for step in (1, 2, 3):
        save(folder, state(step), keep=3)
    victim = folder / "step-00000003/adapters/a.safetensors"
    raw = bytearray(victim.read_bytes())
    raw[-3] ^= 1
    victim.write_bytes(raw)
    half = folder / ".tmp-step-00000004-x"
    half.mkdir()
    (half / "state.json").write_text("{")


def _recover(folder: Path) -> None:
    checkpoint.clean(folder)
    load(folder, IDENTITY)


def _recovered(folder: Path, ended: bool) -> str | None:
    found, _ = load(folder, IDENTITY)  # again, with the system well
    if found is None or found.step != 2 or differs(found):
        return f"read {found and found.step} instead of step 2"
    if not {"step-00000001", "step-00000002"} <= {*names(folder)}:
        return f"a good checkpoint is gone: {names(folder)}"
    return None


RECOVER = Operation("recovery: verify, set aside, clean", _one_damaged, _recover, _recovered)


def _save_after_recovery(folder: Path) -> None:
    _recover(folder)
    save(folder, state(4))


def _saved_after_recovery(folder: Path, ended: bool) -> str | None:
    found, _ = load(folder, IDENTITY)
    wanted = (4,) if ended else (2, 4)
    if found is None or found.step not in wanted or differs(found):
        return f"read {found and found.step} instead of {wanted}"
    return None


STACKED = Operation(
    "recovery and the next save", _one_damaged, _save_after_recovery, _saved_after_recovery
)

# --- run folders ----------------------------------------------------------------------------------


def _begin(folder: Path, *, replace: bool = False) -> None:
    with RunFolder.create(folder / "run", replace=replace) as held:
        recorder = RunRecorder(held, config="r: 4\n", on_warning=lambda text: None)
        recorder.start({"versions": {"lorica": "1"}})
        for step in (1, 2):
            recorder.step({"step": step, "loss": 1.0})
            recorder.event("checkpoint", f"checkpoint of step {step} written")
        recorder.finish({"status": "finished"})


def _begun(folder: Path, ended: bool) -> str | None:
    """The same again must work, or be refused as a run that is whole."""
    run = folder / "run"
    lines = read_lines(run / "metrics.jsonl")
    if lines.broken:
        return f"broken lines: {lines.broken}"
    try:
        with RunFolder.create(run):
            return None
    except LoricaError as error:
        if "already holds a run" not in str(error):
            return str(error)
    with RunFolder.open(run):
        left = [name for name in names(run) if name.startswith((".tmp-", ".old-"))]
    return f"left behind: {left}" if left else None


BEGIN = Operation("begin a run, rows, end", lambda folder: None, _begin, _begun)
REPLACE = Operation("replace a run", _begin, lambda folder: _begin(folder, replace=True), _begun)

# --- adapters and merged models -------------------------------------------------------------------


def _model(seed: int | None = None) -> nn.Module:
    model = ARCHITECTURES["llama"].build()
    if seed is not None:
        adapter = attach(model, LoRA(r=2, target_modules=["q_proj"]), name="a", seed=seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                generator = torch.Generator().manual_seed(seed)
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def _publish(folder: Path, seed: int) -> None:
    save_adapter(adapters(_model(seed))["a"], folder / ADAPTER, overwrite=True)


def _sum(folder: Path) -> str:
    model = _model()
    adapter = load_adapter(model, folder / "adapter", name="a")
    raw = b"".join(p.detach().numpy().tobytes() for p in adapter.parameters())
    return hashlib.sha256(raw).hexdigest()


def _publication(folder: Path, ended: bool) -> str | None:
    """The old adapter or the new one, whole; and publishing again gives the new one."""
    try:
        found = _sum(folder)
    except LoricaError as error:
        return f"no whole adapter: {error}"
    _publish(folder / "other", 2)
    new = _sum(folder / "other")
    if ended and found != new:
        return "it ended, but the old one is there"
    _publish(folder, 2)
    return None if _sum(folder) == new else "publishing once more did not mend it"


def _published_after_loss(folder: Path, ended: bool) -> str | None:
    try:
        found = _sum(folder)
    except LoricaError as error:
        return f"no whole adapter: {error}"
    for seed in (2,) if ended else (1, 2):
        if found == _sum_of(seed):
            return None
    return "neither the old nor the new adapter"


@cache
def _sum_of(seed: int) -> str:
    with tempfile.TemporaryDirectory() as place:
        _publish(Path(place), seed)
        return _sum(Path(place))


def _first_publication(folder: Path, ended: bool) -> str | None:
    if not (folder / "adapter").exists() and not ended:
        return None
    return _publication(folder, ended)


PUBLISH = Operation(
    "publish an adapter over another",
    lambda folder: _publish(folder, 1),
    lambda folder: _publish(folder, 2),
    _publication,
)
FIRST_PUBLISH = Operation(
    "publish an adapter",
    lambda folder: None,
    lambda folder: _publish(folder, 2),
    _first_publication,
)


def _write_model(folder: Path, seed: int) -> None:
    model = _model()
    with torch.no_grad():
        model.lm_head.weight.fill_(seed)
    save_merged(model, folder / "model", overwrite=True)


def _model_whole(folder: Path, ended: bool) -> str | None:
    try:
        model = LlamaForCausalLM.from_pretrained(folder / "model", local_files_only=True)
    except Exception as error:
        return f"no whole model: {error}"
    value = model.lm_head.weight.detach().unique().tolist()
    wanted = [[2.0]] if ended else [[1.0], [2.0]]
    return None if value in wanted else f"it holds {value[:3]}"


MERGE = Operation(
    "write a merged model over another",
    lambda folder: _write_model(folder, 1),
    lambda folder: _write_model(folder, 2),
    _model_whole,
)

LOSSES = ((SAVE, _saved_after_loss), (PUBLISH, _published_after_loss))
"""What is put to the test of a loss of power, and what has to be true then."""

OPERATIONS = (
    SAVE,
    FIRST_SAVE,
    RECOVER,
    STACKED,
    BEGIN,
    REPLACE,
    FIRST_PUBLISH,
    PUBLISH,
    MERGE,
)
