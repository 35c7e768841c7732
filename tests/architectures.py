"""Small random models of many architectures, for tests that must hold on all of them.

Every model builds in milliseconds, is in float32 and eval mode, and is the same on every call.
Noise is added to all parameters, so that no bias is zero and no output is too faint to tell models
apart. Sizes are odd wherever the architecture permits, so that a transposed or cut tensor does not
fit by chance.

    arch = ARCHITECTURES["llama"]
    model = arch.build()
    logits = arch.logits(model(**arch.sample(model, 2, 7)))  # first dimension: rows of the batch
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 97
NUM_LABELS = 3

# One width for all: 36 = 3 heads of 12 (rotary embeddings want an even head).
_WIDTHS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {**_WIDTHS, **_TOKENS, "intermediate_size": 53, "max_position_embeddings": 64}
_GROUPED = {**_DECODER, "num_key_value_heads": 1, "head_dim": 12}
_ENCODER = {
    **_WIDTHS,
    "pad_token_id": 0,
    "intermediate_size": 53,
    "max_position_embeddings": 64,
    "num_labels": NUM_LABELS,
}


@dataclass(frozen=True)
class Architecture:
    """How one small model is built, fed and read.

    Attributes:
        name: the key in ARCHITECTURES.
        task: "causal-lm", "text-classification", "seq2seq", "vision", "speech", "two-towers" or
            "module".
        build: makes the model.
        sample: (model, batch, length) -> keyword arguments of its forward, the same on every call.
        logits: what the forward returned -> a tensor whose first dimension is the batch.
    """

    name: str
    task: str
    build: Callable[[], nn.Module]
    sample: Callable[[nn.Module, int, int], dict[str, Tensor]]
    logits: Callable[[Any], Tensor]


def _built(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.float().eval()


def _pretrained(model_class: str, config_class: str, **settings: Any) -> nn.Module:
    config = getattr(hf, config_class)(**settings)
    return getattr(hf, model_class)(config)


def _generator(batch: int, length: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * batch + length)


def _token_ids(batch: int, length: int, shift: int = 0) -> Tensor:
    """Ids that avoid the special tokens 0 to 2."""
    return torch.randint(
        3, VOCABULARY, (batch, length), generator=_generator(batch, length + shift)
    )


def _text(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    ids = _token_ids(batch, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _ids_only(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    return {"input_ids": _token_ids(batch, length)}


def _pair(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    """Source and target of different lengths."""
    return {
        **_text(model, batch, length),
        "decoder_input_ids": _token_ids(batch, length + 2, shift=50),
    }


def _pixels(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 12, 12, generator=_generator(batch, length))}


def _spectrogram(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    frames = 2 * model.config.max_source_positions
    features = torch.randn(batch, 10, frames, generator=_generator(batch, length))
    return {"input_features": features, "decoder_input_ids": _token_ids(batch, length)}


def _waveform(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(batch, 40 * length, generator=_generator(batch, length))}


def _text_and_pixels(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    text = _text(model, batch, length)
    text["input_ids"][:, -1] = 2  # CLIP reads its text at the end token
    return {**text, **_pixels(model, batch, length)}


def _vectors(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    return {"src": torch.randn(batch, length, 36, generator=_generator(batch, length))}


def _query(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    return {"vectors": torch.randn(batch, length, 36, generator=_generator(batch, length))}


def _towers(output: Any) -> Tensor:
    return torch.cat([output.text_embeds, output.image_embeds], dim=-1)


class ConvolutionNet(nn.Module):
    """Tokens through Embedding, Conv1d, Conv2d (one of them grouped) and two Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 18)
        self.conv1 = nn.Conv1d(18, 21, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(1, 6, kernel_size=(3, 5), stride=(2, 1), padding=(1, 2), dilation=1)
        self.conv3 = nn.Conv2d(6, 9, kernel_size=3, padding=1, groups=3)
        self.fc1 = nn.Linear(9, 13, bias=False)
        self.fc2 = nn.Linear(13, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = F.gelu(self.conv1(self.embedding(input_ids).transpose(1, 2)))
        x = F.gelu(self.conv3(F.gelu(self.conv2(x.unsqueeze(1)))))
        return self.fc2(F.gelu(self.fc1(x.mean(dim=(2, 3)))))


class AttentionNet(nn.Module):
    """nn.MultiheadAttention whose keys and values are narrower than its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(36, 25)
        self.attention = nn.MultiheadAttention(36, 3, kdim=25, vdim=25, batch_first=True)
        self.feed_forward = nn.Linear(36, 11)

    def forward(self, vectors: Tensor) -> Tensor:
        memory = self.narrow(vectors)
        mixed, _ = self.attention(vectors, memory, memory, need_weights=False)
        return self.feed_forward(mixed + vectors)


def _transformer_encoder() -> nn.Module:
    # An even number of heads: with an odd one torch's fast path is off.
    layer = nn.TransformerEncoderLayer(36, 4, dim_feedforward=53, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)


def _logits(output: Any) -> Tensor:
    return output.logits


def _tensor(output: Tensor) -> Tensor:
    return output


ARCHITECTURES: dict[str, Architecture] = {}


def _add(
    name: str,
    task: str,
    make: Callable[[], nn.Module],
    sample: Callable[[nn.Module, int, int], dict[str, Tensor]] = _text,
    logits: Callable[[Any], Tensor] = _logits,
) -> None:
    build = functools.partial(_built, make, seed=len(ARCHITECTURES))
    ARCHITECTURES[name] = Architecture(name, task, build, sample, logits)


def _add_pretrained(
    name: str,
    task: str,
    prefix: str,
    model: str = "ForCausalLM",
    sample: Callable[[nn.Module, int, int], dict[str, Tensor]] = _text,
    logits: Callable[[Any], Tensor] = _logits,
    **settings: Any,
) -> None:
    config = settings.pop("config", prefix + "Config")
    _add(
        name,
        task,
        functools.partial(_pretrained, prefix + model, config, **settings),
        sample,
        logits,
    )


def _add_decoders() -> None:
    def add(name: str, prefix: str, model: str = "ForCausalLM", **settings: Any) -> None:
        _add_pretrained(name, "causal-lm", prefix, model, **settings)

    experts = {"num_experts_per_tok": 2, "output_router_logits": False}
    add("llama", "Llama", **_GROUPED)
    add("llama-tied", "Llama", **_GROUPED, tie_word_embeddings=True)
    add("mistral", "Mistral", **_GROUPED, sliding_window=None)
    add("qwen2", "Qwen2", **_DECODER, num_key_value_heads=1)
    add("qwen3", "Qwen3", **_GROUPED)
    add("gemma", "Gemma", **_GROUPED)
    add("gemma2", "Gemma2", **_GROUPED, query_pre_attn_scalar=12, sliding_window=8)
    add("phi", "Phi", **_DECODER, partial_rotary_factor=0.5)
    add(
        "phi3",
        "Phi3",
        **{**_DECODER, "num_key_value_heads": 1, "original_max_position_embeddings": 64},
    )
    add("gpt_neox", "GPTNeoX", **_DECODER, rotary_pct=0.5)
    add(
        "gpt2",
        "GPT2",
        "LMHeadModel",
        vocab_size=VOCABULARY,
        n_embd=36,
        n_layer=2,
        n_head=3,
        n_inner=53,
        n_positions=64,
        **_TOKENS,
    )
    add(
        "opt",
        "OPT",
        **_WIDTHS,
        **_TOKENS,
        ffn_dim=53,
        max_position_embeddings=64,
        word_embed_proj_dim=36,
    )
    add("bloom", "Bloom", vocab_size=VOCABULARY, hidden_size=36, n_layer=2, n_head=3, **_TOKENS)
    add(
        "falcon",
        "Falcon",
        **_WIDTHS,
        **_TOKENS,
        ffn_hidden_size=53,
        num_kv_heads=1,
        multi_query=True,
        new_decoder_architecture=False,
        max_position_embeddings=64,
    )
    add(
        "mixtral",
        "Mixtral",
        **{**_GROUPED, "intermediate_size": 20},
        num_local_experts=4,
        **experts,
        sliding_window=None,
    )
    add(
        "qwen3_moe",
        "Qwen3Moe",
        **_GROUPED,
        num_experts=5,
        moe_intermediate_size=12,
        decoder_sparse_step=1,
        **experts,
    )
    add(
        "mamba",
        "Mamba",
        sample=_ids_only,
        vocab_size=VOCABULARY,
        hidden_size=36,
        num_hidden_layers=2,
        state_size=5,
        conv_kernel=4,
        time_step_rank=3,
        **_TOKENS,
    )


def _add_encoders() -> None:
    def add(
        name: str, prefix: str, model: str = "ForSequenceClassification", **settings: Any
    ) -> None:
        _add_pretrained(name, "text-classification", prefix, model, **settings)

    add("bert", "Bert", **_ENCODER)
    add("albert", "Albert", **_ENCODER, embedding_size=17)
    add("roberta", "Roberta", **_ENCODER)
    add(
        "deberta-v2",
        "DebertaV2",
        **_ENCODER,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        type_vocab_size=0,
    )
    add("electra", "Electra", **_ENCODER, embedding_size=17)
    add(
        "modernbert",
        "ModernBert",
        **_ENCODER,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        local_attention=8,
        attn_implementation="sdpa",
    )
    add(
        "distilbert",
        "DistilBert",
        vocab_size=VOCABULARY,
        dim=36,
        n_layers=2,
        n_heads=3,
        hidden_dim=53,
        max_position_embeddings=64,
        pad_token_id=0,
        num_labels=NUM_LABELS,
    )


def _add_seq2seq() -> None:
    t5 = {
        "vocab_size": VOCABULARY,
        "d_model": 36,
        "d_kv": 11,
        "d_ff": 53,
        "num_layers": 2,
        "num_heads": 3,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "initializer_factor": 0.2,
    }
    bart = {
        "vocab_size": VOCABULARY,
        "d_model": 36,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 3,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 53,
        "decoder_ffn_dim": 41,
        "max_position_embeddings": 64,
        **_TOKENS,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    }
    generation = "ForConditionalGeneration"
    _add_pretrained(
        "t5",
        "seq2seq",
        "T5",
        generation,
        _pair,
        **t5,
        feed_forward_proj="gated-gelu",
    )
    _add_pretrained("t5-relu", "seq2seq", "T5", generation, _pair, **t5)
    _add_pretrained("bart", "seq2seq", "Bart", generation, _pair, **bart)


def _add_vision_and_speech() -> None:
    vision = {
        "hidden_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 53,
        "image_size": 12,
        "patch_size": 6,
    }
    text = {
        **_WIDTHS,
        "intermediate_size": 41,
        "max_position_embeddings": 64,
        "projection_dim": 19,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    _add_pretrained(
        "vit", "vision", "ViT", "ForImageClassification", _pixels, **vision, num_labels=NUM_LABELS
    )
    _add_pretrained(
        "clip",
        "two-towers",
        "CLIP",
        "Model",
        _text_and_pixels,
        _towers,
        text_config=text,
        vision_config={**vision, "projection_dim": 19},
        projection_dim=19,
    )
    _add_pretrained(
        "whisper",
        "speech",
        "Whisper",
        "ForConditionalGeneration",
        _spectrogram,
        vocab_size=VOCABULARY,
        num_mel_bins=10,
        d_model=36,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=2,
        encoder_ffn_dim=53,
        decoder_ffn_dim=41,
        max_source_positions=16,
        max_target_positions=64,
        **_TOKENS,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    _add_pretrained(
        "wav2vec2",
        "speech",
        "Wav2Vec2",
        "ForSequenceClassification",
        _waveform,
        vocab_size=32,
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=53,
        conv_dim=(14, 15),
        conv_kernel=(5, 3),
        conv_stride=(4, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=17,
        mask_time_prob=0.0,
        layerdrop=0.0,
        num_labels=NUM_LABELS,
    )


_add_decoders()
_add_encoders()
_add_seq2seq()
_add_vision_and_speech()
_add("cnn", "module", ConvolutionNet, _ids_only, _tensor)
_add("transformer-encoder", "module", _transformer_encoder, _vectors, _tensor)
_add("attention-net", "module", AttentionNet, _query, _tensor)


def _names(*tasks: str) -> list[str]:
    return [name for name, arch in ARCHITECTURES.items() if arch.task in tasks]


CAUSAL = _names("causal-lm")
ENCODERS = _names("text-classification")
SEQ2SEQ = _names("seq2seq")
VISION_AND_SPEECH = _names("vision", "speech", "two-towers")
PLAIN_MODULES = _names("module")
EXPERTS = ["mixtral", "qwen3_moe"]
"""Those whose experts are 3-D parameters."""


def said(name: str, model: nn.Module, **inputs: Tensor) -> Tensor:
    """The logits of a model of the table."""
    with torch.no_grad():
        return ARCHITECTURES[name].logits(model(**inputs))


def inputs_of(name: str, model: nn.Module, batch: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Inputs of a model of the table, with an attention mask."""
    inputs = ARCHITECTURES[name].sample(model, batch, length)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    return inputs


def llama_of_width(hidden: int) -> hf.LlamaForCausalLM:
    """A Llama of a chosen width: bitsandbytes is particular about it, the models above are odd."""
    config = hf.LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(config)
