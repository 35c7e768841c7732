"""What names, choices and layer numbers find, and what each mistake is answered with."""

import functools
import re

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from architectures import ARCHITECTURES, CAUSAL, EXPERTS
from lorica.attach.families import FAMILIES
from lorica.attach.survey import suffix_of, survey
from lorica.attach.targets import resolve, unwrap
from lorica.errors import TargetError


@functools.cache
def build(name):
    """A model to look at; tests that change one make their own with `fresh`."""
    return fresh(name)


def fresh(name):
    return ARCHITECTURES[name].build()


def names_of(targets):
    return sorted({suffix_of(path) for path in targets.paths})


def problems_of(model, **settings):
    with pytest.raises(TargetError) as caught:
        resolve(model, **settings)
    return list(caught.value.problems)


# --- choices -------------------------------------------------------------------------------------

EXPECTED = {  # name -> what auto finds, what attention finds, what mlp finds
    "llama": (14, 8, 6),
    "llama-tied": (14, 8, 6),
    "mistral": (14, 8, 6),
    "qwen2": (14, 8, 6),
    "qwen3": (14, 8, 6),
    "gemma": (14, 8, 6),
    "gemma2": (14, 8, 6),
    "phi": (12, 8, 4),
    "phi3": (8, 4, 4),
    "gpt_neox": (8, 4, 4),
    "gpt2": (8, 4, 4),
    "opt": (12, 8, 4),
    "bloom": (8, 4, 4),
    "falcon": (8, 4, 4),
    "mixtral": (8, 8, 4),
    "qwen3_moe": (8, 8, 4),
    "mamba": (6, None, None),
    "bert": (12, 8, 4),
    "albert": (6, 4, 2),
    "roberta": (12, 8, 4),
    "deberta-v2": (12, 12, 4),
    "electra": (12, 8, 4),
    "modernbert": (8, 4, 4),
    "distilbert": (12, 8, 4),
    "t5": (36, 24, 12),
    "t5-relu": (32, 24, 8),
    "bart": (32, 24, 8),
    "vit": (12, 8, 4),
    "clip": (24, 16, 8),
    "whisper": (32, 24, 8),
    "wav2vec2": (12, 8, 4),
    "cnn": (4, None, 2),
    "transformer-encoder": (8, 4, 4),
    "attention-net": (6, 4, 2),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_choices_on_every_architecture(name):
    model = build(name)
    for choice, count in zip(("auto", "attention", "mlp"), EXPECTED[name], strict=True):
        if count is None:
            (problem,) = problems_of(model, target_modules=choice)
            assert "no such layers" in problem
        else:
            targets = resolve(model, target_modules=choice)
            assert len(targets.paths) == count, (choice, targets.paths)
            assert targets.reason.startswith(choice)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_paths_lead_to_the_objects_and_every_place_is_accounted_for(name):
    model = build(name)
    for choice in ("auto", "all-linear"):
        targets = resolve(model, target_modules=choice)
        for path, module in targets.modules.items():
            assert model.get_submodule(path) is module
        for path, (module, parameter) in targets.parameters.items():
            assert model.get_parameter(path) is getattr(module, parameter)
        assert not set(targets.paths) & set(targets.left_out)
        assert set(targets.paths) | set(targets.left_out) >= set(survey(model).places)
        order = [path for path, _ in model.named_modules() if path in targets.modules]
        assert list(targets.modules) == order


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_linear_takes_every_linear_layer_but_heads_and_routers(name):
    model = build(name)
    targets = resolve(model, target_modules="all-linear")
    linear = {p for p, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    heads = {
        path for path in linear
        if re.search(r"head|pooler|classifier|proj_out|projector|(visual|text)_projection", path)
    }  # fmt: skip
    assert set(targets.modules) == linear - heads
    assert all("head" in targets.left_out[path] for path in heads)
    stacks = {p for p, q in model.named_parameters() if q.dim() == 3 and ".experts." in p}
    packed = {p for p, _ in model.named_parameters() if re.search(r"(in|q|k|v)_proj_weight$", p)}
    assert set(targets.parameters) == stacks | packed


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_taken_by_all_linear_and_mlp_but_not_by_auto(name):
    model = build(name)
    assert names_of(resolve(model, target_modules="mlp")) == ["down_proj", "gate_up_proj"]
    auto = resolve(model)
    assert names_of(auto) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert "Routed experts are left out" in auto.reason
    routers = [p for p, why in auto.left_out.items() if "router" in why]
    assert routers == ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"]


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in ("cnn", "mamba")])
def test_the_table_agrees_with_the_structure(name):
    """The table of families may leave something out, as DeBERTa's position keys; never a part."""
    model = build(name)
    attention = names_of(resolve(model, target_modules="attention"))
    auto = resolve(model)
    missing = set(attention) - set(names_of(auto))
    assert missing <= {"pos_key_proj", "pos_query_proj"}
    layers = {survey(model).places[path].layer for path in auto.paths}
    assert layers == ({0, 1} if name not in ("albert", "attention-net") else layers)


