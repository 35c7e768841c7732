"""torch.compile: takes effect before and after attaching, whole graphs, few of them."""

import pytest
import torch
from torch import Tensor, nn

import lorica
from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.methods import LoReFT, PrefixTuning, PromptTuning, PTuning
from lorica.methods.lora import LoRA

# Of dynamo about its own way to trace a custom autograd function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

METHOD = LoRA(r=2, target_modules="all-linear", init_lora_weights="random")


class Graphs:
    """A backend that runs eagerly and counts what it is given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.down(self.up(x).relu())


IDS = torch.randint(0, 11, (3, 4), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _net(targets="all-linear") -> Net:
    torch.manual_seed(0)
    model = Net()
    method = LoRA(r=2, target_modules=targets, init_lora_weights="random")
    for seed, name in enumerate("ab"):
        lorica.attach(model, method, name=name, seed=seed)
    activate(model, None)
    return model


@pytest.mark.parametrize("recorded", [False, True])
def test_attached_after_compiling_takes_effect(recorded):
    torch.manual_seed(0)
    model, graphs = Net(), Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.set_grad_enabled(recorded):
        base = compiled(IDS)
        lorica.attach(model, METHOD)
        with activate(model, "default"):
            active = compiled(IDS)
            torch.testing.assert_close(active, model(IDS))
        assert not torch.equal(active, base)
        with activate(model, None):
            torch.testing.assert_close(compiled(IDS), base)
        lorica.detach(model, "default")
        torch.testing.assert_close(compiled(IDS), base)
    assert graphs.count <= 4


@pytest.mark.parametrize("targets", ["all-linear", ["embed", "conv", "up"]])
@pytest.mark.parametrize("recorded", [False, True])
def test_whole_graphs_and_few_of_them(targets, recorded):
    """None, one adapter, a mixture and rows: a graph each, and none for other weights."""
    model, graphs = _net(targets), Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    counts = []
    for mixtures in (
        [None],
        ["a"],
        [{"a": 0.5, "b": 0.25}, {"a": -1.0, "b": 3.0}, {"a": 2.0, "b": 0.125}],
        [["a", "b", None], ["b", {"a": 0.5}, "a"]],
        [None, "a", {"a": 0.75, "b": 0.5}],
    ):
        before = graphs.count
        for mixture in mixtures:
            with torch.set_grad_enabled(recorded), activate(model, mixture):
                torch.testing.assert_close(compiled(IDS), model(IDS))
        counts.append(graphs.count - before)
    assert counts == [1, 1, 1, 1, 0]


def test_gradients_through_a_compiled_model():
    model = _net()
    adapter = lorica.adapters(model)["a"]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for call in (model, compiled):
        with activate(model, "a"):
            call(IDS).square().sum().backward()
        gradients.append([p.grad for p in adapter.parameters()])
        for parameter in adapter.parameters():
            parameter.grad = None
    for eager, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, eager)


def test_read_weights_compile_without_breaks():
    arch = ARCHITECTURES["attention-net"]
    model = arch.build()
    lorica.attach(model, METHOD)
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    inputs = arch.sample(model, 2, 5)
    for mixture in ("default", {"default": 0.5}, {"default": 0.25}):
        with torch.no_grad(), activate(model, mixture):
            torch.testing.assert_close(compiled(**inputs), model(**inputs))
    assert graphs.count <= 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_whole_transformer_has_no_breaks_of_ours(name):
    arch = ARCHITECTURES[name]
    model = arch.build()
    inputs = arch.sample(model, 2, 5)
    graphs, plain = Graphs(), Graphs()
    with torch.no_grad():
        torch.compile(model, backend=plain)(**inputs)
        torch.compiler.reset()
        lorica.attach(model, METHOD)
        compiled = torch.compile(model, backend=graphs)
        with activate(model, "default"):
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    assert graphs.count == plain.count


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor imports what torch deprecates
def test_inductor_forward_and_backward():
    model = _net()
    adapter = lorica.adapters(model)["a"]
    compiled = torch.compile(model)
    results = []
    for call in (model, compiled):
        with activate(model, "a"):
            output = call(IDS)
            output.square().sum().backward()
        results.append([output.detach(), *(p.grad for p in adapter.parameters())])
        for parameter in adapter.parameters():
            parameter.grad = None
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-5)


def test_export():
    model = _net().eval()
    with activate(model, "a"), torch.no_grad():
        program = torch.export.export(model, (IDS,))
        torch.testing.assert_close(program.module()(IDS), model(IDS))


@pytest.mark.parametrize(
    "method",
    [
        PromptTuning(num_virtual_tokens=3),
        PTuning(num_virtual_tokens=3, encoder_reparameterization_type="LSTM"),
        PrefixTuning(num_virtual_tokens=3),
        LoReFT(r=2, prefix_positions=1, suffix_positions=2),
    ],
    ids=lambda method: method.kind,
)
def test_what_sits_on_the_stack_compiles_into_one_graph(method):
    model = ARCHITECTURES["llama"].build()
    adapter = attach(model, method, name="a")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    inputs = ARCHITECTURES["llama"].sample(model, 2, 7)
    with activate(model, "a"):
        expected = model(**inputs, use_cache=False).logits
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        actual = torch.compile(model, backend="eager")(**inputs, use_cache=False).logits
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(actual, expected)
