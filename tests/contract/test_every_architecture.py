"""What attaching and activating must keep on every architecture."""

import copy
import functools
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import lorica
from architectures import ARCHITECTURES, CAUSAL, EXPERTS, Architecture
from attach.visits import probe
from lorica.attach.activate import activate
from lorica.attach.handle import Adapter
from lorica.attach.probe import unvisited
from lorica.errors import ActivationError, TargetError
from lorica.methods.lora import LoRA

TINY = LoRA(r=2, lora_alpha=3, target_modules="all-linear", init_lora_weights="random")
everywhere = pytest.mark.parametrize("name", ARCHITECTURES)

# Their weights are read as a whole, so all rows of a batch share one mixture there.
READS_WEIGHTS = {
    "mixtral": "experts",
    "qwen3_moe": "experts",
    "mamba": "dt_proj",
    "transformer-encoder": "linear1|out_proj|in_proj",
    "attention-net": "out_proj|proj_weight",
    # A layer of its attention is given the relative positions, which all rows share.
    "deberta-v2": "query_proj|key_proj",
}


@functools.cache
def _built(name: str) -> nn.Module:
    return ARCHITECTURES[name].build()


def build(name: str) -> tuple[Architecture, nn.Module]:
    return ARCHITECTURES[name], copy.deepcopy(_built(name))


def logits(arch: Architecture, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)  # dropout of the base in training mode
    return arch.logits(model(**inputs))