def test_the_table_knows_every_family_of_peft_and_all_their_names():
    constants = pytest.importorskip("peft.utils.constants")
    known = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert set(known) - set(FAMILIES) == set()
    for family, names in known.items():
        if isinstance(names, list) and family != "t5":
            assert set(names) <= set(FAMILIES[family]), family


def test_auto_names_the_family_or_says_that_it_goes_by_structure():
    assert "the defaults of llama: q_proj" in resolve(build("llama")).reason
    model = fresh("llama")
    model.config.model_type = "unheard-of"
    unknown = resolve(model)
    assert "'unheard-of' is not a known family" in unknown.reason
    assert unknown.paths == resolve(build("llama")).paths
    assert "no attention blocks" in resolve(build("cnn")).reason


def test_auto_on_a_multimodal_model_takes_the_language_model():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision_tower = build("vit")
            self.language_model = build("llama")

    targets = resolve(Both())
    assert len(targets.modules) == 14
    assert all(path.startswith("language_model.") for path in targets.modules)
    assert "of the language model" in targets.reason
    assert "another tower" in targets.left_out["vision_tower.vit.layers.0.attention.q_proj"]
    assert len(resolve(Both(), target_modules="all-linear").modules) == 14 + 12


def test_mamba_leaves_dt_proj_to_those_who_name_it():
    model = build("mamba")
    assert names_of(resolve(model)) == ["in_proj", "out_proj", "x_proj"]
    assert "dt_proj" in names_of(resolve(model, target_modules="all-linear"))
    assert names_of(resolve(model, target_modules=["A_log"])) == ["A_log"]


