"""Methods beside LoRA between Lorica and the real PEFT: the same outputs, gradients and files."""

import json
import warnings
from typing import Any

import peft
import pytest
import torch

from architectures import ARCHITECTURES
from lorica.attach.activate import activate
from lorica.attach.attach import attach
from lorica.errors import AdapterFileError
from lorica.files.adapter import load_adapter, save_adapter
from lorica.files.peft_config import OTHER_KINDS
from lorica.files.peft_methods import KINDS
from lorica.methods import IA3, AdaLoRA, DoRA, HiRA, LoHa, LoKr, LoRA, RoAd, VeRA
from parity.measured import TOLERANCE, error, logits, ours_first, stir, theirs_first

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file.*adapter_config:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning:peft"),
]

BOTH = ["q_proj", "down_proj"]
CASES: dict[str, tuple[str, Any, Any]] = {
    "dora": (
        "llama",
        DoRA(r=4, lora_alpha=6, target_modules=BOTH),
        peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=BOTH),
    ),
    "dora-gpt2": (
        "gpt2",
        DoRA(r=4, target_modules=("c_attn",)),
        peft.LoraConfig(r=4, lora_alpha=16, use_dora=True, target_modules=["c_attn"]),
    ),
    "orthogonal": (
        "llama",
        LoRA(r=4, target_modules=BOTH, init_lora_weights="orthogonal"),
        peft.LoraConfig(r=4, lora_alpha=16, target_modules=BOTH, init_lora_weights="orthogonal"),
    ),
    "adalora": (
        "llama",
        AdaLoRA(init_r=5, target_r=3, lora_alpha=6, tinit=1, tfinal=2, target_modules=BOTH),
        peft.AdaLoraConfig(
            init_r=5,
            target_r=3,
            lora_alpha=6,
            tinit=1,
            tfinal=2,
            total_step=9,
            target_modules=BOTH,
        ),
    ),
    "adalora-gpt2": (
        "gpt2",
        AdaLoRA(init_r=4, target_r=3, target_modules=("c_attn",)),
        peft.AdaLoraConfig(
            init_r=4, target_r=3, lora_alpha=16, total_step=9, target_modules=["c_attn"]
        ),
    ),
    "adalora-conv": (
        "vit",
        AdaLoRA(init_r=3, target_r=2, target_modules=("projection",)),
        peft.AdaLoraConfig(
            init_r=3, target_r=2, lora_alpha=16, total_step=9, target_modules=["projection"]
        ),
    ),
    "vera": (
        "llama",
        VeRA(r=16, target_modules=BOTH, projection_prng_key=5, d_initial=0.3),
        peft.VeraConfig(r=16, target_modules=BOTH, projection_prng_key=5, d_initial=0.3),
    ),
    "vera-gpt2": (
        "gpt2",
        VeRA(r=16, target_modules=("c_attn",)),
        peft.VeraConfig(r=16, target_modules=["c_attn"]),
    ),
    "loha": (
        "llama",
        LoHa(r=4, lora_alpha=6, target_modules=BOTH),
        peft.LoHaConfig(r=4, alpha=6, target_modules=BOTH),
    ),
    "lokr": (
        "llama",
        LoKr(r=1, lora_alpha=3, target_modules=BOTH, decompose_both=True),
        peft.LoKrConfig(r=1, alpha=3, target_modules=BOTH, decompose_both=True),
    ),
    "lokr-whole": (
        "bert",
        LoKr(r=16, lora_alpha=3, target_modules=("query",), decompose_factor=4),
        peft.LoKrConfig(r=16, alpha=3, target_modules=["query"], decompose_factor=4),
    ),
    "lokr-conv": (
        "wav2vec2",
        LoKr(r=2, target_modules=("conv",)),
        peft.LoKrConfig(r=2, alpha=16, target_modules=["conv"]),
    ),
    "loha-conv": (
        "wav2vec2",
        LoHa(r=1, target_modules=("conv",)),
        peft.LoHaConfig(r=1, alpha=16, target_modules=["conv"]),
    ),
    "hira": (
        "llama",
        HiRA(r=4, target_modules=BOTH),
        peft.HiraConfig(r=4, target_modules=BOTH),
    ),
    **{
        variant: (
            "bert",
            RoAd(variant=variant, group_size=4, target_modules=("query", "output.dense")),  # type: ignore[arg-type]
            peft.RoadConfig(
                variant=variant,  # type: ignore[arg-type]
                group_size=4,
                target_modules=["query", "output.dense"],
            ),
        )
        for variant in ("road_1", "road_2", "road_4")
    },
    "ia3": (
        "bert",
        IA3(target_modules=("key", "intermediate.dense"), feedforward_modules=("dense",)),
        peft.IA3Config(
            target_modules=["key", "intermediate.dense"], feedforward_modules=["intermediate.dense"]
        ),
    ),
}
every = pytest.mark.parametrize("case", CASES)


@every
def test_theirs_read_by_us_and_written_again(case, tmp_path):
    name, _, config = CASES[case]
    found = theirs_first(name, config, tmp_path)
    assert found.outputs <= TOLERANCE and found.returned <= TOLERANCE, found
    assert found.gradients <= TOLERANCE, found


@every
def test_ours_read_by_them(case, tmp_path):
    name, method, _ = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert ours_first(name, method, tmp_path) <= TOLERANCE


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_began_from_the_weight_is_plain_lora_of_twice_the_rank(init, rslora, tmp_path):
    model = ARCHITECTURES["llama"].build()
    method = LoRA(r=3, use_rslora=rslora, target_modules=BOTH, init_lora_weights=init)
    adapter = attach(model, method, name="a")
    stir(adapter.parameters())
    with torch.no_grad(), activate(model, "a"):
        expected = logits("llama", model, model)
    save_adapter(adapter, tmp_path / "ours")
    base = ARCHITECTURES["llama"].build()
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["r"] == 6
    with torch.no_grad():
        assert error(logits("llama", theirs, base), expected) <= TOLERANCE


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_start_is_that_of_peft(init):
    """PEFT's A and B are ours; only that it takes their product out of the base, and we do not."""
    ours = attach(
        ARCHITECTURES["llama"].build(),
        LoRA(r=3, lora_alpha=6, target_modules=("q_proj",), init_lora_weights=init),
    )
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=init)
    theirs = peft.get_peft_model(ARCHITECTURES["llama"].build(), config)
    for path, slot in ours.slots.items():
        layer = theirs.get_submodule(f"base_model.model.{path}")
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(slot.tensors["B"] @ slot.tensors["A"], B @ A)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"use_effective_conv2d": True}, "use_effective_conv2d"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"rr": 3}, "did the writer mean r"),
        ({"r": "x"}, "r is 'x'"),
        ({"r": 5}, "this base needs"),
        ({"target_modules": ["q_proj", "up_proj"]}, "up_proj: its tensors are missing"),
        ({"target_modules": ["q_proj"]}, "does not name this place"),
    ],
)
def test_what_does_not_fit_is_refused(change, word, tmp_path):
    name, method, _ = CASES["loha"]
    adapter = attach(ARCHITECTURES[name].build(), method, name="a")
    save_adapter(adapter, tmp_path / "x")
    path = tmp_path / "x/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(AdapterFileError, match=word):
        load_adapter(ARCHITECTURES[name].build(), tmp_path / "x")


def test_the_kinds_that_are_read_are_told():
    assert tuple(KINDS) == OTHER_KINDS
