"""What every method must keep on every kind of layer. A new method is tested here by being in
METHODS.

Only VARIANTS may name a method: settings beside the plain ones that are worth the same tests.
"""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.attach.activate import Activation, activate
from lorica.attach.attach import attach_tensors
from lorica.attach.handle import Adapter
from lorica.attach.layers import describe, to_stored
from lorica.attach.plates import Route
from lorica.base.quantize import quantize_model
from lorica.base.storage import read_weight, write_weight
from lorica.errors import ActivationError, MergeError, TargetError
from lorica.methods import METHODS as EVERY
from lorica.methods.copy import Copy
from lorica.methods.method import STATE, Method

METHODS: dict[str, Any] = {kind: m for kind, m in EVERY.items() if hasattr(m, "apply")}
"""Those that sit on layers; selections of the base's own parameters are in attach/test_params."""

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {
        "plain": {"r": 3, "lora_alpha": 5},
        "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True},
        "gaussian": {"r": 3, "init_lora_weights": "gaussian"},
        "orthogonal": {"r": 2, "init_lora_weights": "orthogonal"},
        "pissa": {"r": 3, "init_lora_weights": "pissa"},
        "olora": {"r": 3, "init_lora_weights": "olora"},
        "dropout": {"r": 3, "lora_dropout": 0.4},
    },
    "lora-fa": {"plain": {"r": 3}, "pissa": {"r": 3, "init_lora_weights": "pissa"}},
    "dora": {
        "plain": {"r": 3, "lora_alpha": 5, "dora_detach_norm": False},
        "detached": {"r": 3, "lora_alpha": 5},
        "dropout": {"r": 3, "lora_dropout": 0.4},
    },
    "adalora": {
        "plain": {"init_r": 3, "target_r": 2, "lora_alpha": 9},
        "cut": {"init_r": 3, "target_r": 2, "lora_alpha": 9, "kept_r": 1},
        "dropout": {"init_r": 3, "target_r": 2, "lora_dropout": 0.4},
    },
    "vera": {"plain": {"r": 6, "d_initial": 0.4}, "dropout": {"r": 6, "vera_dropout": 0.4}},
    "loha": {"plain": {"r": 3}},
    "lokr": {
        "plain": {"r": 1, "decompose_both": True},
        "whole": {"r": 8, "decompose_factor": 2},
    },
    "hira": {"plain": {"r": 3}, "dropout": {"r": 3, "hira_dropout": 0.4}},
    "ia3": {"plain": {}, "on-input": {"on_input": True}},
    "road": {
        "plain": {"group_size": 2},
        "four": {"group_size": 2, "variant": "road_4"},
    },
    "sparse": {
        "plain": {"density": 0.2, "selection": "random"},
        "some": {"count": 3, "selection": "random"},
    },
    "bottleneck": {"plain": {"reduction_factor": 2}},
    "compacter": {"plain": {"reduction_factor": 1, "phm_dim": 1}},
}
BATCH = 4