def test_a_grouped_convolution_is_left_to_those_who_name_it():
    model = build("cnn")
    assert names_of(resolve(model)) == ["conv1", "conv2", "fc1", "fc2"]
    assert list(resolve(model, target_modules=["conv3"]).modules) == ["conv3"]


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "whisper", "modernbert"])
def test_names_match_as_in_peft(name):
    utilities = pytest.importorskip("peft.tuners.tuners_utils")
    config = pytest.importorskip("peft").LoraConfig
    model = build(name)
    linear = [p for p, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    for suffix in {suffix_of(path) for path in linear} | {
        ".".join(p.split(".")[-2:]) for p in linear
    }:
        expected = [
            path for path, module in model.named_modules()
            if utilities.check_target_module_exists(config(target_modules=[suffix]), path)
            and isinstance(module, nn.Linear | Conv1D | nn.Embedding)
        ]  # fmt: skip
        assert list(resolve(model, target_modules=[suffix]).modules) == expected


def test_paths_suffixes_globs_and_peft_regexes_find_the_same():
    model = build("llama")
    expected = [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in ("q", "v")]
    for given in (
        ["q_proj", "v_proj"],
        {"v_proj", "q_proj"},
        ("self_attn.q_proj", "self_attn.v_proj"),
        expected,
        "model.layers.*.self_attn.{q,v}_proj",
        "layers.[0-9].self_attn.[qv]_proj",
        ["layers.0.*.{q,v}_proj", "layers.1.*.{q,v}_proj"],
        r".*\.layers\.\d+\.self_attn\.(q|v)_proj",
        r"^(?!.*mlp).*(q_proj|v_proj)$",
    ):
        assert list(resolve(model, target_modules=given).modules) == expected, given


def test_every_supported_class_can_be_named():
    cnn = resolve(build("cnn"), target_modules=["embedding", "conv1", "conv2", "fc1"])
    kinds = [type(module) for module in cnn.modules.values()]
    assert kinds == [nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Linear]
    gpt2 = resolve(build("gpt2"), target_modules=["c_attn", "wte", "lm_head"])
    assert [type(m) for m in gpt2.modules.values()] == [nn.Embedding, Conv1D, Conv1D, nn.Linear]
    scaled = resolve(build("gemma"), target_modules=["embed_tokens"])
    assert list(scaled.modules) == ["model.embed_tokens"]


def test_weights_without_a_layer_are_named_by_parameter_or_by_their_module():
    model = build("mixtral")
    paths = [
        f"model.layers.{i}.mlp.experts.{n}" for i in (0, 1) for n in ("gate_up_proj", "down_proj")
    ]
    for given in (["gate_up_proj", "down_proj"], ["experts"], "model.layers.*.mlp.experts.*"):
        targets = resolve(model, target_modules=given)
        assert list(targets.parameters) == paths, given
        assert targets.modules == {}
    module, parameter = targets.parameters[paths[1]]
    assert getattr(module, parameter).shape == (4, 36, 20)
    routers = resolve(model, target_modules=["mlp.gate.weight"], layers_to_transform=1)
    assert list(routers.parameters) == ["model.layers.1.mlp.gate.weight"]
    encoder = resolve(build("transformer-encoder"), target_modules=["in_proj_weight", "out_proj"])
    assert len(encoder.parameters) == len(encoder.modules) == 2


def test_all_unmatched_names_are_reported_at_once_with_the_nearest():
    model = build("gpt2")
    problems = problems_of(
        model,
        target_modules=["c_attn", "c_atn", "q_proj", "nothing_like_it"],
        exclude_modules=["c_fcc"],
        layers_to_transform=[0, 17],
    )
    assert problems == [
        "'c_atn' matches nothing; did you mean 'c_attn'?",
        "'q_proj' matches nothing; did you mean 'c_attn'?",
        "'nothing_like_it' matches nothing",
        "exclude_modules: 'c_fcc' matches nothing; did you mean 'c_fc'?",
        "layers_to_transform: 17 asks for block 17, but there are 0 to 1",
    ]


def test_the_error_lists_what_exists_with_counts():
    with pytest.raises(TargetError) as caught:
        resolve(build("bert"), target_modules=["q_proj"])
    text = str(caught.value)
    assert "did you mean 'query'?" in text
    assert "query x2" in text and "dense x7" in text and "classifier" in text
    assert "lorica inspect" in text


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("llama", ["mlp"], "'mlp' is a container .* it holds: gate_proj, up_proj, down_proj"),
        ("llama", ["layers.0"], "is a container"),
        ("mixtral", ["mlp.gate"], "its parameter can be named: 'gate.weight'"),
        ("llama", ["norm"], "is a LlamaRMSNorm, which cannot carry an adapter; Linear"),
        ("llama", ["q_proj.weight"], "is a parameter: name the layer, 'q_proj'"),
        ("llama", "q_proj,v_proj", "several names are given as a list"),
        ("llama", [], "the list of target modules is empty"),
        ("llama", [3], "3 is not a name or a pattern"),
        ("llama", [["q_proj"]], "is not a name"),
        ("llama", ["layers.*.z_proj"], "the pattern 'layers.*.z_proj' matches nothing"),
        ("llama", ["*norm"], "matches 5 modules, but none that can carry an adapter"),
        ("llama", r"(a)\1", "cannot be read"),
        ("vit", ["query"], "did you mean 'q_proj'"),
        ("mixtral", ["w1"], "did you mean 'gate_up_proj'"),
        ("mixtral", ["gate"], "is a MixtralTopKRouter, which cannot carry"),
        ("mamba", "attention", "its linear layers are: mixer"),
        ("t5", ["shared"], "never called: encoder.embed_tokens and decoder.embed_tokens look"),
        ("bart", ["shared"], "never called: model.encoder.embed_tokens and model.decoder"),
        ("opt", ["embed_positions"], "OPTLearnedPositionalEmbedding does more than the class"),
        ("transformer-encoder", ["self_attn"], "a container .* it holds: in_proj_weight, out_proj"),
    ],
)
def test_mistakes_are_named(name, given, message):
    (problem,) = problems_of(build(name), target_modules=given)
    message = message if ".*" in message and "layers.*" not in message else re.escape(message)
    assert re.search(message, problem), problem


def test_a_pattern_passes_by_what_it_cannot_take_and_says_so():
    targets = resolve(build("t5"), target_modules="*")
    assert "shared" not in targets.modules and "lm_head" in targets.modules
    assert "never called" in targets.left_out["shared"]


# --- less ----------------------------------------------------------------------------------------


def test_exclusions():
    model = build("llama")
    targets = resolve(
        model,
        target_modules="all-linear",
        exclude_modules=["o_proj", "layers.1.mlp", "{gate,up}_proj", "lm_head"],
    )
    assert names_of(targets) == ["down_proj", "k_proj", "q_proj", "v_proj"]
    assert len(targets.modules) == 7
    assert targets.left_out["model.layers.1.mlp.down_proj"] == "excluded by 'layers.1.mlp'"
    assert "7 after exclude_modules" in targets.reason


