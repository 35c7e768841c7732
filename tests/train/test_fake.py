"""Remembered operations say what torch's own fake tensors say."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lorica.config import TrainSettings
from lorica.data.facts import facts
from lorica.methods import DoRA, LoRA
from lorica.tasks import CausalLM
from lorica.tasks.last_layer import Place
from lorica.train import fake, shadow
from lorica.train.budget import Work, estimate
from lorica.train.fake import FakeTensors
from lorica.train.rehearsal import Scoring

OPERATIONS = {
    "product": lambda x: x @ x.t(),
    "view": lambda x: x[2:].view(-1, 2, 3),
    "of a product": lambda x: (x.unsqueeze(0) @ x.t()).flatten(),
    "in place": lambda x: x.mul_(2),
    "parts": lambda x: x.split([1, 4], dim=0),
    "equal parts": lambda x: x.split(2),
    "several": lambda x: torch.var_mean(x, dim=0),
    "a real index": lambda x: x.index_select(0, torch.tensor([1, 3])),
    "other dtype": lambda x: x.to(torch.bfloat16),
    "an integer": lambda x: x.to(torch.int64) + 1,
    "a float": lambda x: x.to(torch.int64) + 1.0,
    "chance": lambda x: torch.rand(4, 5, generator=torch.Generator()) + x.sum(),
    "given out": lambda x: torch.mm(x, x.t(), out=x.new_empty(5, 5)),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(
        *3 * [x.view(1, 1, 5, 6)]
    ),
    "reshaped in place": lambda x: x.t_(),
}


def looks(tensor: torch.Tensor, source: torch.Tensor) -> tuple:
    """Everything but the numbers."""
    assert type(tensor) is FakeTensor
    kept = vars(tensor).keys()
    shared = tensor.untyped_storage()._cdata == source.untyped_storage()._cdata
    keys = torch._C._dispatch_keys(tensor)
    form = tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device
    return (*form, tensor.untyped_storage().nbytes(), shared, keys, tensor.requires_grad, kept)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_repeated_operation_makes_what_torch_makes(name):
    found = []
    for mode in (FakeTensorMode(allow_non_fake_inputs=True), FakeTensors()):
        for _ in range(3):
            with mode:
                x = torch.empty(5, 6)
                made = OPERATIONS[name](x)
            several = made if isinstance(made, (list, tuple)) else [made]
            found.append((type(made), [looks(one, x) for one in several]))
    assert found == found[:1] * 6


def test_what_a_real_number_beside_them_makes_is_its_device_s():
    for other in ("cpu", "meta"):
        with FakeTensors():
            made = torch.empty(()) + torch.tensor(3.0, device=other)
        with FakeTensorMode(allow_non_fake_inputs=True):
            wanted = torch.empty(()) + torch.tensor(3.0, device=other)
        assert made.device == wanted.device


def test_nothing_of_torch_is_asked_the_third_time():
    mode = FakeTensors()
    with mode:
        x = torch.empty(7, 11)
        for _ in range(3):
            before = fake._by_torch()
            [part] = (x @ x.t()).sigmoid_().transpose(0, 1)[1:3].split(2)
            assert part.shape == (2, 7)
    assert fake._by_torch() == before


def test_numbers_that_are_known_stay_known():
    with FakeTensors():
        for _ in range(3):
            first, second = torch.tensor(3), torch.tensor(4)
            assert [(first + 1).item(), (second + 1).item()] == [4, 5]


def test_shapes_that_depend_on_numbers_are_refused_each_time():
    mode = FakeTensors()
    for _ in range(3):
        with mode, pytest.raises(Exception, match=r"aten\.nonzero"):
            torch.empty(5, 6).nonzero()


def test_tensors_of_another_mode_are_left_to_torch():
    found = []
    for make in (lambda: FakeTensorMode(allow_non_fake_inputs=True), FakeTensors):
        first, second = make(), make()
        for mode in (first, second):
            with mode:
                x = torch.empty(3, 4)
                _ = x + x, x + x
        with first:
            made = x + x
        found.append((made.fake_mode is first, made.fake_mode is second, made.shape))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("method", "checkpointing"),
    [
        (LoRA(r=8, target_modules="all-linear"), False),
        (LoRA(r=8, target_modules="all-linear", lora_dropout=0.1), True),
        (DoRA(r=4, target_modules=["q_proj", "down_proj"]), False),
    ],
    ids=["lora", "checkpointing", "dora"],
)
def test_an_estimate_is_that_of_torchs_fake_tensors(method, checkpointing, monkeypatch):
    found = []
    for make in (lambda: FakeTensorMode(allow_non_fake_inputs=True), FakeTensors):
        monkeypatch.setattr(shadow, "FakeTensors", make)
        made = shadow.make_shadow(shadow.Request("embedded", dtype="float32"))
        made.place = Place("model.layers", "self_attn.o_proj")
        task = CausalLM.of(made.base.tokenizer)
        examples = task.encode(facts("train", num_records=24)).examples
        settings = TrainSettings(max_steps=4, batch_size=4, gradient_checkpointing=checkpointing)
        work = Work(examples, scoring=Scoring(examples, 8, new_tokens=5))
        found += [estimate(made, method, task, work, settings, process=0) for _ in range(2)]
    assert [dataclasses.asdict(one) for one in found] == 4 * [dataclasses.asdict(found[0])]