class Host(nn.Module):
    """One layer, called as a model calls it."""

    def __init__(self, layer: nn.Module, other: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.other = other or nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.layer(x, x, x, need_weights=False)[0]
        return self.layer(x)


class BothExperts(nn.Module):
    """Every token goes through all experts; the second weight is stored as (experts, in, out)."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        shape = (4, 7, 11) if transposed else (4, 11, 7)
        self.up = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        parts = [x @ (w if self.is_transposed else w.t()) for w in self.up.unbind()]
        return 0.5 * parts[0] - parts[1] + 2.0 * parts[2] + 0.25 * parts[3]


class Router(nn.Module):
    """Reads a bare 2-D parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 7))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def _vectors(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(BATCH, *shape, generator=generator)


def _ids(length: int, vocabulary: int) -> Callable[[torch.Generator], Tensor]:
    """Without the ids 0 to 2, one of which is the padding that gets no gradient."""
    return lambda generator: torch.randint(3, vocabulary, (BATCH, length), generator=generator)


@dataclass(frozen=True)
class Case:
    """A layer: how it is made, fed and named.

    Attributes:
        reads: the parameter that other code reads, where the layer itself is not called.
        path: the module.
        storage: the quantizer that stores the layer's weight; None where it is plain.
    """

    make: Callable[[], nn.Module]
    sample: Callable[[torch.Generator], Tensor]
    reads: str | None = None
    path: str = "layer"
    storage: str | None = None

    @property
    def target(self) -> str:
        return f"{self.path}.{self.reads}" if self.reads and self.path == "layer" else self.path

    def place(self, method: Method) -> str:
        """The path of the slot."""
        read = self.reads is not None and not method.replaces
        return f"{self.path}.{self.reads}" if read else self.path


CASES = {
    "linear": Case(lambda: nn.Linear(7, 11), _vectors(5, 7)),
    "linear-nf4": Case(lambda: nn.Linear(70, 11), _vectors(5, 70), storage="nf4"),
    "linear-int8": Case(lambda: nn.Linear(7, 11, bias=False), _vectors(5, 7), storage="int8"),
    "linear-no-bias": Case(lambda: nn.Linear(13, 4, bias=False), _vectors(3, 13)),
    "linear-2d": Case(lambda: nn.Linear(7, 11), _vectors(7)),
    "linear-4d": Case(lambda: nn.Linear(7, 11), _vectors(3, 2, 7)),
    "conv1D": Case(lambda: Conv1D(11, 7), _vectors(5, 7)),
    "embedding": Case(lambda: nn.Embedding(23, 9, padding_idx=2), _ids(6, 23)),
    "embedding-gemma": Case(
        lambda: Gemma3TextScaledWordEmbedding(23, 9, 0, embed_scale=3.0), _ids(6, 23)
    ),
    "embedding-bart": Case(lambda: BartScaledWordEmbedding(23, 9, 0, embed_scale=2.5), _ids(6, 23)),
    "conv1d": Case(lambda: nn.Conv1d(5, 7, 3, stride=2, padding=1), _vectors(5, 12)),
    "conv1d-circular": Case(
        lambda: nn.Conv1d(5, 7, 4, padding=2, padding_mode="circular", bias=False), _vectors(5, 9)
    ),
    "conv2d": Case(
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        _vectors(4, 7, 8),
    ),
    "conv2d-same": Case(
        lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), _vectors(4, 7, 8)
    ),
    "conv2d-grouped": Case(lambda: nn.Conv2d(6, 9, 3, groups=3), _vectors(6, 5, 8)),
    "experts": Case(lambda: BothExperts(False), _vectors(5, 7), reads="up"),
    "experts-transposed": Case(lambda: BothExperts(True), _vectors(5, 7), reads="up"),
    "bare-parameter": Case(Router, _vectors(5, 7), reads="weight"),
    "packed": Case(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        _vectors(5, 8),
        reads="in_proj_weight",
    ),
    "weight-read": Case(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        _vectors(5, 8),
        reads="weight",
        path="layer.out_proj",
    ),
}


def _settings() -> dict[str, Callable[[Case], Method]]:
    def make(method: Any, settings: dict[str, Any]) -> Callable[[Case], Method]:
        return lambda case: method(target_modules=(case.target,), **settings)

    made: dict[str, Callable[[Case], Method]] = {"copy": lambda case: Copy()}
    for kind, method in METHODS.items():
        for variant, settings in VARIANTS.get(kind, {"plain": {}}).items():
            made[f"{kind}-{variant}"] = make(method, settings)
    return made


SETTINGS = _settings()


def _dropping(method: Method, case: Case) -> bool:
    return bool(method.dropout) and case.reads is not None


def _fits(method: Method, case: Case) -> bool:
    """Whether the method takes layers of this kind; where not, it says so by name."""
    module = Host(case.make()).get_submodule(case.path)
    layer = describe(module, case.reads if case.place(method) != case.path else None)
    readable = case.reads is None or method.replaces or hasattr(method, "delta")
    return readable and not method.problems(layer)


