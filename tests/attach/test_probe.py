"""Who is called, whose weight is read, and who was passed by."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorica
from architectures import ARCHITECTURES
from attach.visits import Visit, probe
from lorica.attach.activate import activate
from lorica.attach.probe import unvisited, weight_read
from lorica.methods.lora import LoRA


def _probed(name: str, training: bool) -> dict[str, str]:
    arch = ARCHITECTURES[name]
    model = arch.build().train(training)
    inputs = arch.sample(model, 2, 5)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)
    watched = {path: m for path, m in model.named_modules() if isinstance(m, kinds)}
    classes = {path: type(m) for path, m in watched.items()}
    visits = probe(model, lambda: model(**inputs), watched)
    assert {path: type(m) for path, m in watched.items()} == classes
    return {path: visit.kind for path, visit in visits.items()}


# (architecture, layer) -> in evaluation, in training
NOT_CALLED = {
    ("attention-net", "attention.out_proj"): ("read", "read"),
    ("transformer-encoder", "layers.0.self_attn.out_proj"): ("read", "read"),
    ("transformer-encoder", "layers.0.linear1"): ("read", "called"),
    ("transformer-encoder", "layers.1.linear2"): ("read", "called"),
    ("mamba", "backbone.layers.0.mixer.conv1d"): ("read", "read"),
    ("t5", "shared"): ("never", "never"),
    ("bart", "model.shared"): ("never", "never"),
}


@pytest.mark.parametrize(("name", "path"), NOT_CALLED)
@pytest.mark.parametrize("training", [False, True])
def test_layers_that_are_not_called(name, path, training):
    assert _probed(name, training)[path] == NOT_CALLED[name, path][training]


def test_the_step_projection_of_mamba_is_not_called_alone():
    assert _probed("mamba", False)["backbone.layers.0.mixer.dt_proj"] in ("read", "both")


CALLED = {
    "llama": ["model.layers.0.self_attn.q_proj", "model.embed_tokens", "lm_head"],
    "gpt_neox": ["gpt_neox.layers.0.attention.query_key_value"],
    "phi3": ["model.layers.1.self_attn.qkv_proj"],
    "albert": ["albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"],
    "whisper": ["model.encoder.conv1", "model.decoder.layers.0.fc1"],
    "cnn": ["conv1", "conv2", "fc2"],
}


@pytest.mark.parametrize("name", CALLED)
def test_layers_that_are_called(name):
    kinds = _probed(name, False)
    assert {path: kinds[path] for path in CALLED[name]} == dict.fromkeys(CALLED[name], "called")


@pytest.mark.parametrize("training", [False, True])
def test_what_is_read_is_known_beforehand(training):
    """`weight_read` names every layer of the small models that is read and never called."""
    for name in (
        "attention-net",
        "transformer-encoder",
        "mamba",
        "bart",
        "vit",
        "clip",
        "wav2vec2",
    ):
        modules = dict(ARCHITECTURES[name].build().named_modules())
        for path, kind in _probed(name, training).items():
            if kind == "read":
                parent, _, last = path.rpartition(".")
                assert weight_read(modules.get(parent), last), (name, path)


def test_visits_are_counted():
    shared = nn.Linear(4, 4)

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.idle = shared, nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.shared(self.shared(x)), self.shared.weight)

    model = Reader()
    watched = {"shared": model.shared, "idle": model.idle}
    visits = probe(model, lambda: model(torch.zeros(1, 4)), watched)
    assert visits["shared"] == Visit(calls=2, reads=1) and visits["shared"].kind == "both"
    assert visits["idle"].kind == "never"


def test_a_probe_that_fails_leaves_the_classes():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match="shapes"):
        probe(model, lambda: model(torch.zeros(1, 3)), {"0": model[0]})
    assert type(model[0]) is nn.Linear


class _Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.read = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.used(x), self.read.weight)


def test_sites_that_were_passed_by_are_named():
    model = _Partly()
    lorica.attach(model, LoRA(r=2, target_modules="all-linear"), name="a")
    lorica.attach(model, LoRA(r=2, target_modules=["used"]), name="b")
    with activate(model, "a"):
        assert unvisited(model) == ["used", "idle", "read"]
        model(torch.zeros(1, 4))
        assert unvisited(model) == ["idle", "read"]
    with activate(model, "b"):
        assert unvisited(model) == ["used"]
        model(torch.zeros(1, 4))
        assert unvisited(model) == []
    with activate(model, None):
        assert unvisited(model) == []


def test_experts_are_judged_together():
    """The tokens decide which of them is called; none called at all is a fault."""
    model = nn.ModuleDict(
        {
            "experts": nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]),
            "shared_expert": nn.Linear(4, 4),
            "blocks": nn.ModuleList([nn.Linear(4, 4) for _ in range(2)]),
        }
    )
    lorica.attach(model, LoRA(r=2, target_modules="all-linear"), name="a")
    with activate(model, "a"):
        model["experts"][1](torch.zeros(1, 4))
        model["blocks"][0](torch.zeros(1, 4))
        assert unvisited(model) == ["shared_expert", "blocks.1"]
