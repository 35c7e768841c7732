"""Putting adapters on and taking them off: names, seeds, handles, heads, refusals."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lorica
from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach_tensors
from lorica.attach.handle import Adapter, attached_to, find
from lorica.attach.site import is_site
from lorica.errors import ConfigError, LoricaError, TargetError
from lorica.methods.lora import LoRA

SMALL = LoRA(r=2, target_modules="all-linear", init_lora_weights="random")


def _text(name: str = "bert") -> tuple[nn.Module, dict[str, Tensor]]:
    arch = ARCHITECTURES[name]
    model = arch.build()
    return model, arch.sample(model, 3, 5)


def _logits(model: nn.Module, inputs: dict[str, Tensor], mixture) -> Tensor:
    with torch.no_grad(), activate(model, mixture):
        return model(**inputs).logits


def test_the_handle_is_the_door_to_what_trains():
    model, _ = _text()
    adapter = lorica.attach(model, SMALL, name="sql")
    named = dict(adapter.named_parameters())
    assert len(named) == 2 * len(adapter.slots)
    path = "bert.encoder.layer.0.attention.self.query"
    assert named[f"{path}.A"] is adapter.slots[path].tensors["A"]
    assert list(named.values()) == list(adapter.parameters())
    assert adapter.num_parameters == sum(p.numel() for p in named.values())
    assert adapter.model is model and "12 places" in repr(adapter) and "'sql'" in repr(adapter)
    assert lorica.adapters(model) == {"sql": adapter}
    assert find(model, "sql") is find(model, adapter) is adapter
    model_order = [p for p, m in model.named_modules() if is_site(m)]
    assert list(adapter.slots) == model_order


def test_a_mistake_that_trains_nothing_raises():
    model, inputs = _text()
    adapter = lorica.attach(model, SMALL)
    with activate(model, adapter):
        model(**inputs).logits.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    with activate(model, None), pytest.raises(RuntimeError, match="does not require grad"):
        model(**inputs).logits.sum().backward()


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../x", ".x", "é", "x" * 65, "a\n"])
def test_unusable_names(name):
    with pytest.raises(ConfigError, match="cannot be the name of an adapter"):
        lorica.attach(nn.Sequential(nn.Linear(3, 3)), SMALL, name=name)


def test_a_name_that_is_taken_and_one_that_is_not_there():
    model, _ = _text()
    lorica.attach(model, SMALL, name="sql")
    with pytest.raises(ConfigError, match="'sql' is attached already"):
        lorica.attach(model, SMALL, name="sql")
    with pytest.raises(
        ConfigError, match=r"(?s)no adapter 'sqll'.*one of: sql.*did you mean 'sql'"
    ):
        lorica.detach(model, "sqll")
    lorica.detach(model, "sql")
    with pytest.raises(ConfigError, match=r"(?s)no adapter 'sql'.*one of: none"):
        lorica.detach(model, "sql")


def test_a_failure_leaves_the_model_as_it_was(monkeypatch):
    model, _ = _text()
    classes = [type(m) for m in model.modules()]
    kept = [set(m.__dict__) for m in model.modules()]
    real, calls = LoRA.start, []

    def failing(self, layer, generator):
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError
        return real(self, layer, generator)

    monkeypatch.setattr(LoRA, "start", failing)
    with pytest.raises(MemoryError):
        lorica.attach(model, SMALL)
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == kept
    assert all(p.requires_grad for p in model.parameters()) and lorica.adapters(model) == {}


def test_a_failure_beside_another_adapter_leaves_that_one(monkeypatch):
    model, inputs = _text()
    lorica.attach(model, LoRA(r=2, target_modules=["query"], init_lora_weights="random"), name="a")
    expected = _logits(model, inputs, "a")

    def failing(self, layer, generator):
        raise MemoryError

    monkeypatch.setattr(LoRA, "start", failing)
    with pytest.raises(MemoryError):
        lorica.attach(model, SMALL, name="b")
    assert sum(is_site(m) for m in model.modules()) == 2
    assert torch.equal(_logits(model, inputs, "a"), expected)


def test_flags_come_back_as_they_were_found():
    model, _ = _text()
    frozen = [p for n, p in model.named_parameters() if "embeddings" in n]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    a = lorica.attach(model, SMALL, name="a")
    b = lorica.attach(model, SMALL, name="b")
    assert not any(p.requires_grad for p in model.parameters())
    lorica.detach(model, a)
    assert not any(p.requires_grad for p in model.parameters())
    lorica.detach(model, b)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_a_parameter_that_was_renamed_meanwhile_does_not_stop_detach():
    model = nn.ModuleDict({"a": nn.Linear(5, 5), "b": nn.Linear(5, 5)})
    lorica.attach(model, LoRA(r=2, target_modules=["a"]))
    nn.utils.parametrizations.weight_norm(model["b"])
    lorica.detach(model, "default")
    assert type(model["a"]) is nn.Linear and model["a"].weight.requires_grad


def test_same_seed_same_start_whatever_else_is_there():
    one, _ = _text()
    two, _ = _text()
    lorica.attach(two, SMALL, name="other", seed=5)
    a = dict(lorica.attach(one, SMALL, name="a", seed=3).named_parameters())
    narrow = LoRA(r=2, target_modules=["query"], init_lora_weights="random")
    b = dict(lorica.attach(two, narrow, name="b", seed=3).named_parameters())
    assert b and all(torch.equal(tensor, a[path]) for path, tensor in b.items())
    query, key = (f"bert.encoder.layer.0.attention.self.{x}.A" for x in ("query", "key"))
    assert not torch.equal(a[query], a[key])


def test_a_tied_layer_adapts_one_of_the_two():
    arch = ARCHITECTURES["llama-tied"]
    model = arch.build()
    inputs = arch.sample(model, 2, 5)
    adapter = lorica.attach(
        model, LoRA(r=2, target_modules=["embed_tokens"], init_lora_weights="random")
    )
    assert list(adapter.slots) == ["model.embed_tokens"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    reference = arch.build()
    delta = (
        8.0
        * (
            adapter.slots["model.embed_tokens"].tensors["B"]
            @ adapter.slots["model.embed_tokens"].tensors["A"]
        ).t()
    )
    untied = nn.Embedding.from_pretrained(
        reference.model.embed_tokens.weight.detach() + delta.detach()
    )
    with torch.no_grad():
        expected = reference(inputs_embeds=untied(inputs["input_ids"])).logits
    torch.testing.assert_close(_logits(model, inputs, adapter), expected, rtol=1e-5, atol=1e-5)


def test_a_module_used_twice_is_one_place():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.again = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.first(x))

    model = Twice()
    adapter = lorica.attach(model, SMALL)
    assert list(adapter.slots) == ["first"]
    delta = 8.0 * adapter.slots["first"].tensors["B"] @ adapter.slots["first"].tensors["A"]
    weight, bias, x = (
        model.first.weight.detach() + delta.detach(),
        model.first.bias,
        torch.randn(4, 5),
    )
    expected = nn.functional.linear(nn.functional.linear(x, weight, bias), weight, bias)
    with torch.no_grad(), activate(model, adapter):
        torch.testing.assert_close(model(x), expected)


def test_tensors_that_exist_are_taken_over():
    model = nn.Sequential(nn.Linear(4, 6))
    method = LoRA(r=2, target_modules=("0",))
    A, B = torch.randn(2, 4), torch.randn(6, 2)
    adapter = attach_tensors(
        model, method, {"0": (model[0], None, method)}, {"0": {"A": A, "B": B}}
    )
    assert adapter.slots["0"].tensors["A"].data_ptr() == A.data_ptr()
    with pytest.raises(ConfigError, match="attached already"):
        attach_tensors(model, method, {}, {})


# --- modules trained whole ------------------------------------------------------------------------


def test_modules_to_save_train_beside_the_adapter():
    model, inputs = _text()
    before = copy.deepcopy(model.state_dict())
    method = LoRA(r=2, target_modules=["query"], modules_to_save=["classifier"])
    adapter = lorica.attach(model, method)
    assert "classifier" in adapter.slots and adapter.slots["classifier"].method.kind == "copy"
    base = _logits(model, inputs, None)
    assert torch.equal(_logits(model, inputs, adapter), base)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    for _ in range(2):
        with activate(model, adapter):
            model(**inputs).logits.square().sum().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    assert not torch.equal(_logits(model, inputs, adapter), base)
    assert torch.equal(_logits(model, inputs, None), base)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    head = adapter.slots["classifier"].tensors
    assert not torch.equal(head["weight"], before["classifier.weight"])


def test_a_container_to_save_is_copied_down_to_its_leaves():
    model, inputs = _text("roberta")
    method = LoRA(r=2, target_modules=["query", "dense"], modules_to_save=["classifier"])
    adapter = lorica.attach(model, method)
    kinds = {path: slot.method.kind for path, slot in adapter.slots.items()}
    assert kinds["classifier.dense"] == kinds["classifier.out_proj"] == "copy"
    assert kinds["roberta.encoder.layer.0.output.dense"] == "lora"
    lorica.attach(model, method, name="other")
    with torch.no_grad():
        lorica.adapters(model)["other"].slots["classifier.out_proj"].tensors["bias"].add_(1.0)
    rows = _logits(model, inputs, ["default", "other", {"other": 0.5}])
    base = _logits(model, inputs, None)
    torch.testing.assert_close(rows - base, torch.tensor([[0.0], [1.0], [0.5]]).expand(3, 3))


def test_modules_to_save_that_do_nothing_are_refused():
    model, _ = _text()
    with pytest.raises(TargetError) as caught:
        lorica.attach(
            model, LoRA(r=2, target_modules=["query"], modules_to_save=["clasifier", "dropout"])
        )
    assert "'clasifier' matches no module; did you mean 'classifier'?" in str(caught.value)
    assert "dropout has no parameters to train" in str(caught.value)
    encoder = ARCHITECTURES["transformer-encoder"].build()
    with pytest.raises(TargetError, match=r"other code reads the weights of layers\.1\.linear1"):
        lorica.attach(
            encoder, LoRA(r=2, target_modules=["linear2"], modules_to_save=["layers.1.linear1"])
        )
    assert not any(is_site(m) for m in encoder.modules())


def test_a_copy_of_what_has_no_values_is_refused():
    model, _ = _text()
    model.to("meta")
    with pytest.raises(TargetError, match=r"classifier .*no values to copy on the meta device"):
        lorica.attach(model, LoRA(r=2, target_modules=["query"], modules_to_save=["classifier"]))


# --- read weights ---------------------------------------------------------------------------------


def test_a_grouped_convolution_that_is_read_is_refused():
    model = ARCHITECTURES["mamba"].build()
    with pytest.raises(TargetError, match=r"mixer\.conv1d\.weight .*grouped convolution"):
        lorica.attach(model, LoRA(r=72, target_modules=["conv1d"]))
    assert not any(is_site(m) for m in model.modules())


def test_a_packed_weight_that_is_read_is_refused():
    model = ARCHITECTURES["attention-net"].build()
    projection = model.attention.out_proj
    projection._parameters["weight"] = nn.Parameter(
        projection.weight.detach().to(torch.int8), requires_grad=False
    )
    with pytest.raises(TargetError, match=r"attention\.out_proj\.weight .*packed \(torch\.int8\)"):
        lorica.attach(model, LoRA(r=2, target_modules=["attention.out_proj"]))


def test_a_parametrized_weight_that_is_read_is_refused():
    model = ARCHITECTURES["attention-net"].build()
    nn.utils.parametrizations.weight_norm(model.attention.out_proj)
    with pytest.raises(LoricaError, match=r"out_proj.*(parametrization computes|matches)"):
        lorica.attach(model, LoRA(r=2, target_modules=["attention.out_proj"]))


def test_the_read_layers_of_a_compiled_model_are_read_too():
    arch = ARCHITECTURES["attention-net"]
    model, plain = arch.build(), arch.build()
    compiled = torch.compile(model, backend="eager")
    adapter = lorica.attach(compiled, SMALL)
    assert list(adapter.slots) == list(lorica.attach(plain, SMALL).slots)
    assert "attention.out_proj.weight" in adapter.slots and adapter.model is model
    inputs = arch.sample(model, 2, 5)
    with torch.no_grad(), activate(model, "default"), activate(plain, "default"):
        assert torch.equal(model(**inputs), plain(**inputs))


def test_the_record_is_on_the_model_and_goes_with_the_last_adapter():
    model, _ = _text()
    assert attached_to(model).adapters == {}
    adapter = lorica.attach(model, SMALL)
    assert isinstance(adapter, Adapter) and attached_to(model).adapters == {"default": adapter}
    lorica.detach(model, adapter)
    assert not [key for key in model.__dict__ if key.startswith("_lorica")]