_FIRST = {f"{kind}-{next(iter(VARIANTS.get(kind, {'plain': {}})))}" for kind in METHODS} | {"copy"}
PAIRS = [
    pytest.param(SETTINGS[key], case, id=f"{key}-{name}")
    for key in SETTINGS
    for name, case in CASES.items()
    if case.storage is None or key in _FIRST  # how a weight is stored is no matter of variants
    # test_a_copy_of_a_read_weight_is_refused, test_a_copy_that_returns_a_tuple_cannot_be_mixed
    if not (key == "copy" and name in ("weight-read", "packed"))
    and not _dropping(SETTINGS[key](case), case)  # test_dropout_that_could_not_act_is_refused
    and _fits(SETTINGS[key](case), case)  # test_what_does_not_fit_is_refused_by_name
]
UNFIT = [
    pytest.param(SETTINGS[key], case, id=f"{key}-{name}")
    for key in SETTINGS
    for name, case in CASES.items()
    if key != "copy" and not _fits(SETTINGS[key](case), case)
]
PLAIN = [p for p in PAIRS if str(p.id).startswith(tuple(f"{key}-" for key in _FIRST))]
every = pytest.mark.parametrize(("settings", "case"), PAIRS)
# Where no setting but the tensors matter, one variant is enough.
plain = pytest.mark.parametrize(("settings", "case"), PLAIN)


