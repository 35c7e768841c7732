"""Adapter folders between Lorica and the real PEFT: the same logits within 1e-5 of their size, in
float32.
"""

import itertools
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.attach.handle import Adapter, adapters
from lorica.errors import LoricaWarning
from lorica.files.adapter import load_adapter, save_adapter
from lorica.files.peft_written import exact_names
from lorica.methods.lora import LoRA

pytestmark = [
    # PEFT 0.21 on transformers 5 itself: none of these comes from Lorica.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file.*adapter_config:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
    # It looks for them before it reaches target_parameters, and then does use them.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not:RuntimeWarning"),
]

PEFT_CANNOT = {
    "mamba": "PEFT refuses out_proj of Mamba",
    "attention-net": "PEFT cannot name single projections of nn.MultiheadAttention",
}


def stir(parameters, size: float = 0.2) -> None:
    """Draw every factor anew, so that no product is zero."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)


def answer(name: str, model: nn.Module, core: nn.Module | None = None) -> Tensor:
    arch = ARCHITECTURES[name]
    with torch.no_grad():
        return arch.logits(model(**arch.sample(core or model, 2, 7)))


def prepared(name: str) -> nn.Module:
    model = ARCHITECTURES[name].build()
    # In eval mode this one's fast path reads weights past PEFT's wrappers; it has no dropout.
    return model.train() if name == "transformer-encoder" else model


def read_by_peft(name: str, folder: Path) -> Tensor:
    base = prepared(name)
    training = base.training
    theirs = PeftModel.from_pretrained(base, str(folder)).train(training)
    return answer(name, theirs, base)


def assert_same(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape
    error = (one - other).abs().max().item()
    assert error <= 1e-5 * max(1.0, one.abs().max().item()), error


def check_into_peft(name: str, method: LoRA, folder: Path) -> Adapter:
    """Ours, saved, read by PEFT: the same answer, and another one than the base's."""
    model = prepared(name)
    bare = answer(name, model)
    adapter = attach(model, method)
    stir(adapter.parameters())
    with activate(model, adapter):
        ours = answer(name, model)
    assert (ours - bare).abs().max() > 1e-3
    save_adapter(adapter, folder)
    assert_same(ours, read_by_peft(name, folder))
    return adapter


def check_from_peft(name: str, config: LoraConfig, folder: Path) -> Adapter:
    """PEFT's, saved, read by us: the same answer; then saved by us and read by PEFT again."""
    base = prepared(name)
    bare = answer(name, base)
    training = base.training
    theirs = get_peft_model(base, config).train(training)
    stir(p for p in theirs.parameters() if p.requires_grad)
    expected = answer(name, theirs, base)
    assert (expected - bare).abs().max() > 1e-3
    theirs.save_pretrained(str(folder))
    model = prepared(name)
    adapter = load_adapter(model, folder)
    with activate(model, adapter):
        assert_same(expected, answer(name, model))
    save_adapter(adapter, folder.with_name("again"))
    assert_same(expected, read_by_peft(name, folder.with_name("again")))
    return adapter


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in PEFT_CANNOT])
def test_peft_reads_ours(name, tmp_path):
    check_into_peft(name, LoRA(r=2, lora_alpha=5, target_modules="all-linear"), tmp_path / "x")


