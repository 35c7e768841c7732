"""A spread base is what its files say, whatever the architecture; here by one process alone."""

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from lorica.base.processes import joined
from lorica.base.sharded import _start_buffers, load_sharded
from lorica.base.tokenizer import load_tokenizer
from lorica.errors import BaseModelError

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
CONFIGS = {
    # weight and scale in one module; sliding and whole attention
    "gemma3": (hf.Gemma3TextConfig, {**SIZES, "sliding_window": 16}),
    "gemma2": (hf.Gemma2Config, SIZES),
    "qwen3": (hf.Qwen3Config, SIZES),
    # rotations that are computed, of a part of each head
    "gptj": (hf.GPTJConfig, {**OLD, "rotary_dim": 8}),
    # buffers of whole numbers: which positions see which
    "gpt2": (hf.GPT2Config, OLD),
    "opt": (
        hf.OPTConfig,
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 64,
        },
    ),
}


@pytest.fixture(scope="module")
def processes():
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MASTER_ADDR", "127.0.0.1")
        environment.setenv("MASTER_PORT", "0")
        with joined(0, 1) as found:
            yield found


@pytest.fixture
def base(tmp_path):
    """Makes the folder of a model without training, of these settings."""
    tokenizer = load_tokenizer("embedded")

    def make(kind, **more):
        config, sizes = CONFIGS[kind]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = hf.AutoModelForCausalLM.from_config(
                config(vocab_size=len(tokenizer) + 3, **sizes, **more)
            )
            for parameter in model.parameters():  # norms and biases too: none as it is started
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return tmp_path

    return make


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_spread_base_is_that_of_the_files(kind, base, processes):
    folder = base(kind)
    model = load_sharded(folder, processes, dtype="float32")
    own = model.state_dict()
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118
            tensor = own[name].full_tensor() if isinstance(own[name], DTensor) else own[name]
            assert torch.equal(tensor, stored.get_tensor(name)), name
    assert any(isinstance(tensor, DTensor) for tensor in own.values())
    whole = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, whole(tokens).logits)


def test_layers_that_are_left_out_at_random_are_refused(base, processes):
    with pytest.raises(BaseModelError, match=r"leaves out layers .*layerdrop: 0.5"):
        load_sharded(base("opt", layerdrop=0.5), processes, dtype="float32")


class Marked(torch.nn.Linear):
    """Has buffers that no file has, and says how some are computed."""

    def __init__(self):
        super().__init__(2, 2)
        for name in ("written", "left", "drawn"):
            dtype = torch.float32 if name == "drawn" else torch.long
            self.register_buffer(name, torch.zeros(3, dtype=dtype), persistent=False)


class Starting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Marked()

    def _init_weights(self, module):
        if isinstance(module, Marked):
            module.written.copy_(torch.arange(3))
            torch.nn.init.normal_(module.drawn)
            torch.nn.init.ones_(module.weight)


def test_buffers_that_nobody_computes_are_refused():
    with torch.device("meta"):
        model = Starting()
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight._is_hf_initialized = True
    model.part.weight = weight
    with pytest.raises(BaseModelError) as refused:
        _start_buffers(model, torch.device("cpu"))
    assert refused.value.problems == ("part.left", "part.drawn")
    assert torch.equal(weight, torch.zeros(2, 2))