def build(case: Case, *, dtype: torch.dtype = torch.float32) -> tuple[Host, Tensor]:
    """The model in eval mode, and an input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Host(case.make())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        if case.storage is not None:
            quantize_model(model.to(dtype), case.storage)
    x = case.sample(torch.Generator().manual_seed(5))
    return model.to(dtype).eval(), x.to(dtype) if x.is_floating_point() else x


def put(
    model: Host, case: Case, method: Method, name: str = "a", *, noise: int | None = 0
) -> Adapter:
    """Attach; a method that stands in for the layer is put as `modules_to_save` puts it.

    `noise` moves all tensors off their start, as training would.
    """
    if method.replaces:
        module = model.get_submodule(case.path)
        tensors = method.start(describe(module), torch.Generator().manual_seed(0))
        places = {case.path: (module, None, method)}
        adapter = attach_tensors(model, method, places, {case.path: tensors}, name=name)
    else:
        adapter = lorica.attach(model, method, name=name, seed=0)
    if noise is not None:
        generator = torch.Generator().manual_seed(100 + noise)
        for parameter in adapter.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapter


def bare(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def run(model: nn.Module, mixture: Any, x: Tensor) -> Tensor:
    with torch.no_grad(), activate(model, mixture):
        return model(x)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- the start ------------------------------------------------------------------------------------


@every
def test_it_starts_as_the_identity(settings, case):
    model, x = build(case)
    expected = bare(model, x)
    adapter = put(model, case, settings(case), noise=None)
    assert list(adapter.slots) == [case.place(adapter.method)]
    assert torch.equal(run(model, "a", x), expected)
    if not adapter.method.dropout:
        model.train()
        assert torch.equal(run(model, "a", x), run(model, None, x))


@every
def test_its_start_depends_on_the_seed_and_the_path_only(settings, case):
    def started(host: Host, name: str = "a", seed: int = 0) -> dict[str, Tensor]:
        method = settings(case)
        if method.replaces:
            adapter = put(host, case, method, noise=None)
        else:
            adapter = lorica.attach(host, method, name=name, seed=seed)
        return {f"{p}.{n}": t for p, s in adapter.slots.items() for n, t in s.tensors.items()}

    before = torch.get_rng_state()
    first = started(build(case)[0])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    crowded = build(case)[0]
    crowded.extra = nn.Linear(2, 2)
    again = started(crowded, name="another")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    if settings(case).replaces or not _draws(settings(case), case):
        return
    other = started(build(case)[0], seed=1)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def _draws(method: Method, case: Case) -> bool:
    """Whether anything of its start is drawn at random."""
    generator = torch.Generator().manual_seed(0)
    module = build(case)[0].get_submodule(case.path)
    layer = describe(module, None if case.place(method) == case.path else case.reads)
    state = generator.get_state()
    method.start(layer, generator)
    return not torch.equal(generator.get_state(), state)


@plain
def test_its_tensors_are_float32_leaves_that_train(settings, case):
    model, _ = build(case, dtype=torch.bfloat16)
    adapter = put(model, case, settings(case), noise=None)
    assert adapter.num_parameters == sum(p.numel() for p in adapter.parameters()) > 0
    for parameter in adapter.parameters():
        assert parameter.dtype == torch.float32 and parameter.is_leaf and parameter.requires_grad
        assert parameter.is_contiguous()
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in adapter.parameters()}


# --- training -------------------------------------------------------------------------------------


@every
def test_only_its_own_tensors_get_gradients(settings, case):
    model, x = build(case)
    a, b = put(model, case, settings(case)), put(model, case, settings(case), "b", noise=1)
    model.train()
    if x.is_floating_point():
        x.requires_grad_()
    with activate(model, a):
        model(x).square().sum().backward()
    for path, parameter in a.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), path
    assert all(p.grad is None for p in b.parameters())
    assert all(p.grad is None for p in model.parameters())
    if x.is_floating_point():
        assert x.grad is not None and x.grad.any()


@plain
def test_training_moves_all_its_tensors_and_no_bit_of_the_base(settings, case):
    model, x = build(case)
    before = copy.deepcopy(model.state_dict())
    a = put(model, case, settings(case), noise=None)
    b = put(model, case, settings(case), "b", noise=1)
    resting = [p.detach().clone() for p in b.parameters()]
    start = {n: p.detach().clone() for n, p in a.named_parameters()}
    optimizer = torch.optim.AdamW(a.parameters(), lr=0.02)
    losses = []
    model.train()
    for _ in range(4):
        with activate(model, a):
            loss = (model(x) - 1).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert min(losses[1:]) < losses[0]
    assert all(not torch.equal(p, start[n]) for n, p in a.named_parameters())
    assert all(torch.equal(p, q) for p, q in zip(b.parameters(), resting, strict=True))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@plain
def test_gradients_are_right_in_float64(settings, case):
    model, x = build(case, dtype=torch.float64)
    adapter = put(model, case, settings(case))
    slot = adapter.slots[case.place(adapter.method)]
    slot.tensors.update({n: t.double() for n, t in slot.tensors.items() if t.is_floating_point()})
    names = [n for n in slot.tensors if n not in slot.method.frozen]
    given = [slot.tensors[n].detach().requires_grad_() for n in names]

    def adapted(x: Tensor, *tensors: Tensor) -> Tensor:
        slot.tensors.update(zip(names, tensors, strict=True))
        return model(x)

    x = x[:1]
    if x.is_floating_point():
        x.requires_grad_()
    with activate(model, "a"):
        assert torch.autograd.gradcheck(
            adapted, (x, *given), eps=1e-6, atol=1e-8, fast_mode=x.numel() > 60
        )


@plain
def test_a_bfloat16_base_keeps_its_dtype(settings, case):
    model, x = build(case, dtype=torch.bfloat16)
    adapter = put(model, case, settings(case))
    base = run(model, None, x)
    with activate(model, "a"):
        output = model(x)
        output.float().square().mean().backward()
    assert output.dtype == torch.bfloat16
    assert not torch.equal(output, base)
    for parameter in adapter.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all() and parameter.grad.any()
    wide = run(copy.deepcopy(model).float(), "a", x.float() if x.is_floating_point() else x)
    close(output.detach().float(), wide, 0.06 * float(wide.abs().max()))


# --- as a weight ----------------------------------------------------------------------------------


def _write_merged(model: Host, case: Case, adapter: Adapter) -> bool:
    """Write what the adapter says the weights are; False where it says that there are none."""
    place = case.place(adapter.method)
    slot = adapter.slots[place]
    module = model.get_submodule(case.path)
    parameter = case.reads if place != case.path else "weight"
    layer = describe(module, parameter if place != case.path else None)
    with torch.no_grad():
        if slot.method.replaces:
            for name, tensor in slot.tensors.items():
                write_weight(module, name, tensor)
            return True
        weight = layer.weight()
        merged = slot.method.merged(weight, slot.tensors, layer)
        if merged is None:
            return False
        assert merged.shape == weight.shape and merged.dtype == weight.dtype
        stored = to_stored(module, parameter, merged)
        if hasattr(slot.method, "merged_bias") and getattr(module, "bias", None) is not None:
            module.bias.copy_(slot.method.merged_bias(module.bias, slot.tensors, layer))
        write_weight(module, parameter, stored)
    return True


@every
def test_merged_equals_attached(settings, case):
    model, x = build(case)
    adapter = put(model, case, settings(case))
    merged = build(case)[0]
    if not _write_merged(merged, case, adapter):
        grouped = describe(model.get_submodule(case.path)).geometry.get("groups", 1) > 1
        assert grouped or not hasattr(adapter.method, "delta")
        with pytest.raises(MergeError):
            lorica.merge(model, "a")
        return
    output = run(model, "a", x)
    assert (output - run(model, None, x)).abs().max() > 0.05
    close(output, bare(merged, x))


@plain
def test_the_merged_weight_has_the_dtype_it_was_given(settings, case):
    adapter = put(build(case)[0], case, settings(case))
    slot = next(iter(adapter.slots.values()))
    module = build(case)[0].get_submodule(case.path)
    layer = describe(module, None if case.place(adapter.method) == case.path else case.reads)
    for dtype in (torch.bfloat16, torch.float64):
        merged = slot.method.merged(layer.weight().to(dtype), slot.tensors, layer)
        assert merged is None or merged.dtype == dtype


# --- rows and mixtures ----------------------------------------------------------------------------


@every
def test_rows_of_a_batch_equal_each_alone(settings, case):
    model, x = build(case)
    put(model, case, settings(case))
    put(model, case, settings(case), "b", noise=1)
    rows = ["a", {"a": 0.25, "b": -1.5}, None, "b"]
    if case.reads is not None and not settings(case).replaces:
        with pytest.raises(
            ActivationError, match=rf"^{case.place(settings(case))}: .*read as a whole"
        ):
            run(model, rows, x)
        return
    together = run(model, rows, x)
    for number, row in enumerate(rows):
        close(together[[number]], run(model, row, x[[number]]), 1e-5)


@plain
def test_a_wrong_number_of_rows_names_the_place(settings, case):
    model, x = build(case)
    put(model, case, settings(case))
    with pytest.raises(ActivationError, match=rf"^{case.place(settings(case))}: "):
        run(model, ["a"] * 3, x)


@every
def test_a_mixture_is_the_weighted_sum_of_the_updates(settings, case):
    model, x = build(case, dtype=torch.float64)
    if case.reads == "in_proj_weight":  # attention is not linear in the weights before it
        return
    put(model, case, settings(case))
    put(model, case, settings(case), "b", noise=1)
    base = run(model, None, x)
    a, b = run(model, "a", x) - base, run(model, "b", x) - base
    close(run(model, {"a": 0.75, "b": -1.25}, x) - base, 0.75 * a - 1.25 * b, 1e-6)
    close(run(model, {"a": 0.5}, x) - base, 0.5 * a, 1e-6)
    assert torch.equal(run(model, {"a": 1.0}, x), run(model, "a", x))


@plain
def test_a_mixture_trains_all_its_adapters(settings, case):
    model, x = build(case)
    adapters = [put(model, case, settings(case), name, noise=i) for i, name in enumerate("ab")]
    with activate(model, {"a": 0.5, "b": 2.0}):
        model(x).square().sum().backward()
    for adapter in adapters:
        assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


# --- files ----------------------------------------------------------------------------------------


@plain
def test_saved_loaded_and_saved_again_it_is_the_same_bytes(settings, case, tmp_path):
    model, x = build(case)
    method = settings(case)
    if method.replaces:  # a file holds it beside another method
        kind = next(iter(METHODS))
        method = METHODS[kind](
            target_modules=("other",), modules_to_save=(case.path,), **_smallest(kind)
        )
        adapter = lorica.attach(model, method, name="a")
    else:
        adapter = put(model, case, method)
    lorica.save_adapter(adapter, tmp_path / "one")
    again = build(case)[0]
    lorica.save_adapter(lorica.load_adapter(again, tmp_path / "one", name="a"), tmp_path / "two")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert torch.equal(run(again, "a", x), run(model, "a", x))


# --- leaving --------------------------------------------------------------------------------------


def _snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "modules": [(path, id(m), type(m), set(m.__dict__)) for path, m in model.named_modules()],
        "parameters": [(path, id(p), p.requires_grad) for path, p in model.named_parameters()],
        "bits": {key: value.clone() for key, value in model.state_dict().items()},
    }


@plain
def test_detach_gives_the_very_same_model_back(settings, case):
    model, x = build(case)
    model.other.bias.requires_grad_(False)
    before, expected = _snapshot(model), bare(model, x)
    put(model, case, settings(case))
    put(model, case, settings(case), "b", noise=1)
    assert not any(p.requires_grad for p in model.parameters())
    activate(model, ["a"] * BATCH)
    lorica.detach(model, "a")
    assert torch.equal(run(model, None, x), expected)
    lorica.detach(model, "b")
    after = _snapshot(model)
    assert after["modules"] == before["modules"]
    assert after["parameters"] == before["parameters"]
    assert all(torch.equal(after["bits"][key], before["bits"][key]) for key in before["bits"])
    assert torch.equal(bare(model, x), expected)


@plain
def test_an_adapter_taken_off_leaves_the_other_as_it_was(settings, case):
    model, x = build(case)
    put(model, case, settings(case))
    put(model, case, settings(case), "b", noise=1)
    expected = run(model, "b", x)
    lorica.detach(model, "a")
    assert torch.equal(run(model, "b", x), expected)
    put(model, case, settings(case), "a", noise=2)
    assert torch.equal(run(model, "b", x), expected)


@plain
def test_a_copied_model_is_apart_and_reads_its_own_weights(settings, case):
    model, x = build(case)
    put(model, case, settings(case))
    with activate(model, "a"):
        twin = copy.deepcopy(model)
        expected = run(model, "a", x)
    assert torch.equal(run(twin, "a", x), expected)
    handle = lorica.adapters(twin)["a"]
    assert handle.model is twin
    with torch.no_grad():
        for parameter in [*handle.parameters(), *twin.parameters()]:
            parameter.add_(1)  # bytes of a quantized weight too
    assert torch.equal(run(model, "a", x), expected)
    place = case.place(handle.method)
    module = twin.get_submodule(case.path)
    plates = module.__dict__.get("_lorica") or module.__dict__["_lorica_weights"][case.reads]
    assert plates.slots["a"] is handle.slots[place]
    own = read_weight(module, case.reads or "weight")
    if plates.layer.kind != "other":
        assert torch.equal(to_stored(module, case.reads or "weight", plates.layer.weight()), own)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_errors_name_the_target(kind, case):
    model, _ = build(case)
    before = _snapshot(model)
    with pytest.raises(TargetError, match="'layerr' matches nothing; did you mean 'layer"):
        lorica.attach(model, METHODS[kind](target_modules=("layerr",), **_smallest(kind)))
    after = _snapshot(model)
    assert after["modules"] == before["modules"] and after["parameters"] == before["parameters"]


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("module", [nn.LayerNorm(5), nn.PReLU(), nn.Conv3d(2, 3, 2)])
def test_a_module_that_cannot_carry_it_is_refused_by_name(kind, module):
    model = Host(module)
    with pytest.raises(TargetError, match=rf"layer.*{type(module).__name__}"):
        lorica.attach(model, METHODS[kind](target_modules=("layer",), **_smallest(kind)))
    assert type(model.layer) is type(module)


@pytest.mark.parametrize(("settings", "case"), UNFIT)
def test_what_does_not_fit_is_refused_by_name(settings, case):
    model, _ = build(case)
    before = _snapshot(model)
    with pytest.raises(TargetError, match=rf"{settings(case).kind} does not fit(.|\n)*{case.path}"):
        lorica.attach(model, settings(case))
    after = _snapshot(model)
    assert after["modules"] == before["modules"] and after["parameters"] == before["parameters"]


READ = [case for case in CASES.values() if case.reads]


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("case", READ, ids=[name for name, c in CASES.items() if c.reads])
def test_dropout_that_could_not_act_is_refused(kind, case):
    dropping = [s for s in VARIANTS.get(kind, {}).values() if any("dropout" in key for key in s)]
    for settings in dropping:
        model, _ = build(case)
        with pytest.raises(TargetError, match=rf"{case.path}.{case.reads} .*dropout has no effect"):
            lorica.attach(model, METHODS[kind](target_modules=(case.target,), **settings))
        assert lorica.adapters(model) == {}


@pytest.mark.parametrize("kind", METHODS)
def test_a_copy_of_a_read_weight_is_refused(kind):
    model, _ = build(CASES["weight-read"])
    method = METHODS[kind](target_modules=("other",), modules_to_save=("layer",), **_smallest(kind))
    with pytest.raises(TargetError, match=r"other code reads the weights of layer\.out_proj"):
        lorica.attach(model, method)


def test_a_copy_that_returns_a_tuple_cannot_be_mixed():
    model, x = build(CASES["packed"])
    put(model, CASES["packed"], Copy())
    assert (run(model, "a", x) - run(model, None, x)).abs().max() > 0.05
    with pytest.raises(ActivationError, match="layer returns a tuple"):
        run(model, {"a": 0.5}, x)


def _smallest(kind: str) -> dict[str, Any]:
    return next(iter(VARIANTS.get(kind, {"plain": {}}).values()))


# --- dropout --------------------------------------------------------------------------------------


DROPPING = [
    p
    for p in PAIRS
    if "dropout" in str(p.id) and not str(p.id).endswith(("embedding", "-gemma", "-bart"))
]


@pytest.mark.parametrize(("settings", "case"), DROPPING)
def test_dropout_is_repeatable_from_its_seed_and_off_in_eval(settings, case):
    model, x = build(case)
    put(model, case, settings(case))
    still = run(model, "a", x)
    assert torch.equal(run(model, "a", x), still)
    model.train()

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(len(str(seed)))  # must not matter
        with torch.no_grad(), Activation(model, Route(("a",), dropout_seed=seed)):
            return model(x)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    mean = torch.stack([drawn(seed) for seed in range(120)]).double().mean(0)
    spread = float((drawn(1) - still).abs().mean())
    assert float((mean - still).abs().mean()) < 0.25 * spread
    torch.manual_seed(0)
    assert not torch.equal(run(model, "a", x), run(model, "a", x))


# --- the settings object --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", METHODS)
def test_the_settings_object_is_the_method(kind):
    method = METHODS[kind]()
    assert method.kind == kind and isinstance(method, Method)
    assert dataclasses.is_dataclass(method)
    for field in dataclasses.fields(method):
        is_state = bool(field.metadata.get(STATE))  # no setting of a run
        assert bool(field.metadata.get("help")) is not is_state, field.name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field.name, None)
    assert method == copy.deepcopy(method)