def test_exclusions_without_effect_are_errors():
    model = build("llama")
    assert problems_of(model, target_modules=["q_proj"], exclude_modules=["v_proj"]) == [
        "exclude_modules: 'v_proj' matches none of the targets"
    ]
    (problem,) = problems_of(model, target_modules=["q_proj"], exclude_modules="*.q_proj")
    assert "nothing is left to adapt" in problem


@pytest.mark.parametrize("given", [1, [1], "1", (1,), range(1, 2), "1-1"])
def test_layers_in_every_spelling(given):
    targets = resolve(
        build("llama"), target_modules=["q_proj", "lm_head"], layers_to_transform=given
    )
    assert list(targets.modules) == ["model.layers.1.self_attn.q_proj"]
    assert targets.left_out["lm_head"] == "not in layers_to_transform"
    assert "in the blocks 1" in targets.reason


def test_layers_count_in_encoder_and_decoder_alike():
    targets = resolve(build("t5"), target_modules=["q"], layers_to_transform="0")
    assert [path.split(".")[0] for path in targets.modules] == ["encoder", "decoder", "decoder"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("0-2", "0-2 asks for block 2, but there are 0 to 1"),
        ([5], "5 asks for block 5"),
        (-1, "-1 is neither a number nor a range"),
        (True, "True is neither"),
        ("0;1", "'0;1' is neither"),
        ("1-0", "'1-0' is empty"),
        ("0-99999999999", "is neither a number nor a range"),
        ([], "layers_to_transform is empty"),
        (["a"], "'a' is neither"),
    ],
)
def test_layers_that_do_not_exist(given, message):
    problems = problems_of(build("llama"), target_modules=["q_proj"], layers_to_transform=given)
    assert message in problems[0]


def test_layers_without_numbered_blocks():
    (problem,) = problems_of(build("cnn"), target_modules=["fc1"], layers_to_transform=0)
    assert "none of the chosen layers lies in a numbered block" in problem


def test_a_block_without_a_chosen_layer_is_an_error():
    model = fresh("llama")
    model.model.layers[1].self_attn.q_proj = nn.Identity()
    problems = problems_of(model, target_modules=["layers.*.q_proj"], layers_to_transform=[0, 1])
    assert problems == ["layers_to_transform: 1 holds none of the chosen layers"]


# --- sharing and wrappers ------------------------------------------------------------------------


def test_tied_weights_are_reported():
    tied = resolve(build("llama-tied"), target_modules=["lm_head", "embed_tokens", "q_proj"])
    assert tied.shared == {
        "model.embed_tokens": ["lm_head"],
        "lm_head": ["model.embed_tokens"],
    }
    assert resolve(build("llama"), target_modules=["lm_head"]).shared == {}


def test_a_module_with_two_names_is_one_target():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, 7)
            self.inner = nn.Module()
            self.inner.second = self.first

    model = Twice()
    for given in (["first"], ["second"], ["first", "second"], "all-linear"):
        targets = resolve(model, target_modules=given)
        assert targets.modules == {"first": model.first}
        assert targets.also == {"first": ["inner.second"]}
        assert targets.shared == {}
    (problem,) = problems_of(model, target_modules="all-linear", exclude_modules=["second"])
    assert "nothing is left" in problem


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_models_are_unwrapped_inside_and_out():
    model = fresh("llama")
    paths = resolve(model).paths
    assert unwrap(torch.compile(model)) is model
    assert resolve(torch.compile(model)).paths == paths
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert resolve(model).paths == paths


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_wrappers_that_hide_the_adapter_are_refused():
    with pytest.raises(TargetError, match="DataParallel") as caught:
        resolve(nn.DataParallel(build("bert")))
    assert "model.module" in str(caught.value)
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(fresh("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TargetError, match="adapters of PEFT"):
        resolve(wrapped)


def test_a_model_that_is_a_layer_itself_has_nowhere_to_sit():
    (problem,) = problems_of(nn.Linear(3, 5), target_modules="all-linear")
    assert "nothing is left to adapt" in problem


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "cnn"])
def test_models_without_weights_resolve_alike(name):
    with torch.device("meta"):
        model = fresh(name)
    assert resolve(model).paths == resolve(build(name)).paths


@pytest.mark.parametrize("name", CAUSAL)
def test_nothing_is_changed(name):
    model = fresh(name)
    before = {path: (type(m), id(m)) for path, m in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    resolve(model, target_modules="all-linear")
    assert {path: (type(m), id(m)) for path, m in model.named_modules()} == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