def quiet(arch: Architecture, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return logits(arch, model, inputs)


def merged_copy(name: str, adapter: Adapter) -> nn.Module:
    """A base of its own, with W + (alpha / r) B A written out, whatever the methods' code says."""
    model = copy.deepcopy(_built(name))
    modules = dict(model.named_modules(remove_duplicate=False))
    with torch.no_grad():
        for path, slot in adapter.slots.items():
            delta = (slot.tensors["B"].double() @ slot.tensors["A"].double()) * 1.5
            module = modules.get(path)
            if module is None:
                owner, _, parameter = path.rpartition(".")
                modules[owner].get_parameter(parameter).add_(delta)
            else:
                module.weight.add_(delta.t() if isinstance(module, Conv1D) else delta)
    return model


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within the tolerance times the size of the outputs, which noisy weights make large."""
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


# --- attached -------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("choice", ["all-linear", "auto"])
def test_attaching_leaves_the_model_as_it_was(name, choice):
    arch, model = build(name)
    inputs = arch.sample(model, 2, 6)
    expected = quiet(arch, model, inputs)
    frozen = quiet(arch, copy.deepcopy(model).requires_grad_(False), inputs)  # torch: other kernels
    keys = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = [(path, id(p)) for path, p in model.named_parameters()]
    trainable = [path for path, p in model.named_parameters() if p.requires_grad]
    modules = [(path, id(m), type(m)) for path, m in model.named_modules(remove_duplicate=False)]
    plain = [set(m.__dict__) for m in model.modules()]
    text = repr(model)

    adapter = lorica.attach(model, LoRA(r=2, target_modules=choice))
    activate(model, None)
    assert adapter.slots and adapter.reason
    assert list(model.state_dict()) == list(keys)
    assert [(path, id(p)) for path, p in model.named_parameters()] == parameters
    now = list(model.named_modules(remove_duplicate=False))
    assert [(path, id(m)) for path, m in now] == [entry[:2] for entry in modules]
    for (_, module), (_, _, kind) in zip(now, modules, strict=True):
        assert isinstance(module, kind)
        assert (type(module).__name__, type(module).__module__) == (kind.__name__, kind.__module__)
    assert repr(model) == text
    model.load_state_dict(copy.deepcopy(keys), strict=True)
    assert torch.equal(quiet(arch, model, inputs), frozen)

    lorica.detach(model, adapter)
    after = list(model.named_modules(remove_duplicate=False))
    assert [(path, id(m), type(m)) for path, m in after] == modules
    assert [set(m.__dict__) for m in model.modules()] == plain
    assert [(path, id(p)) for path, p in model.named_parameters()] == parameters
    assert [path for path, p in model.named_parameters() if p.requires_grad] == trainable
    assert all(torch.equal(value, keys[key]) for key, value in model.state_dict().items())
    assert torch.equal(quiet(arch, model, inputs), expected)


@everywhere
def test_a_fresh_adapter_changes_nothing_while_active(name):
    arch, model = build(name)
    inputs = arch.sample(model, 2, 5)
    expected = quiet(arch, model, inputs)
    lorica.attach(model, LoRA(r=2, target_modules="all-linear"))
    with activate(model, "default"):
        close(quiet(arch, model, inputs), expected, 1e-6)


# --- active ---------------------------------------------------------------------------------------


@everywhere
def test_active_equals_the_merged_copy_in_every_mode(name):
    """Evaluation with and without gradients (fast paths), training; no site is passed by."""
    arch, model = build(name)
    inputs = arch.sample(model, 2, 6)
    base = quiet(arch, model, inputs)
    adapter = lorica.attach(model, TINY)
    reference = merged_copy(name, adapter)
    expected = quiet(arch, reference, inputs)
    assert (expected - base).abs().max() > 0.003
    with activate(model, adapter):
        close(quiet(arch, model, inputs), expected)
        assert unvisited(model) == []
    with activate(model, adapter):
        close(logits(arch, model, inputs), expected)
        assert unvisited(model) == []
    model.train(), reference.train()
    expected = quiet(arch, reference, inputs)
    with activate(model, adapter):
        output = logits(arch, model, inputs)
        close(output, expected)
        assert unvisited(model) == []
        output.square().mean().backward()
    passed = [path for path, p in adapter.named_parameters() if p.grad is None or not p.grad.any()]
    # The keys' bias and the like have no say in a softmax, but every weight has.
    assert passed == []
    assert all(p.grad is None for p in model.parameters())


@everywhere
def test_rows_of_a_batch_equal_each_alone(name):
    arch, model = build(name)
    lorica.attach(model, TINY, name="a")
    lorica.attach(model, TINY, name="b", seed=1)
    inputs = arch.sample(model, 3, 6)
    rows = ["a", None, {"a": 0.5, "b": -1.25}]
    if name in READS_WEIGHTS:
        with activate(model, rows), pytest.raises(ActivationError, match=READS_WEIGHTS[name]):
            quiet(arch, model, inputs)
        return
    with activate(model, rows):
        together = quiet(arch, model, inputs)
        assert unvisited(model) == []
        assert torch.equal(logits(arch, model, inputs), together)
    for number, row in enumerate(rows):
        alone = {key: value[[number]] for key, value in inputs.items()}
        with activate(model, row):
            close(together[[number]], quiet(arch, model, alone))


@everywhere
def test_the_probe_agrees_with_how_each_layer_is_adapted(name):
    """Called layers are called and read layers are read, in evaluation and in training mode."""
    arch, model = build(name)
    adapter = lorica.attach(model, TINY)
    owners = {path: path.removesuffix(".weight") for path in adapter.slots}
    lorica.detach(model, adapter)
    modules = dict(model.named_modules(remove_duplicate=False))
    watched = {path: modules[path] for path in owners.values() if path in modules}
    inputs = arch.sample(model, 2, 6)
    for training in (False, True):
        model.train(training)
        visits = probe(model, lambda: model(**inputs), watched)
        for path, owner in owners.items():
            if owner not in watched:
                continue  # a bare parameter
            if path == owner:
                assert visits[owner].calls > 0, path
            else:
                assert visits[owner].calls + visits[owner].reads > 0, path
    assert all("_lorica" not in m.__dict__ for m in model.modules())


# --- copies and conversions -----------------------------------------------------------------------


@everywhere
def test_copies_are_apart_and_start_inactive(name):
    arch, model = build(name)
    inputs = arch.sample(model, 2, 5)
    base = quiet(arch, model, inputs)
    adapter = lorica.attach(model, TINY)
    frozen = quiet(arch, copy.deepcopy(_built(name)).requires_grad_(False), inputs)
    with activate(model, adapter):
        expected = quiet(arch, model, inputs)
        others = [copy.deepcopy(model)]
        if name != "wav2vec2":  # its weight_norm does not let itself be pickled
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            others.append(torch.load(file, weights_only=False))
        assert torch.equal(quiet(arch, model, inputs), expected)
    for other in others:
        handle = lorica.adapters(other)["default"]
        assert handle is not adapter and handle.model is other
        with activate(other, None):
            assert torch.equal(quiet(arch, other, inputs), frozen)
        with activate(other, handle):
            assert torch.equal(quiet(arch, other, inputs), expected)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.zero_()
        lorica.detach(other, "default")
        assert torch.equal(quiet(arch, other, inputs), base)
    with activate(model, adapter):
        assert torch.equal(quiet(arch, model, inputs), expected)


@everywhere
def test_bfloat16_changes_the_base_only(name):
    arch, model = build(name)
    if name in EXPERTS:  # torch's grouped product wants sizes that are multiples of 8
        model.set_experts_implementation("eager")
    adapter = lorica.attach(model, TINY)
    model.to(torch.bfloat16)
    inputs = {
        key: value.bfloat16() if value.is_floating_point() else value
        for key, value in arch.sample(model, 2, 5).items()
    }
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    with activate(model, None):
        base = quiet(arch, model, inputs)
    with activate(model, adapter):
        output = logits(arch, model, inputs)
        output.float().square().mean().backward()
    assert output.dtype == base.dtype and output.isfinite().all()
    assert not torch.equal(output, base)
    for path, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, path
        assert parameter.grad.isfinite().all(), path


@everywhere
def test_the_meta_device_and_back(name):
    """An adapter keeps its tensors where the base has none: they could not be loaded again."""
    arch, model = build(name)
    inputs = arch.sample(model, 2, 5)
    bits = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = lorica.attach(model, TINY)
    with activate(model, adapter):
        expected = quiet(arch, model, inputs)
    held = [(id(p), p.data_ptr()) for p in adapter.parameters()]
    model.to("meta")
    assert all(p.is_meta for p in model.parameters())
    assert [(id(p), p.data_ptr()) for p in adapter.parameters()] == held
    buffers = dict(_built(name).named_buffers())
    model.to_empty(device="cpu")
    model.load_state_dict(bits)
    with torch.no_grad():
        for key, value in model.named_buffers():  # those that no state dict holds
            value.copy_(buffers[key])
    with activate(model, adapter):
        assert torch.equal(quiet(arch, model, inputs), expected)


@everywhere
def test_attached_on_the_meta_device_then_loaded(name):
    arch, model = build(name)
    there = lorica.attach(model, TINY)
    expected = dict(there.named_parameters())
    bits, buffers = model.state_dict(), dict(model.named_buffers())
    empty = copy.deepcopy(_built(name)).to("meta")
    adapter = lorica.attach(empty, TINY)
    empty.load_state_dict(bits, assign=True)
    for path, module in empty.named_modules():
        for key in module._buffers:
            module._buffers[key] = buffers[f"{path}.{key}" if path else key]
    if hasattr(empty, "tie_weights"):
        empty.tie_weights()
    found = dict(adapter.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[path], expected[path]) for path in expected)
    inputs = arch.sample(model, 2, 5)
    with activate(model, there), activate(empty, adapter):
        close(quiet(arch, empty, inputs), quiet(arch, model, inputs), 1e-6)


@everywhere
def test_functional_call_sees_other_weights(name):
    arch, model = build(name)
    inputs = arch.sample(model, 2, 5)
    adapter = lorica.attach(model, TINY)
    weights = {key: value * 1.5 for key, value in model.named_parameters()}
    other = copy.deepcopy(_built(name))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    lorica.attach(other, TINY)

    def called(given: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return arch.logits(functional_call(model, given, kwargs=inputs))

    with activate(model, adapter), activate(other, "default"):
        assert torch.equal(called(dict(model.named_parameters())), quiet(arch, model, inputs))
        close(called(weights), quiet(arch, other, inputs), 1e-6)


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "gpt2", "mixtral", "bert", "albert", "t5", "whisper", "vit"]
)
def test_save_pretrained_writes_the_bare_base(name, tmp_path):
    arch, model = build(name)
    inputs = arch.sample(model, 2, 5)
    expected = quiet(arch, model, inputs)
    lorica.attach(model, TINY)
    with activate(model, "default"):
        model.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(quiet(arch, again.eval(), inputs), expected)


# --- generation -----------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "returned": {"num_beams": 3, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
}
ROWS = ["a", None, {"a": 0.5, "b": -1.25}]


def _generate(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **settings}
    return model.generate(**inputs, **settings)


def _generates(name: str, way: str) -> None:
    arch, model = build(name)
    strong = replace(TINY, lora_alpha=20)
    lorica.attach(model, strong, name="a")
    lorica.attach(model, strong, name="b", seed=1)
    inputs = arch.sample(model, 3, 5)
    inputs.pop("decoder_input_ids", None)
    with activate(model, ROWS):
        together = _generate(model, inputs, **WAYS[way])
    per_row = WAYS[way].get("num_return_sequences", 1)
    assert together.shape[0] == 3 * per_row
    for number, row in enumerate(ROWS):
        alone = {key: value[[number]] for key, value in inputs.items()}
        with activate(model, row):
            expected = _generate(model, alone, **WAYS[way])
        assert torch.equal(together[number * per_row : (number + 1) * per_row], expected), row
    if name != "bloom":  # this one repeats its last token, adapted or not
        with activate(model, None):
            assert not torch.equal(_generate(model, inputs, **WAYS[way]), together)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_generated_rows_equal_each_alone(name, way):
    _generates(name, way)


@pytest.mark.parametrize("name", [n for n in CAUSAL if n not in {*READS_WEIGHTS, "llama", "gpt2"}])
def test_beams_equal_each_row_alone(name):
    _generates(name, "beams")


def test_sampled_sequences_follow_their_row():
    arch, model = build("llama")
    lorica.attach(model, TINY, name="a")
    inputs = arch.sample(model, 2, 5)
    with activate(model, ["a", None]):
        torch.manual_seed(1)
        sampled = _generate(model, inputs, do_sample=True, num_return_sequences=3)
    assert sampled.shape == (6, 10)


def test_a_wrong_number_of_rows_names_a_layer():
    arch, model = build("llama")
    lorica.attach(model, TINY, name="a")
    with (
        activate(model, ["a"] * 3),
        pytest.raises(ActivationError, match=r"model\.layers\.0\..*3 rows"),
    ):
        quiet(arch, model, arch.sample(model, 4, 5))


def test_too_high_a_rank_names_the_layers_that_it_does_not_fit():
    _, model = build("mamba")
    with pytest.raises(
        TargetError, match=r"layers\.0\.mixer\.dt_proj\.weight \(3 -> 72\) and 1 more.*: r=4"
    ):
        lorica.attach(model, LoRA(r=4, target_modules="all-linear"))
    assert lorica.adapters(model) == {}