SETTINGS = {
    "rslora": (
        "qwen3",
        LoRA(r=3, lora_alpha=4, use_rslora=True, target_modules=("q_proj", "o_proj")),
    ),
    "patterns": (
        "llama",
        LoRA(
            r=3,
            lora_alpha=7,
            target_modules="all-linear",
            rank_pattern={"layers.1.self_attn.q_proj": 5, "up_proj": 1},
            alpha_pattern={"down_proj": 2.5, "layers.0.mlp.up_proj": 9},
        ),
    ),
    "one-layer": ("llama", LoRA(r=2, target_modules="attention", layers_to_transform=(1,))),
    "excluded": (
        "bert",
        LoRA(r=2, target_modules="all-linear", exclude_modules=("layer.0.*.key",)),
    ),
    "embedding": ("llama", LoRA(r=4, target_modules=("embed_tokens", "q_proj"))),
    "embedding-conv": ("cnn", LoRA(r=3, target_modules=("embedding", "conv1", "conv2", "fc2"))),
    "grouped-conv": ("cnn", LoRA(r=3, target_modules=("conv3", "fc1"))),
    "head": ("mistral", LoRA(r=2, target_modules=("lm_head", "v_proj"))),
    "classifier": ("bert", LoRA(r=2, target_modules="attention", modules_to_save=("classifier",))),
    "deep-head": (
        "roberta",
        LoRA(r=2, target_modules="attention", modules_to_save=("classifier",)),
    ),
    "two-heads": (
        "distilbert",
        LoRA(r=2, target_modules="attention", modules_to_save=("pre_classifier", "classifier")),
    ),
    "whole-embedding": (
        "opt",
        LoRA(r=2, target_modules="mlp", modules_to_save=("embed_positions",)),
    ),
    "one-norm": ("llama", LoRA(r=2, target_modules=("q_proj",), modules_to_save=("norm",))),
    "experts": (
        "mixtral",
        LoRA(r=2, target_modules=("gate_up_proj", "down_proj"), rank_pattern={"down_proj": 3}),
    ),
    "one-expert-weight": ("qwen3_moe", LoRA(r=2, target_modules=("experts.down_proj", "q_proj"))),
    "conv1d": ("gpt2", LoRA(r=3, target_modules=("attn.c_attn", "lm_head"))),
    "vision": ("vit", LoRA(r=2, target_modules=("q_proj", "fc1"), modules_to_save=("classifier",))),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_peft_reads_every_setting(case, tmp_path):
    name, method = SETTINGS[case]
    check_into_peft(name, method, tmp_path / "x")


def test_a_name_that_peft_takes_for_more_is_written_in_full(tmp_path):
    """PEFT matches modules_to_save by `endswith`: "norm" would be every input_layernorm too."""
    adapter = attach(prepared("llama"), SETTINGS["one-norm"][1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(adapter, tmp_path / "x")
    config = LoraConfig.from_pretrained(str(tmp_path / "x"))
    assert config.modules_to_save == ["model.norm"]


def test_a_path_that_is_the_end_of_another_is_told(tmp_path):
    """At the top of the model "classifier" has no longer name; PEFT takes pre_classifier too."""
    method = LoRA(r=2, target_modules="attention", modules_to_save=("classifier",))
    adapter = attach(prepared("distilbert"), method)
    with pytest.warns(LoricaWarning, match=r"\(classifier\): Lorica reads this adapter back, PEFT"):
        save_adapter(adapter, tmp_path / "x")


def test_peft_reads_the_task_head(tmp_path):
    """With task_type SEQ_CLS PEFT adds heads of its own to modules_to_save."""
    model = prepared("bert")
    adapter = attach(model, LoRA(r=2, target_modules="attention", modules_to_save=("classifier",)))
    adapter.base = {"task": "text-classification", "name": "somewhere/bert"}
    stir(adapter.parameters())
    with activate(model, adapter):
        ours = answer("bert", model)
    save_adapter(adapter, tmp_path / "x")
    base = prepared("bert")
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "x")).eval()
    assert type(theirs).__name__ == "PeftModelForSequenceClassification"
    assert_same(ours, answer("bert", theirs, base))


def test_peft_reads_factors_on_the_head(tmp_path):
    """LoRA on the classifier: no task_type is written, with which PEFT would drop these factors."""
    model = prepared("bert")
    adapter = attach(model, LoRA(r=2, target_modules=("classifier", "query")))
    adapter.base = {"task": "text-classification"}
    stir(adapter.parameters())
    with activate(model, adapter):
        ours = answer("bert", model)
    save_adapter(adapter, tmp_path / "x")
    assert_same(ours, read_by_peft("bert", tmp_path / "x"))


def test_what_peft_cannot_name_is_said_and_read_back(tmp_path):
    model = prepared("attention-net")
    adapter = attach(model, LoRA(r=2, target_modules="all-linear"))
    stir(adapter.parameters())
    with activate(model, adapter):
        ours = answer("attention-net", model)
    with pytest.warns(LoricaWarning, match="PEFT does not"):
        save_adapter(adapter, tmp_path / "x")
    again = prepared("attention-net")
    with activate(again, load_adapter(again, tmp_path / "x")):
        assert torch.equal(ours, answer("attention-net", again))


FOREIGN = {
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "rslora": ("qwen2", {"target_modules": ["q_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {r"layers\.0\..*q_proj": 5, "^model.layers.1.self_attn.v_proj": 1},
            "alpha_pattern": {"v_proj": 3, ".*layers.[01].self_attn.q_proj": 12},
        },
    ),
    "regex": ("llama", {"target_modules": r".*\.layers\.\d+\.mlp\.(up|down)_proj"}),
    "excluded": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.1\..*"},
    ),
    "layers": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "layers-pattern": (
        "gpt2",
        {"target_modules": ["c_attn"], "layers_to_transform": 1, "layers_pattern": "h"},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "k_proj"]}),
    "convolutions": (
        "cnn",
        {"target_modules": ["embedding", "conv1", "conv2", "conv3", "fc1"], "r": 3},
    ),
    "experts": (
        "mixtral",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.down_proj", "mlp.experts.gate_up_proj"],
            "rank_pattern": {"gate_up_proj": 4},
        },
    ),
    "experts-alone": (
        "qwen3_moe",
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    ),
    "router": ("mixtral", {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
    "attention-module": ("transformer-encoder", {"target_modules": ["self_attn", "linear1"]}),
    "classifier": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "prefix-of-head": ("distilbert", {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
    "whole": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "norms": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    "gaussian": ("opt", {"target_modules": ["fc1"], "init_lora_weights": "gaussian"}),
    "orthogonal": ("opt", {"target_modules": ["fc1"], "init_lora_weights": "orthogonal"}),
    "seq2seq": ("bart", {"target_modules": ["q_proj", "fc2"], "task_type": "SEQ_2_SEQ_LM"}),
    "rank-above-the-layer": ("bert", {"target_modules": ["classifier"], "r": 8}),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_we_read_peft(case, tmp_path):
    name, settings = FOREIGN[case]
    settings = {"r": 2, "lora_alpha": 5, **settings}
    check_from_peft(name, LoraConfig(**settings), tmp_path / "theirs")


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in PEFT_CANNOT])
def test_we_read_peft_on_every_architecture(name, tmp_path):
    linear = [
        path
        for path, module in prepared(name).named_modules()
        if isinstance(module, nn.Linear)
        and "out_proj" not in path
        and "parametrizations" not in path
    ]
    if name == "transformer-encoder":
        linear = [path for path in linear if "linear" in path]
    if name == "gpt2":
        linear = ["c_attn", "c_proj"]
    check_from_peft(name, LoraConfig(r=2, lora_alpha=3, target_modules=linear), tmp_path / "theirs")


@pytest.mark.parametrize("name", ["llama", "t5", "clip", "whisper"])
def test_written_names_select_by_peft_what_was_asked(name):
    """`exact_names` against PEFT's own matching, for many choices of modules."""
    model = ARCHITECTURES[name].build()
    paths = [path for path, _ in model.named_modules() if path]
    leaves = [path for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    for step, start in itertools.product((1, 2, 3, 5), (0, 1)):
        wanted = set(leaves[start::step])
        names, excluded = exact_names(wanted, paths)
        config = LoraConfig(target_modules=names, exclude_modules=excluded or None)
        from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

        found = {p: check_target_module_exists(config, p) for p in paths}
        assert {
            p for p, hit in found.items() if hit and not isinstance(hit, _ExcludedModule)
        } == wanted


def test_ambiguous_full_paths_are_excluded_by_name():
    universe = ["a.q", "b.a.q", "c.b.a.q", "k"]
    names, excluded = exact_names(["a.q"], universe)
    assert names == ["a.q"] and set(excluded) == {"b.a.q"}
    assert exact_names(["k"], universe) == (["k"], [])


def test_both_sides_agree_after_training(tmp_path):
    """One step of the same optimizer from the same start: the same gradients reach the factors."""
    model, base = prepared("llama"), prepared("llama")
    adapter = attach(model, LoRA(r=3, lora_alpha=6, target_modules=("q_proj", "down_proj")))
    save_adapter(adapter, tmp_path / "start")
    with warnings.catch_warnings():
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "start"), is_trainable=True)
    sample = ARCHITECTURES["llama"].sample(model, 2, 7)
    sample["labels"] = sample["input_ids"]
    for module, parameters in (
        (model, list(adapter.parameters())),
        (theirs, [p for p in theirs.parameters() if p.requires_grad]),
    ):
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        for _ in range(3):
            with activate(model, adapter):
                module(**sample).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with activate(model, adapter):
        assert_same(answer("llama", model), answer("llama", theirs, base))
    assert list(adapters(model)) == ["default"]
